"""A gradient times the scalar that comes in for it: nothing is read or written where that is 1, as it nearly always is.

The scalar lies on the device, and asking for its value would wait for everything queued before.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from edge_kernels.backends.triton import tuning
from edge_kernels.backends.triton.launch import LAUNCH, on_its_device

_BLOCK = 8192


@triton.jit
def scale_kernel(
    values,  # (n), contiguous
    factor,  # (1)
    n,
    num_blocks,
    BLOCK: tl.constexpr,
):
    f = tl.load(factor).to(tl.float32)
    if f != 1.0:
        for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
            at = tl.full((), BLOCK, tl.int64) * block + tl.arange(0, BLOCK)
            value = tl.load(values + at, mask=at < n)
            tl.store(values + at, (value.to(tl.float32) * f).to(values.dtype.element_ty), mask=at < n)


@on_its_device
def scale_(values: Tensor, factor: Tensor) -> Tensor:
    """Multiply a contiguous tensor of at most 32 bits an element by a scalar where it lies, and return it."""
    num_blocks = triton.cdiv(values.numel(), _BLOCK)
    if num_blocks:
        programs = min(num_blocks, 4 * tuning.device_of(values).multiprocessors)
        scale_kernel[(programs,)](
            values, factor.reshape(1), values.numel(), num_blocks, BLOCK=_BLOCK, num_warps=8, **LAUNCH
        )
    return values
