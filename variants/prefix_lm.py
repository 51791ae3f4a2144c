import attngen as ag


class PrefixLM(ag.Variant):
    """Bidirectional within a prefix, causal after it: kv <= q or kv < prefix_len[request].

    Source: Raffel et al. 2020 (T5), section 3.2.1, figure 4; Dong et al. 2019 (UniLM); PaliGemma's image and prompt.

    prefix_len: ``[requests]`` ints, how many leading keys of each request every query of it sees.
    """

    prefix_len: ag.Tensor("requests", dtype=int)

    def mask(self, at):
        return (at.kv <= at.q) | (at.kv < self.prefix_len[at.request])
