import attngen as ag


class DilatedWindow(ag.Variant):
    """Every ``dilation``-th key backwards, ``window`` of them, the query's own included: kv = q - j * dilation for
    0 <= j < window.

    Source: Beltagy et al. 2020 (Longformer), section 3.1, figure 2c, causal as in its language model.

    window * dilation, the reach in positions, must stay below 2**31.
    """

    window: ag.Scalar[int] = 512
    dilation: ag.Scalar[int] = 2

    def mask(self, at):
        near = (at.kv <= at.q) & (at.q - at.kv < self.window * self.dilation)
        return near & (at.q % self.dilation == at.kv % self.dilation)
