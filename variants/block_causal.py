import attngen as ag


class BlockCausal(ag.Variant):
    """Both ways within a block, causal between blocks: kv // block <= q // block.

    Source: Arriola et al. 2025, "Block Diffusion", in inference; LLaDA 2.0, SDAR and Fast-dLLM v2 (block 32 and the like); video models
    that generate frame after frame (CausVid, Yin et al. 2025: a block is a frame, or some frames).

    block: tokens of a block, which begin at positions 0, block, 2 * block, ...
    """

    block: ag.Scalar[int] = 32

    def mask(self, at):
        return at.kv // self.block <= at.q // self.block
