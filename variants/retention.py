import attngen as ag


class Retention(ag.Variant):
    """Retention, softmax replaced by a decay: o = sum over kv <= q of s * gamma[head] ** (q - kv) * v. No LSE; the group norm follows it.

    Source: Sun et al. 2023, "Retentive Network", equation 5 (gamma = 1 - 2 ** (-5 - head)); MiniMax-01's lightning attention and TransNormer
    have the same form (gamma = exp(-slope)).

    gamma: ``[heads]``, between 0 and 1.
    """

    gamma: ag.Tensor("heads")

    def weight(self, s, at):
        return s * ag.exp2(ag.log2(self.gamma[at.head]) * ag.max(at.q - at.kv, 0))

    def mask(self, at):
        return at.kv <= at.q
