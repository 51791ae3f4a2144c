import attngen as ag


class SlidingWindow(ag.Variant):
    """A query attends to the last ``window`` keys, its own included: q - window < kv <= q.

    Source: Beltagy et al. 2020 (Longformer); Jiang et al. 2023 (Mistral 7B, window 4096).

    window: a number of keys, as ``sliding_window`` of transformers and vLLM. FlashInfer's ``window_left`` and
        FlashAttention's ``window_size[0]`` count the keys before the query: theirs is window - 1. Their -1, 0 here, and any
        number below mean no window, so that one kernel serves layers with and without.
    """

    window: ag.Scalar[int] = 4096

    def mask(self, at):
        window = ag.where(self.window < 1, 2**31 - 1, self.window)
        return (at.kv <= at.q) & (at.q - at.kv < window)
