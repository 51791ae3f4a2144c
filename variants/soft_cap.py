import attngen as ag


class SoftCap(ag.Variant):
    """Logits squashed into (-cap, cap): s' = cap * tanh(s / cap), where s = q.k * scale.

    Source: Bello et al. 2016, "Neural Combinatorial Optimization"; Gemma 2 (50), Grok-1 (30).

    cap: ``attn_logit_softcapping`` of transformers, ``softcap`` of FlashAttention, ``logits_soft_cap`` of FlashInfer.
    """

    cap: ag.Scalar = 50.0

    def logits(self, s, at):
        return self.cap * ag.tanh(s / self.cap)
