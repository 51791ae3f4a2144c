import attngen as ag


class BidirectionalWindow(ag.Variant):
    """A window to both sides: q - left <= kv <= q + right.

    Source: ModernBERT's local layers (left = right = ``local_attention`` // 2 = 64), EmbeddingGemma, T5Gemma's encoder;
    FlashAttention's ``window_size=(left, right)``, transformers' ``sliding_window_bidirectional_overlay``.

    left, right: keys before and after the query, its own not counted.
    """

    left: ag.Scalar[int] = 64
    right: ag.Scalar[int] = 64

    def mask(self, at):
        return (at.q - at.kv <= self.left) & (at.kv - at.q <= self.right)
