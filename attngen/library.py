"""torch.compile and torch.export: calls as operators of torch.

Dynamo does not look into a call. It sees an operator, which lists the call's tensors and numbers as inputs, names the
variant by a string that stands for its structure (a guard compares it), and knows the shapes of its results. Values are
no part of a graph: ints are symbolic where Dynamo makes them so, floats become 0-dim tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .errors import ParameterError, UnsupportedError
from .spec import Bare, Variant, as_variant, bare_variants

NO_GRAD = "an input requires grad, and attngen has no backward yet: call under torch.no_grad() or on detached tensors"
PARAMETERS = "Tensor[] tensors, SymInt[] ints, str[] names"  # in a schema; `names` of the tensors, then of the ints

# For operators that inductor's own CUDA graphs must leave out: a replay would see neither a float that the host gives, nor the
# next plan.
NOT_IN_GRAPHS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()

_library = torch.library.Library("attngen", "FRAGMENT")
_pinned: dict[str, Bare] = {}  # the variants of compiled graphs: a graph holds but the handle


def define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any], *tags: torch.Tag) -> Any:
    """Register the operator ``attngen::name``, whose inputs keep their strides, and return it."""
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order, *tags))
    _library.impl(name, torch._disable_dynamo(run), "CompositeExplicitAutograd")  # else Dynamo traces its insides by themselves
    torch.library.register_fake(f"attngen::{name}", fake, lib=_library)
    return getattr(torch.ops.attngen, name).default


def variant_of(handle: str) -> Bare:
    """The variant that a graph names, without values."""
    found = _pinned.get(handle) or bare_variants.get(handle)
    if found is None:
        raise ParameterError(
            f"a graph calls the variant {handle}, and this process has made none that equals it: import or make the variant "
            "that the graph was made with, then call the graph"
        )
    _pinned[handle] = found
    return found


def traced_variant(variant: Variant | type[Variant]) -> Variant:
    """As ``as_variant``, for Dynamo to trace."""
    if isinstance(variant, type) and _has_instance(variant):
        return variant._instance
    return variant


def _has_instance(variant: type[Variant]) -> bool:
    return as_variant(variant) is variant._instance


_has_instance._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, which would import all of Dynamo


def operands(variant: Variant, names: Sequence[str], params: Mapping[str, Any]) -> tuple[list[Any], list[Any], list[str]]:
    """The values of the parameters ``names``, given or the variant's, and of others that are given, as PARAMETERS."""
    tensors, ints, tensor_names, int_names = [], [], [], []
    for name in (*names, *[n for n in params if n not in names]):
        value = params.get(name)
        if value is None:
            value = getattr(variant, name, None)
        if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
            ints.append(value)
            int_names.append(name)
            continue
        if isinstance(value, (float, torch.SymFloat)):
            # A product with a tensor: the one form of a float for which Dynamo needs no new graph at each value.
            value = torch.ones((), dtype=torch.float64, device="cpu") * value
        if isinstance(value, torch.Tensor):
            if value.requires_grad and torch.is_grad_enabled():
                raise UnsupportedError(f"{variant.name}.{name} requires grad: no backward yet; detach it")
            tensors.append(value)
            tensor_names.append(name)
        elif value is not None:  # None: the operator says what is missing
            raise ParameterError(f"{variant.name}.{name} is {value!r}: required a number or a torch.Tensor")
    return tensors, ints, tensor_names + int_names


def parameters(tensors: Sequence[torch.Tensor], ints: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """The parameters by name again, floats as floats."""
    values = [t.item() if t.dtype == torch.float64 and not t.dim() and t.device.type == "cpu" else t for t in tensors]
    return dict(zip(names, (*values, *ints)))
