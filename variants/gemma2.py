import attngen as ag


class Gemma2(ag.Variant):
    """Soft-capped logits, causal, sliding window: s' = cap * tanh(s / cap) where q - window < kv <= q.

    Source: Gemma Team 2024, "Gemma 2", section 2, and transformers' ``Gemma2Attention``. This is a local layer; the
    global ones in between are ``ag.compose(SoftCap(50.0), Causal())``, or this with window=0. The model's scale is
    ``query_pre_attn_scalar ** -0.5``: pass it as scale=.

    window: a number of keys, the query's own included; below 1 there is none.
    """

    cap: ag.Scalar = 50.0
    window: ag.Scalar[int] = 4096

    def logits(self, s, at):
        return self.cap * ag.tanh(s / self.cap)

    def mask(self, at):
        window = ag.where(self.window < 1, 2**31 - 1, self.window)
        return (at.kv <= at.q) & (at.q - at.kv < window)
