import attngen as ag


class DuoAttention(ag.Variant):
    """Retrieval heads see all that came before, the others sink tokens and a window: kv <= q, and retrieval[head], q - kv < window or
    kv < sinks.

    Source: Xiao et al. 2024, "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads", section 2.

    retrieval: ``[heads]`` bools. sinks, window: numbers of first and of recent keys, the query's own included (64 and 256 in the paper).
    """

    retrieval: ag.Tensor("heads", dtype=bool)
    sinks: ag.Scalar[int] = 64
    window: ag.Scalar[int] = 256

    def mask(self, at):
        near = (at.q - at.kv < self.window) | (at.kv < self.sinks)
        return (at.kv <= at.q) & (near | self.retrieval[at.head])
