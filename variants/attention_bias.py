import attngen as ag


class AttentionBias(ag.Variant):
    """A bias for each query and key: s' = s + bias[request, head, i, kv], where i counts the request's queries from 0.

    Source: SDPA's float ``attn_mask``; pair bias of AlphaFold's attention (Jumper et al. 2021, supplement, algorithm 7); DeBERTa and
    others that work their relative terms out beforehand. What a formula says is better declared: it reads nothing.

    bias: ``[requests, heads, rows, positions]``, finite (keys are masked by a mask); expanded views are read in place.
    """

    bias: ag.Tensor("requests", "heads", "rows", "positions")

    def logits(self, s, at):
        return s + self.bias[at.request, at.head, at.q - at.q_offset, at.kv]
