import attngen as ag


class T5Bias(ag.Variant):
    """T5's learned bias of the distance: s' = s + table[head, bucket(kv - q)], scale 1. Masks nothing.

    With b buckets a side (16 for each sign where bidirectional, the upper 16 for kv > q; else 32 for kv <= q), distance
    d has bucket d below b/2, and from there on b/2 + floor(log(2d / b) / log(2 max_distance / b) * b/2), b - 1 at most.
    Each step of that logarithm is found here in exact integers: no rounding ever moves a distance to another bucket.

    Source: Raffel et al. 2020 (T5), section 2.1, and ``_relative_position_bucket`` of mesh-tensorflow and transformers.

    table: ``[heads, 32]``, the transpose of transformers' ``relative_attention_bias.weight``.
    bidirectional: True in the encoder, False in the decoder (compose with ``Causal()``).
    """

    scale = 1.0
    table: ag.Tensor("heads", 32)
    bidirectional: ag.Const[bool] = True
    max_distance: ag.Const[int] = 128

    def logits(self, s, at):
        buckets = 16 if self.bidirectional else 32
        half = buckets // 2  # distances below have a bucket each
        distance = ag.abs(at.q - at.kv) if self.bidirectional else ag.max(at.q - at.kv, 0)
        bucket = ag.min(distance, half)
        for step in range(1, half):
            # the first d with (d / half) ** half >= (max_distance / half) ** step
            target = self.max_distance**step * half ** (half - step)
            first = next(d for d in range(half, self.max_distance + 1) if d**half >= target)
            bucket = bucket + ag.cast(distance >= first, int)
        if self.bidirectional:
            bucket = bucket + ag.where(at.kv > at.q, buckets, 0)
        return s + self.table[at.head, bucket]
