import attngen as ag


class LeftPadding(ag.Variant):
    """Requests that are padded on the left: kv >= start[request]. ``Causal() & LeftPadding()`` is a batch that ``generate`` pads.

    Source: transformers' ``padding_mask_function`` under ``padding_side="left"``. Padding on the right needs no mask: give kv_lens.

    start: ``[requests]`` ints, the first position that is no padding. Queries before it see nothing and have output 0.
    """

    start: ag.Tensor("requests", dtype=int)

    def mask(self, at):
        return at.kv >= self.start[at.request]
