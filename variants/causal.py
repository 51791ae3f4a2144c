import attngen as ag


class Causal(ag.Variant):
    """A query attends to itself and to what came before: kv <= q.

    Source: Vaswani et al. 2017, section 3.2.3; every decoder. Positions line up at the end: the last query is at
    kv_len - 1, so that one query against a long cache sees all of it (FlashAttention >= 2.1 and FlashInfer agree; torch
    SDPA's ``is_causal`` lines up at the start: pass q_offset=0 for that).
    """

    def mask(self, at):
        return at.kv <= at.q
