import attngen as ag


class Sinks(ag.Variant):
    """A learned logit in the denominator: p = exp(s) / (exp(sinks[head]) + sum exp(s)), so that a head can attend to
    nothing. Masks nothing; LSE includes the sink.

    Source: OpenAI 2025 (gpt-oss), ``s_aux`` of transformers; with sinks = 0, Miller 2023, "Attention Is Off By One".

    sinks: ``[heads]``, in units of the scaled logits.
    """

    sinks: ag.Tensor("heads")

    def sink(self, at):
        return self.sinks[at.head]


class GptOss(Sinks):
    """gpt-oss's banded layers: sinks, causal, window of 128 keys, the query's own included; below 1 there is none. Its
    dense layers, every second one, are ``ag.compose(Sinks(), Causal())``, or this with window=0.

    Source: OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card".
    """

    window: ag.Scalar[int] = 128

    def mask(self, at):
        window = ag.where(self.window < 1, 2**31 - 1, self.window)
        return (at.kv <= at.q) & (at.q - at.kv < window)
