import attngen as ag


class SelectedBlocks(ag.Variant):
    """A query attends to the key blocks that an indexer chose for it, causally: kv <= q and selected[q_token, kv_head, kv // block].

    Source: Yuan et al. 2025, "Native Sparse Attention", section 3.3.2 (block 64); Lu et al. 2025, MoBA (its own block among them);
    DeepSeek-V3.2's DSA chooses tokens (block 1). Where blocks of queries choose alike, BlockSparseAttention skips what none chose.

    selected: ``[q_tokens, kv_heads, blocks]`` bools: from top-k indices ``torch.zeros(...).scatter_(-1, indices, True)``.
    """

    selected: ag.Tensor("q_tokens", "kv_heads", "blocks", dtype=bool)
    block: ag.Scalar[int] = 64

    def mask(self, at):
        return (at.kv <= at.q) & self.selected[at.q_token, at.kv_head, at.kv // self.block]
