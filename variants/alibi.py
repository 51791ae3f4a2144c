import attngen as ag


class ALiBi(ag.Variant):
    """Attention with linear biases: s' = s - slope[head] * |q - kv|, with the paper's slopes. Masks nothing:
    ``ag.compose(ALiBi(), Causal())`` is the paper's decoder.

    With n heads, a power of two, slope[h] = 2 ** (-8 (h + 1) / n). Otherwise p, the power of two below n, gives the
    first p slopes, and the others are every second slope of 2p heads: 2 ** (-4 (2 (h - p) + 1) / p).

    Source: Press et al. 2022, "Train Short, Test Long", section 3, and ``get_slopes`` of their code; BLOOM, MPT.
    """

    def logits(self, s, at):
        n = at.num_heads
        for shift in (1, 2, 4, 8, 16):  # set every bit below the highest
            n = n | n >> shift
        p = n - (n >> 1)
        in_p = -8 * (at.head + 1) / p
        in_2p = -4 * (2 * (at.head - p) + 1) / p
        slope = ag.exp2(ag.where(at.head < p, in_p, in_2p))
        return s - slope * ag.abs(at.q - at.kv)


class ALiBiSlopes(ag.Variant):
    """ALiBi with slopes of one's own, ``slopes [heads]``: s' = s - slope[head] * |q - kv|.

    slopes: positive where distance costs, as FlashAttention's ``alibi_slopes``.
    """

    slopes: ag.Tensor("heads")

    def logits(self, s, at):
        return s - self.slopes[at.head] * ag.abs(at.q - at.kv)
