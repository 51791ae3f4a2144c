import attngen as ag


class Forgetting(ag.Variant):
    """Causal attention with a forget gate: s' = s + c[q] - c[kv], where c is the running sum of the logarithms of a head's gates.

    Source: Lin et al. 2025, "Forgetting Transformer: Softmax Attention with a Forget Gate", equation 5: the bias is the sum of log f over
    positions kv + 1 ... q.

    decay: ``[requests, heads, positions]``, log_sigmoid(gate).cumsum(-1); float32, since it grows with the sequence.
    """

    decay: ag.Tensor("requests", "heads", "positions")

    def logits(self, s, at):
        return s + (self.decay[at.request, at.head, at.q] - self.decay[at.request, at.head, at.kv])

    def mask(self, at):
        return at.kv <= at.q
