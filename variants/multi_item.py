import attngen as ag


class MultiItem(ag.Variant):
    """Several items after one prefix, which do not see each other: kv <= q, and kv < prefix_len[request] or item[q] == item[kv].

    Source: FlashInfer's multi-item scoring (``prefix_len_ptr``, ``token_pos_in_items_ptr``), as rerankers use it; shared-prompt
    training of several answers. Positions for RoPE are the caller's: each item may count from prefix_len.

    prefix_len: ``[requests]`` ints. item: ``[requests, positions]`` ints, the item of each position past the prefix.
    """

    prefix_len: ag.Tensor("requests", dtype=int)
    item: ag.Tensor("requests", "positions", dtype=int)

    def mask(self, at):
        same = self.item[at.request, at.q] == self.item[at.request, at.kv]
        return (at.kv <= at.q) & ((at.kv < self.prefix_len[at.request]) | same)
