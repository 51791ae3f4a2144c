import attngen as ag


class Llama4Temperature(ag.Variant):
    """Queries sharpened with their position: q' = q * (1 + attn_scale * log(1 + floor((q_pos + 1) / floor_scale))).

    Llama 4's layers without RoPE are ``ag.compose(Llama4Temperature(), Causal())``. Positions before the sequence,
    which a q_len above kv_len makes, keep a factor of 1.

    Source: Llama 4 (``floor_scale`` and ``attn_scale`` of transformers' ``Llama4TextAttention``); Nakanishi 2025,
    "Scalable-Softmax Is Superior for Attention".
    """

    floor_scale: ag.Scalar[int] = 8192
    attn_scale: ag.Scalar = 0.1

    def query_scale(self, at):
        steps = ag.max(at.q + 1, 0) // self.floor_scale
        return 1.0 + self.attn_scale * ag.log(1 + steps)


class Ministral3Temperature(ag.Variant):
    """Queries sharpened past the original context: q' = q * (1 + beta * log(1 + floor(q_pos / original))).

    Source: Ministral 3 and Mistral 4 (``llama_4_scaling_beta`` and ``original_max_position_embeddings`` of transformers'
    ``get_llama_4_attn_scale``): as Llama 4's, but from position ``original`` on, not one before it.
    """

    original: ag.Scalar[int] = 16384
    beta: ag.Scalar = 0.1

    def query_scale(self, at):
        return 1.0 + self.beta * ag.log(1 + ag.max(at.q, 0) // self.original)
