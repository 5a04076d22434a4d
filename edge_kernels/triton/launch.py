"""From tensors and options to kernel arguments: aligned bases, transforms, and what every launch has in common."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from edge_kernels.token_stats import Transform

# The default of the first changes in Triton 3.10; the kernels' rounding is written out where it matters, elsewhere a
# fused multiply-add is both faster and more exact.
LAUNCH: dict[str, Any] = {"enable_fp_fusion": True}

_LOG2E = 1.4426950408889634


class Base(NamedTuple):
    """A tensor's storage and where the tensor begins in it: an aligned pointer, whatever part of it is looked at."""

    pointer: Tensor
    first: int  # in elements


def base_of(tensor: Tensor) -> Base:
    return Base(tensor.as_strided((1,), (1,), 0), tensor.storage_offset())


def transform_arguments(transform: Transform) -> dict[str, Any]:
    """Return the arguments that say how a logit becomes y = z / ln 2; see arithmetic.py."""
    slope = transform.logit_scale / transform.temperature * _LOG2E
    if transform.softcap is None:
        return {"cap_in": 0.0, "cap_out": 0.0, "slope": abs(slope), "CAPPED": False, "NEGATIVE": slope < 0}
    return {
        "cap_in": transform.logit_scale / transform.softcap,
        "cap_out": transform.softcap / transform.temperature * _LOG2E,
        "slope": 1.0,
        "CAPPED": True,
        "NEGATIVE": False,
    }


def slope_of_x(transform: Transform) -> float:
    """Return d y / d x, without the soft cap's own derivative."""
    return transform.logit_scale / transform.temperature * _LOG2E


def float32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.float32).contiguous()
