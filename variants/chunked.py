import attngen as ag


class Chunked(ag.Variant):
    """Causal within aligned chunks of positions: kv <= q and kv // chunk == q // chunk.

    Source: Llama 4 (``attention_chunk_size`` 8192 of its RoPE layers), transformers' ``chunked_overlay`` without left
    padding, FlashAttention-3's ``attention_chunk``. Unlike a window, the first token of a chunk sees only itself.
    """

    chunk: ag.Scalar[int] = 8192

    def mask(self, at):
        return (at.kv <= at.q) & (at.kv // self.chunk == at.q // self.chunk)
