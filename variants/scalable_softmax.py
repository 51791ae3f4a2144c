import attngen as ag


class ScalableSoftmax(ag.Variant):
    """Logits that sharpen with the number of keys: s' = s * slope[head] * log(n), n = q + 1 keys under a causal mask.
    ``ag.compose(ScalableSoftmax(), Causal())`` is the paper's decoder.

    Source: Nakanishi 2025, "Scalable-Softmax Is Superior for Attention", equation 2; Llama 4 has a variation of it.

    slope: ``[heads]``, learned; about 0.4 in the paper. The first query sees one key, whatever its logit.
    """

    slope: ag.Tensor("heads")

    def query_scale(self, at):
        return self.slope[at.head] * ag.log(ag.max(at.q + 1, 1))
