import attngen as ag


class VerticalSlash(ag.Variant):
    """Some keys for all queries and some distances for all: kv <= q, and vertical[head, kv] or slash[head, q - kv].

    Source: Jiang et al. 2024, "MInference 1.0", section 3: the vertical-slash pattern of long prompts, estimated head by head; vLLM's
    sparse attention for Qwen2.5-1M.

    vertical: ``[heads, positions]`` bools. slash: ``[heads, distances]`` bools; what lies beyond is masked.
    """

    vertical: ag.Tensor("heads", "positions", dtype=bool)
    slash: ag.Tensor("heads", "distances", dtype=bool)

    def mask(self, at):
        return (at.kv <= at.q) & (self.vertical[at.head, at.kv] | self.slash[at.head, at.q - at.kv])
