"""From tensors and options to kernel arguments: records that kernels take, and what every launch has in common.

A kernel's record is a NamedTuple. None in it means that there is no such thing, ``tl.constexpr`` marks a constant: both
are known when the kernel is compiled.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
import triton.language as tl
from torch import Tensor

from edge_kernels.backends.triton import tuning
from edge_kernels.contract import KernelStats, StatsGradients, TokenTerms, Transform

# The default of the first changes in Triton 3.10; the kernels' rounding is written out where it matters, elsewhere a
# fused multiply-add is both faster and more exact.
LAUNCH: dict[str, Any] = {"enable_fp_fusion": True}

_LOG2E = 1.4426950408889634

_Launcher = TypeVar("_Launcher", bound=Callable[..., Any])
_Record = TypeVar("_Record", KernelStats, StatsGradients, TokenTerms)


def on_its_device(launcher: _Launcher) -> _Launcher:
    """Make a launcher's first tensor's GPU the current one, on whose current stream Triton launches."""

    @functools.wraps(launcher)
    def launch(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        if tensor.device.type == "cpu" or torch.cuda.device_count() < 2:
            return launcher(tensor, *arguments, **options)
        with torch.cuda.device(tensor.device):
            return launcher(tensor, *arguments, **options)

    return cast(_Launcher, launch)


class Rows(NamedTuple):
    """A matrix: element (row, column) lies at pointer + first + row * stride + column."""

    pointer: Tensor  # aligned, whatever part of the storage the matrix is
    first: int
    stride: int


def rows_of(matrix: Tensor) -> Rows:
    """Return a matrix as kernels take it; allocators align storages, and what is not aligned is not taken."""
    first = int(matrix.storage_offset())
    if type(matrix) is Tensor:  # a tracer's has no address
        misaligned = (matrix.data_ptr() - first * matrix.element_size()) % tuning.VECTOR_BYTES
        if misaligned:
            raise ValueError(
                f"logits must lie in memory that begins at a multiple of {tuning.VECTOR_BYTES} bytes; got one that is "
                f"off by {misaligned}; pass logits.clone()"
            )
    return Rows(matrix.as_strided((1,), (1,), 0), first, matrix.stride(0))


class LogitTransform(NamedTuple):
    """How a logit becomes y = z / ln 2; see arithmetic.py."""

    cap_in: float | None  # None: no soft cap
    cap_out: float | None
    slope: float  # positive; 1 with a soft cap, which has the slope in it
    coarse_slope: float  # the next power of two
    slope_of_x: float  # d y / d x, without the soft cap's own derivative
    NEGATIVE: tl.constexpr  # the logit is turned before it meets the slope
    ignore_index: int


def transform_of(transform: Transform) -> LogitTransform:
    """Return a transform as kernels take it."""
    slope = transform.logit_scale / transform.temperature * _LOG2E
    if transform.softcap is None:
        coarse, is_negative = 2.0 ** math.ceil(math.log2(abs(slope) or 1.0)), tl.constexpr(slope < 0)
        return LogitTransform(None, None, abs(slope), coarse, slope, is_negative, transform.ignore_index)
    cap_in, cap_out = transform.logit_scale / transform.softcap, transform.softcap / transform.temperature * _LOG2E
    return LogitTransform(cap_in, cap_out, 1.0, 1.0, slope, tl.constexpr(False), transform.ignore_index)


def units_per_nat(transform: Transform, device: torch.device) -> tuple[float, float]:
    y = transform_of(transform)
    return _LOG2E, _LOG2E * y.coarse_slope / (y.slope or 1.0)


def packed(record: _Record) -> _Record:
    """Return a record's tensors as kernels take them: one dimension or none, contiguous, float32 or bool."""

    def pack(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        value = value.to(torch.bool if value.dtype == torch.bool else torch.float32).contiguous()
        return value.view(-1) if value.dim() else value

    return type(record)(*map(pack, record))  # type: ignore[arg-type]


def part_of(record: _Record, span: slice) -> _Record:
    """Return the part of a packed record that belongs to some rows."""
    values = (value[span] if value is not None and value.dim() else value for value in record)
    return type(record)(*values)  # type: ignore[arg-type]
