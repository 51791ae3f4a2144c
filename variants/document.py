import attngen as ag


class Document(ag.Variant):
    """Packed documents: a token attends to the tokens of its own document, doc[q] == doc[kv].

    ``Document() & Causal()`` is the mask of packed language-model training and of packed prefill.

    Source: Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination"; FlexAttention's document mask.

    doc: ``[requests, positions]`` ints, the document of each position of a packed sequence, in any numbering. A packed
        batch of one sequence is ``doc[None]``.
    """

    doc: ag.Tensor("requests", "positions", dtype=int)

    def mask(self, at):
        return self.doc[at.request, at.q] == self.doc[at.request, at.kv]
