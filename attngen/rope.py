"""Rotary position embedding: the declaration, its frequency tables, and a plain torch reference.

RoPE turns each pair of a head's first `rotary_dim` elements by `position * inv_freq[pair]`, and scales it by `mscale`:

    (a, b) -> mscale * (a cos - b sin, b cos + a sin)

Pairs are (i, i + rotary_dim/2), or (2i, 2i+1) where `interleaved`. A kernel sees only a table of frequencies, one
factor and three compile-time facts (`structure`); what the scaling methods differ in is how they fill the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, MISSING, fields
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch

from .errors import VariantError
from .records import record

__all__ = ["DynamicNTK", "Linear", "Llama3", "LongRoPE", "Proportional", "RoPE", "Scaling", "YaRN", "rotate"]


@record
class Linear:
    """Positions divided by `factor` (position interpolation)."""

    factor: float

    def __post_init__(self) -> None:
        _require_positive(self, "factor")


@record
class DynamicNTK:
    """Theta grows with the sequence: theta * (factor * n / max_position - factor + 1) ** (d / (d - 2)), where
    n = max(kv_len, max_position) and d = rotary_dim. Up to `max_position` tokens it is plain RoPE."""

    factor: float
    max_position: int

    def __post_init__(self) -> None:
        _require_positive(self, "factor", "max_position")
        if self.factor < 1:
            raise VariantError(f"DynamicNTK: factor of 1 or more required; found {self.factor}; raise it")


@record
class YaRN:
    """Low frequencies interpolated by `factor`, high ones kept, with a ramp between (arXiv 2309.00071).

    `attention_factor` multiplies cos and sin; None takes 0.1 ln(factor) + 1, or, where `mscale` and `mscale_all_dim`
    are both given (DeepSeek), the ratio of the two. `truncate` rounds the ramp's ends to whole pairs.
    """

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _require_positive(self, "factor", "original_max_position", "beta_fast", "beta_slow")


@record
class Llama3:
    """Llama 3.1: wavelengths above original_max_position / low_freq_factor are stretched by `factor`, those below
    original_max_position / high_freq_factor are kept, and those between are blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self) -> None:
        _require_positive(self, "factor", "low_freq_factor", "high_freq_factor", "original_max_position")
        if self.high_freq_factor <= self.low_freq_factor:
            raise VariantError(
                "Llama3: high_freq_factor above low_freq_factor required; "
                f"found {self.high_freq_factor} and {self.low_freq_factor}; swap them"
            )


