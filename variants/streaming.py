import attngen as ag


class Streaming(ag.Variant):
    """Sink tokens and a window: kv <= q, and q - kv < window or kv < sinks.

    Source: Xiao et al. 2024, "Efficient Streaming Language Models with Attention Sinks", section 3.2, in the positions
    of the whole text; ``StreamingLLM`` re-counts them inside the cache, as the paper does. The same mask is the
    streaming heads' of DuoAttention and the Lambda shape of LM-Infinite.

    sinks: how many first tokens stay visible (4 in the paper).
    window: a number of recent keys, the query's own included.
    """

    sinks: ag.Scalar[int] = 4
    window: ag.Scalar[int] = 1024

    def mask(self, at):
        return (at.kv <= at.q) & ((at.q - at.kv < self.window) | (at.kv < self.sinks))
