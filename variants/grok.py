import attngen as ag


class Grok(ag.Variant):
    """Soft cap, then a temperature that grows past ``temperature_len``, causal.

    s' = cap * tanh(s / cap) * (log2(q) / log2(temperature_len) if q > temperature_len else 1), kv <= q.

    Source: Grok-1's cap of 30 and Grok-2's ``attn_temperature_len`` 1024, in the order and with the 0-based query
    position of SGLang (``xai_temperature_len`` of its Triton attention). The models' scale is
    ``attn_output_multiplier``: pass it as scale=.

    temperature_len: a position of 2 or more.
    """

    cap: ag.Scalar = 30.0
    temperature_len: ag.Scalar[int] = 1024

    def logits(self, s, at):
        growth = ag.log2(ag.max(at.q, 1)) / ag.log2(self.temperature_len)
        temperature = ag.where(at.q > self.temperature_len, growth, 1.0)
        return self.cap * ag.tanh(s / self.cap) * temperature

    def mask(self, at):
        return at.kv <= at.q