@record
class LongRoPE:
    """Each pair has its own divisor: `short_factor` for sequences of up to `original_max_position` tokens,
    `long_factor` beyond (arXiv 2402.13753).

    Cos and sin are multiplied by `attention_factor`; None derives it from the stretch, which is `factor`, or
    max_position / original_max_position: give one of the two.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position: int
    _: KW_ONLY
    max_position: int | None = None
    factor: float | None = None
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        for name in ("short_factor", "long_factor"):
            object.__setattr__(self, name, tuple(float(f) for f in getattr(self, name)))
        _require_positive(self, "original_max_position", "max_position", "factor")
        if len(self.short_factor) != len(self.long_factor) or min(self.short_factor + self.long_factor, default=0) <= 0:
            raise VariantError(
                "LongRoPE: short_factor and long_factor required, positive and of one length; found "
                f"{len(self.short_factor)} and {len(self.long_factor)} values; give rotary_dim / 2 values each"
            )
        if self.attention_factor is None and (self.factor is None) == (self.max_position is None):
            found = "neither" if self.factor is None else "both"
            raise VariantError(
                f"LongRoPE: one of factor and max_position required; found {found}; give one, or give attention_factor"
            )


@record
class Proportional:
    """Of a head's pairs the first ``portion`` turn, each as plain RoPE over the whole head would turn it, slower by ``factor``; the
    others do not. (``rotary_dim`` would pair other elements, and turn them faster.)"""

    portion: float
    factor: float = 1.0

    def __post_init__(self) -> None:
        _require_positive(self, "portion", "factor")
        if self.portion > 1:
            raise VariantError(f"Proportional: portion of 1 or less required; found {self.portion}; lower it")


Scaling = Linear | DynamicNTK | YaRN | Llama3 | LongRoPE | Proportional


alive: WeakValueDictionary[str, RoPE] = WeakValueDictionary()  # by handle: what graphs call a RoPE


@record
class RoPE:
    """Fused rotary embedding of a variant: `rope = RoPE(500000.0, scaling=Llama3(8, 1, 4, 8192))`.

    `scaling`: one of `Linear, DynamicNTK, YaRN, Llama3, LongRoPE, Proportional`, or a dict as transformers writes it
    (`{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}`).
    `interleaved`: pairs are (2i, 2i+1) as in GPT-J, Cohere and GLM; else (i, i + rotary_dim/2) as in Llama.
    `rotary_dim`: how many leading elements of a head are rotated; None means head_dim.
    `keys`: "cached" where the cache holds rotated keys (only q is rotated), "rotate" where it holds unrotated ones.
    `q_position`, `kv_position`: the positions to rotate by; None means `at.q` and `at.kv`. Kept as they are given:
    the tracer reads them.

    Raises VariantError where a value is missing, unknown or out of range.
    """

    theta: float = 10000.0
    _: KW_ONLY
    scaling: Scaling | Mapping[str, Any] | None = None
    interleaved: bool = False
    rotary_dim: int | None = None
    keys: Literal["cached", "rotate"] = "cached"
    q_position: Callable[..., Any] | Any | None = None
    kv_position: Callable[..., Any] | Any | None = None

    def __post_init__(self) -> None:
        if isinstance(self.scaling, Mapping):
            theta, scaling = _from_mapping(self.scaling, self.theta)
            object.__setattr__(self, "theta", theta)
            object.__setattr__(self, "scaling", scaling)
        elif self.scaling is not None and not isinstance(self.scaling, Scaling):
            raise VariantError(
                f"RoPE: scaling of None, {_names(_KINDS.values())} or a dict required; "
                f"found {self.scaling!r}; see attngen.rope"
            )
        _require_positive(self, "theta", "rotary_dim")
        if self.rotary_dim is not None and self.rotary_dim % 2:
            raise VariantError(f"RoPE: even rotary_dim required; found {self.rotary_dim}; elements turn in pairs")
        if self.keys not in ("cached", "rotate"):
            raise VariantError(
                f"RoPE: keys='cached' or keys='rotate' required; found {self.keys!r}; "
                "write 'cached' where the cache holds rotated keys, 'rotate' where the kernel is to rotate them"
            )
        handle = repr((self.theta, self.scaling, self.interleaved, self.rotary_dim, self.keys))
        object.__setattr__(self, "handle", handle)  # an attribute, which Dynamo reads as a constant
        alive[handle] = self

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        layer_type: str | None = None,
        interleaved: bool = False,
        keys: Literal["cached", "rotate"] = "cached",
    ) -> RoPE:
        """The RoPE of a transformers config, of releases 4.5x (`rope_theta`, `rope_scaling`) and 5.x
        (`rope_parameters`), with partial rotation by whichever name the model gives it.

        `layer_type` chooses where a model has one RoPE a kind of layer. A config does not say how pairs lie:
        pass `interleaved=True` for GPT-J, Cohere, GLM and their like.
        Raises VariantError where the config has no RoPE or one that is not known here.
        """
        parameters = dict(_parameters(config, layer_type))
        outside = {
            "rope_theta": _first(config, "rope_theta", "rotary_emb_base", "default_theta"),
            "partial_rotary_factor": _first(config, "partial_rotary_factor", "rotary_pct"),
        }
        for name, value in outside.items():
            if parameters.get(name) is None:
                parameters[name] = value
        if parameters["rope_theta"] is None:
            raise VariantError(
                f"RoPE.from_config: rope_theta required; found none in {type(config).__name__}; "
                "write RoPE(theta, ...) by hand"
            )
        kind = parameters.get("rope_type") or parameters.get("type") or "default"
        if kind == "dynamic":
            parameters.setdefault("max_position_embeddings", _first(config, "max_position_embeddings"))
        elif kind in ("yarn", "llama3", "longrope", "su"):
            outer = _first(config, "original_max_position_embeddings")  # Phi-3 keeps it outside, where it wins
            inner = parameters.get("original_max_position_embeddings")
            longest = _first(config, "max_position_embeddings")
            original = parameters["original_max_position_embeddings"] = outer or inner or longest
            if kind != "llama3" and parameters.get("factor") is None and longest and original:
                parameters["factor"] = longest / original
        head_dim = _first(config, "head_dim") or config.hidden_size // config.num_attention_heads
        rotary_dim = _first(config, "rotary_dim")
        portion = parameters.pop("partial_rotary_factor")
        if kind == "proportional":
            parameters["portion"] = 1.0 if portion is None else portion
        elif portion is not None:
            rotary_dim = int(head_dim * portion)
        return cls(
            float(parameters.pop("rope_theta")),
            scaling=parameters,
            interleaved=interleaved,
            rotary_dim=None if rotary_dim == head_dim else rotary_dim,
            keys=keys,
        )

    @property
    def mscale(self) -> float:
        """The factor on both cos and sin (transformers' `attention_scaling`): 1 but for YaRN and LongRoPE."""
        scaling = self.scaling
        if isinstance(scaling, YaRN):
            if scaling.attention_factor is not None:
                return float(scaling.attention_factor)
            if scaling.mscale and scaling.mscale_all_dim:
                over, under = scaling.mscale, scaling.mscale_all_dim
                return _yarn_mscale(scaling.factor, over) / _yarn_mscale(scaling.factor, under)
            return _yarn_mscale(scaling.factor, 1.0)
        if isinstance(scaling, LongRoPE):
            if scaling.attention_factor is not None:
                return float(scaling.attention_factor)
            stretch = scaling.factor or scaling.max_position / scaling.original_max_position
            return math.sqrt(1 + math.log(stretch) / math.log(scaling.original_max_position)) if stretch > 1 else 1.0
        return 1.0

    @property
    def needs_kv_lens(self) -> bool:
        """Whether a request's table depends on its kv_len, so that `tables` gives an index."""
        return isinstance(self.scaling, DynamicNTK | LongRoPE)

    def structure(self, head_dim: int) -> dict[str, Any]:
        """What a kernel must know when it is compiled: `rotary_dim`, `interleaved`, `keys`. Theta and scaling are not
        among it: they arrive in the table. Raises VariantError where rotary_dim does not fit head_dim."""
        return {"rotary_dim": self._rotary_dim(head_dim), "interleaved": self.interleaved, "keys": self.keys}

    def inv_freq(self, head_dim: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Frequencies, radians a position: float32 [tables, rotary_dim / 2], worked out in float64 and rounded once.

        LongRoPE has two tables, short and long; all others one. DynamicNTK's is that of sequences within max_position.
        Made once a device and shared: a later call copies nothing, as a capture needs.
        """
        key = (self.theta, self.scaling, self.rotary_dim, head_dim, torch.device(device))
        found = _tables.get(key)
        if found is None:
            with torch.inference_mode(False), torch.device("cpu"):  # it outlives the caller's modes
                found = self._inv_freq64(head_dim, self.theta).float().to(device)
            if type(found) is torch.Tensor:  # no fake one
                found = _tables.setdefault(key, found)
        return found

    def tables(
        self, head_dim: int, kv_lens: Sequence[int] | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tables of a batch: `(inv_freq float32 [tables, rotary_dim / 2], table_index int32 [requests] or None)`.

        The index is None where all requests share the one table. LongRoPE and DynamicNTK give every request the table
        of its own kv_len, so that a result never depends on what else is in the batch; transformers takes the longest
        of the batch for all. Results lie on kv_lens' device and nothing synchronises.
        """
        if not self.needs_kv_lens:
            return self.inv_freq(head_dim), None
        lens = torch.as_tensor(kv_lens)
        if isinstance(self.scaling, LongRoPE):
            return self.inv_freq(head_dim, lens.device), (lens > self.scaling.original_max_position).int()
        dim, scaling = self._rotary_dim(head_dim), self.scaling
        n = lens.double().clamp(min=scaling.max_position)
        # d = 2 has one pair, of frequency 1 whatever theta is; its exponent d / (d - 2) would divide by zero
        power = dim / (dim - 2) if dim > 2 else 0.0
        theta = self.theta * (scaling.factor * n / scaling.max_position - (scaling.factor - 1)) ** power
        rows = self._inv_freq64(head_dim, theta[:, None]).float()
        return rows, torch.arange(lens.numel(), dtype=torch.int32, device=lens.device)

    def _rotary_dim(self, head_dim: int) -> int:
        dim = head_dim if self.rotary_dim is None else self.rotary_dim
        if dim > head_dim:
            raise VariantError(f"RoPE: rotary_dim of head_dim or less required; found {dim} of {head_dim}; lower it")
        if dim % 2:
            raise VariantError(f"RoPE: even head_dim required; found {dim}; set rotary_dim, elements turn in pairs")
        return dim

    def _inv_freq64(self, head_dim: int, theta: float | torch.Tensor) -> torch.Tensor:
        """Float64 [tables, rotary_dim / 2], for one theta or a column of them."""
        dim, scaling = self._rotary_dim(head_dim), self.scaling
        device = theta.device if isinstance(theta, torch.Tensor) else None
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
        plain = torch.atleast_2d(1.0 / theta**exponent)
        if isinstance(scaling, Linear):
            return plain / scaling.factor
        if isinstance(scaling, YaRN):
            keep = 1 - _yarn_ramp(scaling, self.theta, dim)
            return plain * keep + plain / scaling.factor * (1 - keep)
        if isinstance(scaling, Llama3):
            turns = scaling.original_max_position * plain / (2 * math.pi)  # full turns in the original context
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            keep = ((turns - low) / (high - low)).clamp(0, 1)
            return plain * keep + plain / scaling.factor * (1 - keep)
        if isinstance(scaling, LongRoPE):
            if len(scaling.short_factor) != dim // 2:
                raise VariantError(
                    f"LongRoPE: rotary_dim / 2 = {dim // 2} factors required; found {len(scaling.short_factor)}; "
                    "set rotary_dim to the model's, or give as many factors"
                )
            return plain / torch.tensor([scaling.short_factor, scaling.long_factor], dtype=torch.float64)
        if isinstance(scaling, Proportional):
            turning = torch.arange(dim // 2, device=device) < int(scaling.portion * dim // 2)
            return torch.where(turning, plain / scaling.factor, 0.0)
        return plain


_tables: dict[tuple[object, ...], torch.Tensor] = {}  # of RoPE.inv_freq


def rotate(
    x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, mscale: float = 1.0, interleaved: bool = False
) -> torch.Tensor:
    """Rotate `x` [..., head_dim] by `positions`, plainly: the reference that kernels are held to.

    `positions` (integers) broadcasts to x.shape[:-1] and `inv_freq` (float32, [..., rotary_dim / 2]) to
    [*x.shape[:-1], rotary_dim / 2]; elements from rotary_dim on pass through. The angle is float32, as every
    framework computes it: at position 100,000 its rounding moves it by up to 0.004 rad, so an exact angle would
    disagree with all of them. Cos and sin of that angle are float64. Float64 `x` is rotated in float64, all else in
    float32; the result has x's dtype.
    """
    half = inv_freq.shape[-1]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    angle = (positions.to(torch.float32)[..., None] * inv_freq).double()
    cos, sin = (angle.cos() * mscale).to(dtype), (angle.sin() * mscale).to(dtype)
    turned, rest = x[..., : 2 * half].to(dtype), x[..., 2 * half :]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    a, b = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
    return torch.cat((turned.to(x.dtype), rest), -1)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_ramp(scaling: YaRN, theta: float, dim: int) -> torch.Tensor:
    """0 where a pair keeps its frequency, 1 where it is interpolated: float64 [dim / 2]."""

    def pair(turns: float) -> float:  # which pair makes this many turns in the original context
        return dim * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high  # transformers' guard against a ramp of no width
    return ((torch.arange(dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)


# transformers' rope_type -> ours, and its field names -> ours
_KINDS: dict[str, type | None] = {
    "default": None,
    "linear": Linear,
    "dynamic": DynamicNTK,
    "yarn": YaRN,
    "llama3": Llama3,
    "longrope": LongRoPE,
    "su": LongRoPE,  # Phi-3's first name for it
    "proportional": Proportional,
}
_RENAMED = {"original_max_position_embeddings": "original_max_position", "max_position_embeddings": "max_position"}


def _from_mapping(given: Mapping[str, Any], theta: float) -> tuple[float, Scaling | None]:
    """Theta and scaling of a dict as transformers writes it. An unknown key is an error: it would change the angles."""
    found = {_RENAMED.get(name, name): value for name, value in given.items() if value is not None}
    kind = found.pop("rope_type", None) or found.pop("type", None) or "default"
    found.pop("type", None)
    if kind not in _KINDS:
        raise VariantError(f"RoPE: rope_type of {', '.join(_KINDS)} required; found {kind!r}; no other is built in")
    own_theta = float(found.pop("rope_theta", theta))
    if theta not in (own_theta, RoPE.theta):
        raise VariantError(f"RoPE: one theta required; found {theta} and rope_theta {own_theta}; give it once")
    if kind == "proportional" and "partial_rotary_factor" in found:
        found["portion"] = found.pop("partial_rotary_factor")
    if "partial_rotary_factor" in found:
        raise VariantError(
            "RoPE: rotary_dim= required; found partial_rotary_factor in the dict; "
            "multiply it by head_dim, or use RoPE.from_config"
        )
    cls = _KINDS[kind]
    if cls is not None and kind not in ("dynamic", "longrope", "su"):
        found.pop("max_position", None)  # written beside the original by some checkpoints, and read by none of these
    if cls is LongRoPE and "factor" in found:
        found.pop("max_position", None)  # transformers' precedence
    known = {f.name: f for f in fields(cls)} if cls else {}
    unknown = sorted(set(found) - set(known))
    if cls is None:
        # a plain RoPE cannot use a context length, and configs often carry one
        unknown = [name for name in unknown if name not in _RENAMED.values()]
    if unknown:
        raise VariantError(
            f"RoPE: for rope_type {kind!r} only {', '.join(known) or 'rope_theta'} are known; "
            f"found {', '.join(unknown)}; remove them if they do not change the angles"
        )
    if cls is None:
        return own_theta, None
    missing = [name for name in _required(cls) if name not in found]
    if missing:
        raise VariantError(
            f"RoPE: rope_type {kind!r} requires {', '.join(_required(cls))}; missing {', '.join(missing)}; add them"
        )
    return own_theta, cls(**found)


def _parameters(config: Any, layer_type: str | None) -> Mapping[str, Any]:
    """The config's dict of RoPE parameters, of the one layer type where they differ by it."""
    found = _first(config, "rope_parameters", "rope_scaling")
    if found is None:
        if _first(config, "rope_theta", "rotary_emb_base", "rotary_dim") is None:
            raise VariantError(
                f"RoPE.from_config: rope_parameters, rope_theta or rope_scaling required; found none of them in "
                f"{type(config).__name__}; for a composite model pass its text config"
            )
        return {} if _first(config, "rope_theta", "rotary_emb_base") else {"rope_theta": RoPE.theta}
    nested = {name: value for name, value in found.items() if isinstance(value, Mapping)}
    if not nested:
        return found
    if layer_type not in nested:
        raise VariantError(
            f"RoPE.from_config: layer_type of {', '.join(nested)} required; found {layer_type!r}; "
            "this model rotates its kinds of layer differently"
        )
    return nested[layer_type]


def _first(config: Any, *names: str) -> Any:
    """The first of these attributes that the config has and that is not None."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _required(cls: type) -> list[str]:
    return [f.name for f in fields(cls) if f.default is MISSING]


def _require_positive(owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is None and name in ("rotary_dim", "max_position") or value is None and isinstance(owner, LongRoPE):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise VariantError(f"{type(owner).__name__}: positive {name} required; found {value!r}; give a number")


def _names(classes: Any) -> str:
    return ", ".join(dict.fromkeys(cls.__name__ for cls in classes if cls))
