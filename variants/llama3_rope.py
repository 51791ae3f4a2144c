import attngen as ag


class Llama3RoPE(ag.Variant):
    """Causal attention with Llama 3.1's rotary embedding fused in: s = rotate(q, q_pos) . rotate(k, kv_pos) * scale.

    Pair i of head_dim / 2 turns by theta ** (-2i / head_dim) a position; wavelengths above original / low_freq_factor
    are stretched by factor, those below original / high_freq_factor are kept, those between are blended.

    Source: Su et al. 2021 (RoFormer); Llama 3.1 and 3.2, ``rope_type: llama3`` of transformers. The pairs are
    (i, i + head_dim / 2), as in transformers' checkpoints. Llama 3.2 1B and 3B have factor 32.

    rotated_cache: False, k holds unrotated keys and is rotated here; True, the cache holds rotated keys.
    """

    theta: ag.Const[float] = 500000.0
    factor: ag.Const[float] = 8.0
    low_freq_factor: ag.Const[float] = 1.0
    high_freq_factor: ag.Const[float] = 4.0
    original: ag.Const[int] = 8192
    rotated_cache: ag.Const[bool] = False

    def rope(self):
        scaling = ag.Llama3(self.factor, self.low_freq_factor, self.high_freq_factor, self.original)
        return ag.RoPE(self.theta, scaling=scaling, keys="cached" if self.rotated_cache else "rotate")

    def mask(self, at):
        return at.kv <= at.q
