import attngen as ag


class Sigmoid(ag.Variant):
    """Sigmoid in place of softmax, no normalisation: o = sum over kv of sigmoid(s + bias) * v. Masks nothing; no LSE.

    Source: Ramapuram et al. 2024, "Theory, Analysis, and Best Practices for Sigmoid Self-Attention".

    bias: -log(n) for a model trained on sequences of n tokens (the paper's b); a number of the model, hence no default.
    """

    bias: ag.Scalar

    def weight(self, s, at):
        return ag.sigmoid(s + self.bias)
