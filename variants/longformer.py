import attngen as ag


class Longformer(ag.Variant):
    """A window to both sides and tokens that see, and are seen by, all: |q - kv| <= window, global_token[q] or global_token[kv].

    Source: Beltagy et al. 2020, section 3.1, figure 2d; BigBird (Zaheer et al. 2020) without its random blocks. Longformer projects
    its global tokens' queries and keys by other matrices: pass those.

    window: keys to each side, half of transformers' ``attention_window``. global_token: ``[requests, positions]`` bools.
    """

    global_token: ag.Tensor("requests", "positions", dtype=bool)
    window: ag.Scalar[int] = 256

    def mask(self, at):
        seen = self.global_token[at.request, at.q] | self.global_token[at.request, at.kv]
        return (ag.abs(at.q - at.kv) <= self.window) | seen
