import attngen as ag


class RelativeBias2D(ag.Variant):
    """A learned bias by how far apart two tokens of an image, or of a window of it, lie: s' = s + table[head, offset].

    With y = position // width and x = position % width: offset = (y_q - y_kv + height - 1) * (2 * width - 1) + x_q - x_kv + width - 1.

    Source: Liu et al. 2021, "Swin Transformer", section 3.2 (``relative_position_bias_table``, transposed); BEiT, LayoutLMv3.

    height, width: in tokens. table: ``[heads, (2 * height - 1) * (2 * width - 1)]``.
    """

    table: ag.Tensor("heads", "offsets")
    height: ag.Scalar[int]
    width: ag.Scalar[int]

    def logits(self, s, at):
        rows = at.q // self.width - at.kv // self.width + self.height - 1
        columns = at.q % self.width - at.kv % self.width + self.width - 1
        return s + self.table[at.head, rows * (2 * self.width - 1) + columns]
