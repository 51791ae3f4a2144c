"""How a kernel's result is judged: where it is not finite first, then how far off it is, then where the worst is."""

from __future__ import annotations

import torch

# Allowed beside twice torch's own error, relative to 1 + |reference|: rounding of the result, and room for another
# order of summation.
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-11}


def compare(
    out: torch.Tensor, ref: torch.Tensor, dtype: torch.dtype | None = None, like: torch.Tensor | None = None
) -> None:
    """Assert that ``out`` is ``ref`` (float64) to the precision of ``dtype``, by default out's own.

    ``like`` is what torch makes of the same in that precision; twice its largest error is allowed on top of the floor.
    """
    assert out.shape == ref.shape, f"shape {tuple(out.shape)}, required {tuple(ref.shape)}"
    dtype = dtype or out.dtype
    out, ref = out.double(), ref.double()
    for what, found, wanted in (
        ("NaN", out.isnan(), ref.isnan()), ("inf", out == torch.inf, ref == torch.inf),
        ("-inf", out == -torch.inf, ref == -torch.inf),
    ):  # fmt: skip
        wrong = (found != wanted).nonzero()
        assert len(wrong) == 0, f"{len(wrong)} elements differ in being {what}, the first at {wrong[0].tolist()}"
    finite = ref.isfinite()
    if not finite.any():
        return
    error = torch.where(finite, out - ref, 0.0).abs()
    allowed = FLOOR[dtype] * (1 + torch.where(finite, ref, 0.0).abs())
    if like is not None:
        allowed = allowed + 2 * torch.where(finite, like.double() - ref, 0.0).abs().max()
    ratio = error / allowed
    worst = [int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape)]
    at = tuple(worst)
    assert ratio.max() < 1, (
        f"error {error[at]:.3g} at {worst}, allowed {allowed[at]:.3g}: {out[at]:.9g}, required {ref[at]:.9g}; "
        f"{int((ratio >= 1).sum())} of {ratio.numel()} elements are too far off"
    )
