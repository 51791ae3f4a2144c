import attngen as ag


class BlockDiffusion(ag.Variant):
    """Training of block diffusion models on a noised copy and the text itself, one after the other: a noised block attends to itself
    and to the text's blocks before it, a block of the text to itself and to those before it.

    With n = kv_len / 2 tokens of text, noised at positions 0 ... n - 1 and clean at n ... 2n - 1.

    Source: Arriola et al. 2025, "Block Diffusion: Interpolating Between Autoregressive and Diffusion Language Models", section 5 and
    ``block_diff_mask`` of their code: block diagonal, offset block causal, block causal.

    block: tokens of a block.
    """

    block: ag.Scalar[int] = 4

    def mask(self, at):
        n = at.kv_len // 2
        clean_q, clean_kv = at.q >= n, at.kv >= n
        block_q = ag.where(clean_q, at.q - n, at.q) // self.block
        block_kv = ag.where(clean_kv, at.kv - n, at.kv) // self.block
        itself = (block_q == block_kv) & ~(clean_q ^ clean_kv)
        return itself | (clean_kv & (block_kv < block_q))
