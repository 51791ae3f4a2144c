import attngen as ag


class CustomMask(ag.Variant):
    """A mask of packed bits, a request after another: bit i * kv_len + kv of request r says whether its query i attends to key kv.

    Bit b of a request is bit b % 8, counted from the least, of byte mask_indptr[r] + b // 8. ``ag.custom_mask(...)`` makes the
    parameters, of bools or of packed bytes: ``attn.plan(..., **ag.custom_mask(bits, q_indptr=..., kv_lens=...))``.

    Source: FlashInfer's ``packed_custom_mask`` and ``mask_indptr``; drafts of speculative decoding, images in prompts. Queries count
    from a request's first, whatever their positions are.

    mask_begin, mask_run, mask_end: ``[q_tokens]`` ints, what is known of each query's row: no key before begin or from end on is
        kept, every one in begin ... run - 1 is. Whole tiles are skipped, or kept without a look at their bits. (0, 0, 2**31 - 1): nothing.
    """

    packed_custom_mask: ag.Tensor("mask_bytes", dtype="uint8")
    mask_indptr: ag.Tensor("requests + 1", dtype=int)
    mask_begin: ag.Tensor("q_tokens", dtype=int)
    mask_run: ag.Tensor("q_tokens", dtype=int)
    mask_end: ag.Tensor("q_tokens", dtype=int)

    def mask(self, at):
        row = at.q - at.q_offset
        whole, rest = at.kv_len >> 3, at.kv_len & 7  # bytes and bits of a row: their products stay below 2**31 where bits do not
        bit = row * rest + at.kv
        byte = self.packed_custom_mask[self.mask_indptr[at.request] + row * whole + (bit >> 3)]
        kept = (byte >> (bit & 7)) & 1 == 1
        within = (at.kv >= self.mask_begin[at.q_token]) & (at.kv < self.mask_end[at.q_token])
        return within & ((at.kv < self.mask_run[at.q_token]) | kept)
