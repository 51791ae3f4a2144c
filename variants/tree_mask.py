import attngen as ag


class TreeMask(ag.Variant):
    """Speculative decoding: the last q_len tokens are the nodes of a tree of drafts. A node attends to the whole
    context before the tree and, within it, to its ancestors.

    With first = kv_len - q_len: kv < first or ancestors[request, q - first, kv - first].

    Source: Miao et al. 2024 (SpecInfer), tree attention; Cai et al. 2024 (Medusa).

    ancestors: ``[requests, nodes, nodes]`` bool or uint8; [r, i, j] is true where node j is node i or an ancestor of
        it. nodes is q_len or more; a smaller tree leaves entries unused.
    """

    ancestors: ag.Tensor("requests", "nodes", "nodes", dtype=bool)

    def mask(self, at):
        first = at.kv_len - at.q_len
        return (at.kv < first) | self.ancestors[at.request, at.q - first, at.kv - first]
