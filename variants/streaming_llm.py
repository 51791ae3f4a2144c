import attngen as ag


class StreamingLLM(ag.Variant):
    """Sink tokens and a window, with RoPE at positions re-counted inside the cache; k holds unrotated keys.

    A query sees the first ``sinks`` tokens and the last ``window``, its own included, numbered 0, 1, 2 ... without the
    gap. So a window key is q - kv away, and a sink min(q, sinks + window - 1) - kv. RoPE sees only differences: the
    positions of window keys, and of queries towards them, are moved down by what the last query of the request has
    evicted, which makes them the cache's own in decoding and keeps the angles small at any length.

    Source: Xiao et al. 2024, "Efficient Streaming Language Models with Attention Sinks", section 3.2, and
    ``llama_pos_shift_attention_forward`` of their code.
    """

    sinks: ag.Scalar[int] = 4
    window: ag.Scalar[int] = 2000
    theta: ag.Const[float] = 10000.0

    def rope(self):
        def evicted(at):
            return ag.max(at.kv_len - self.sinks - self.window, 0)

        return ag.RoPE(
            self.theta,
            keys="rotate",
            q_position=lambda at: ag.where(
                at.kv < self.sinks, ag.min(at.q, self.sinks + self.window - 1), at.q - evicted(at)
            ),
            kv_position=lambda at: ag.where(at.kv < self.sinks, at.kv, at.kv - evicted(at)),
        )

    def mask(self, at):
        return (at.kv <= at.q) & ((at.q - at.kv < self.window) | (at.kv < self.sinks))
