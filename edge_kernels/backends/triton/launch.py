"""From tensors and options to kernel arguments: aligned bases, transforms, and what every launch has in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from edge_kernels.backends.triton import tuning
from edge_kernels.contract import Transform

# The default of the first changes in Triton 3.10; the kernels' rounding is written out where it matters, elsewhere a
# fused multiply-add is both faster and more exact.
LAUNCH: dict[str, Any] = {"enable_fp_fusion": True}

_LOG2E = 1.4426950408889634

_Launcher = TypeVar("_Launcher", bound=Callable[..., Any])


def on_its_device(launcher: _Launcher) -> _Launcher:
    """Make a launcher's first tensor's GPU the current one, on whose current stream Triton launches."""

    @functools.wraps(launcher)
    def launch(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        if tensor.device.type == "cpu" or torch.cuda.device_count() < 2:
            return launcher(tensor, *arguments, **options)
        with torch.cuda.device(tensor.device):
            return launcher(tensor, *arguments, **options)

    return cast(_Launcher, launch)


class Base(NamedTuple):
    """A tensor's storage and where the tensor begins in it: an aligned pointer, whatever part of it is looked at."""

    pointer: Tensor
    first: int  # in elements


def base_of(tensor: Tensor) -> Base:
    """Return the aligned base of a tensor; allocators align storages, and what is not aligned is not taken."""
    first = int(tensor.storage_offset())
    if type(tensor) is Tensor:  # a tracer's has no address
        misaligned = (tensor.data_ptr() - first * tensor.element_size()) % tuning.VECTOR_BYTES
        if misaligned:
            raise ValueError(
                f"logits must lie in memory that begins at a multiple of {tuning.VECTOR_BYTES} bytes; got one that is "
                f"off by {misaligned}; pass logits.clone()"
            )
    return Base(tensor.as_strided((1,), (1,), 0), first)


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
    """Return a per-row tensor as the kernels take it."""
    return None if tensor is None else tensor.to(torch.float32).contiguous()
