"""Logits to tokens, on the device: greedy, temperature, top-p, with a seed for each sequence.

One uniform number a row decides, a function of the row's seed and of the position alone: the draw of a request repeats
whatever batch it is in (its logits may still differ in the last bit between batch sizes).
"""

from __future__ import annotations

import torch

GREEDY, SAMPLE, TOP_P = "greedy", "sample", "top_p"  # what a batch needs: each does more work than the one before


def sample(
    logits: torch.Tensor, mode: str, temperature: torch.Tensor, top_p: torch.Tensor, seed: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """One token a row.

    Args:
        logits: [rows, vocabulary], of any float dtype.
        mode: GREEDY, SAMPLE or TOP_P, the most that any row needs.
        temperature, top_p: float32 [rows]; temperature 0 takes the likeliest token.
        seed: int32 [rows].
        position: int32 [rows], of the new token in its sequence.

    Returns:
        int64 [rows].
    """
    best = logits.argmax(-1)
    if mode == GREEDY:
        return best
    probabilities = torch.softmax(logits.float() / temperature.clamp_min(1e-5)[:, None], -1)
    tokens = None
    if mode == TOP_P:
        probabilities, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.where(before < top_p[:, None], 0.0)
    cumulative = probabilities.cumsum(-1)
    wanted = uniform(seed, position)[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, wanted, right=True).clamp_max_(logits.shape[-1] - 1)
    if tokens is not None:
        drawn = tokens.gather(1, drawn)
    return torch.where(temperature > 0, drawn[:, 0], best)


def uniform(seed: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1), float32, from pairs of int32: the finaliser of MurmurHash3 over both, in int64 so that no step
    depends on a sign."""
    bits = seed.long() & 0xFFFFFFFF
    for word in (position.long(), torch.full_like(bits, 0x9E3779B9)):
        bits = (bits ^ word) & 0xFFFFFFFF
        bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
        bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
        bits = bits ^ (bits >> 16)
    return (bits >> 8).float() * 2.0**-24
