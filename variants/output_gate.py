import attngen as ag


class OutputGate(ag.Variant):
    """Each element of the output has a gate: o' = o * sigmoid(gate[q_token, head, dim]). ``ag.compose(OutputGate(), Causal())`` is the
    attention of Qwen3-Next's full layers.

    Source: Qiu et al. 2025, "Gated Attention for Large Language Models", G1 elementwise; transformers' ``Qwen3NextAttention``.

    gate: ``[q_tokens, heads, head_dim_v]``, before the sigmoid: what the gate's projection gives, as it lies.
    """

    gate: ag.Tensor("q_tokens", "heads", "gate_dims")

    def output(self, o, at):
        return o * ag.sigmoid(self.gate[at.q_token, at.head, at.dim])


class HeadGate(ag.Variant):
    """Each head's output has a gate: o' = o * sigmoid(gate[q_token, head]), which lets a head say nothing as a sink does.

    Source: Qiu et al. 2025, headwise; Step-3.5.
    """

    gate: ag.Tensor("q_tokens", "heads")

    def output(self, o, at):
        return o * ag.sigmoid(self.gate[at.q_token, at.head])
