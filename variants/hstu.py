import attngen as ag


class HSTU(ag.Variant):
    """Pointwise attention of recommenders: o = sum over kv <= q of silu(q . k + bias[kv - q + longest - 1]) / longest * v. No LSE.

    Source: Zhai et al. 2024, "Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for Generative
    Recommendations", equation 2, with the relative position bias of their code. q.k is not scaled.

    longest: the length that sequences are cut to, by which sums are divided. bias: ``[2 * longest - 1]``, by kv - q from 1 - longest on.
    """

    bias: ag.Tensor("offsets")
    longest: ag.Scalar[int]
    scale = 1.0

    def weight(self, s, at):
        x = s + self.bias[at.kv - at.q + self.longest - 1]
        return x * ag.sigmoid(x) / self.longest

    def mask(self, at):
        return at.kv <= at.q
