import attngen as ag


class Images(ag.Variant):
    """Tokens of one image attend to all of it: images[q] == images[kv] > 0. ``Causal() | Images()`` is the mask of text with images that
    attend both ways; ``SlidingWindow(512) | Images()`` that of the local layers.

    Source: Gemma 3 and PaliGemma 2 (``token_type_ids`` of transformers, ``blockwise_overlay`` of its masks); several images a prompt,
    where a prefix will not do.

    images: ``[requests, positions]`` ints, 0 for text and the image's number, from 1, for its tokens.
    """

    images: ag.Tensor("requests", "positions", dtype=int)

    def mask(self, at):
        mine, theirs = self.images[at.request, at.q], self.images[at.request, at.kv]
        return (mine == theirs) & (mine > 0) & (theirs > 0)  # said of both: a tile of text keys is empty
