import attngen as ag


class Neighborhood2D(ag.Variant):
    """Pixels attend to a window around them that stays within the image: rows of ``width`` tokens, ``kernel`` x ``kernel`` keys each.

    With y = position // width, x = position % width and first(i, n) = clamp(i - kernel // 2, 0, n - kernel): 0 <= y_kv - first(y_q, height) <
    kernel, and x alike. Every query has kernel ** 2 keys, at the border too.

    Source: Hassani et al. 2023, "Neighborhood Attention Transformer", section 3.1; NATTEN's na2d.

    height, width: of the image, in tokens, each at least kernel.
    """

    height: ag.Scalar[int]
    width: ag.Scalar[int]
    kernel: ag.Scalar[int] = 7

    def _near(self, q, kv, size):
        first = ag.max(ag.min(q - self.kernel // 2, size - self.kernel), 0)
        return (kv >= first) & (kv < first + self.kernel)

    def mask(self, at):
        rows = self._near(at.q // self.width, at.kv // self.width, self.height)
        return rows & self._near(at.q % self.width, at.kv % self.width, self.width)
