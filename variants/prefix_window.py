import attngen as ag


class PrefixWindow(ag.Variant):
    """A window that keeps each request's prefix in sight: kv <= q, and q - kv < window or kv < prefix_len[request].

    Source: vLLM's R-SWA (``rswa_prefix_lens``): the prompt, or its system part, stays visible while generated tokens slide.

    prefix_len: ``[requests]`` ints. window: a number of keys, the query's own included.
    """

    prefix_len: ag.Tensor("requests", dtype=int)
    window: ag.Scalar[int] = 4096

    def mask(self, at):
        return (at.kv <= at.q) & ((at.q - at.kv < self.window) | (at.kv < self.prefix_len[at.request]))
