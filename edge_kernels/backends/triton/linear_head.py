"""Token statistics of a linear head, hidden @ weight.T + bias, and its gradients: logits exist in registers only.

Forward: a program has a block of rows and a share of the vocabulary. Per tile of logits, tl.dot over D, then every
row's (m, s, t) and its target's logit; shares are merged by a second kernel.

Backward, for a block of columns of the logits at a time: (1) make the logits again and write their gradient, in the
products' dtype, into a buffer of bounded size; (2) d weight of these columns = buffer.T @ hidden, complete in one
product over all rows; (3) d hidden += buffer @ weight, in float32, each element by one program. Every sum has a fixed
order and nothing is added atomically, so results are the same from run to run. Four products in all. Extra memory: the
buffer, and where hidden is of 16 bits the float32 sums of its gradient.

Rows that do not count are left out of every product: ``order`` lists those that do first, ``num_active`` is their
number. Both stay on the device, so that nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from edge_kernels.backends.triton import tuning
from edge_kernels.backends.triton.arithmetic import (
    LOWEST,
    gradient,
    gradient_factors,
    oriented,
    per_row,
    rescaled,
    scaled,
    shifted,
    slope_below,
)
from edge_kernels.backends.triton.launch import LAUNCH, on_its_device, packed, transform_of
from edge_kernels.backends.triton.token_stats import load_shares, store_statistics, target_shifted
from edge_kernels.contract import KernelStats, StatsGradients, Transform

_INTERPRETED = tl.constexpr(knobs.runtime.interpret)


class Product(NamedTuple):
    """What is constant in the kernels around ``tl.dot``."""

    DTYPE: tl.constexpr  # of the operands
    PRECISION: tl.constexpr
    M: tl.constexpr  # rows of the result's block
    N: tl.constexpr
    K: tl.constexpr
    STAGES: tl.constexpr


@triton.jit
def dot(a, b, total, product):
    if _INTERPRETED:  # it multiplies bfloat16 as if its bits were integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=product.PRECISION)


@triton.jit
def head_logits(
    hidden,
    weight,
    bias,
    row,  # (product.M), int64: rows of hidden
    column,  # (product.N): rows of weight
    V,
    D,
    hidden_stride,
    weight_stride,
    product,
):
    """A tile of logits (product.M, product.N), float32; columns from V on are meaningless."""
    k = tl.arange(0, product.K)
    hidden_at = hidden + row[:, None] * hidden_stride + k[None, :]
    weight_at = weight + tl.minimum(column, V - 1).to(tl.int64)[:, None] * weight_stride + k[None, :]
    logits = tl.zeros((product.M, product.N), tl.float32)
    for i in tl.range(0, D, product.K, num_stages=product.STAGES):
        inside = (i + k < D)[None, :]
        a = tl.load(hidden_at + i, mask=inside, other=0.0).to(product.DTYPE)
        b = tl.load(weight_at + i, mask=inside, other=0.0).to(product.DTYPE)
        logits = dot(a, b.T, logits, product)
    if bias is not None:
        logits += tl.load(bias + column, mask=column < V, other=0.0).to(tl.float32)[None, :]
    return logits


@triton.jit
def linear_fwd_kernel(
    hidden,  # (N, D), rows of adjacent elements
    weight,  # (V, D), likewise
    bias,  # (V) or None
    targets,  # (N), int64
    order,  # (N), int64: rows, those that count first
    num_active,  # (1), int64
    partial,  # (shares, 3, N), float32, in the order of ``order``
    target_logits,  # (N), float32, likewise; NaN where the target is no column
    hidden_stride,
    weight_stride,
    N,
    V,
    D,
    chunk,  # columns of a share
    transform,
    product,
):
    first = tl.program_id(0) * product.M  # neighbouring programs have the same columns: the weight is read once
    share = tl.program_id(1)
    active = tl.load(num_active)
    if first < active:
        place = first + tl.arange(0, product.M)
        valid = place < active
        row = tl.load(order + place, mask=valid, other=0)
        target = tl.load(targets + row, mask=valid, other=0)
        m = tl.full((product.M,), LOWEST, tl.float32)
        s = tl.zeros((product.M,), tl.float32)
        t = tl.zeros((product.M,), tl.float32)
        target_logit = tl.zeros((product.M,), tl.float32)
        begin = share * chunk
        end = tl.minimum(begin + chunk, V)
        for start in range(begin, end, product.N):
            column = start + tl.arange(0, product.N)
            x = head_logits(hidden, weight, bias, row, column, V, D, hidden_stride, weight_stride, product)
            x = oriented(x, transform)
            is_target = column[None, :] == target[:, None]
            target_logit += tl.sum(tl.where(is_target, x, 0.0), 1)
            x = tl.where((column < end)[None, :], x, float("-inf"))
            top = tl.max(x, 1)
            slope = slope_below(top, transform)
            new_m = tl.maximum(m, scaled(top, slope, transform))
            s, t = rescaled(m, s, t, new_m)
            y = shifted(x, new_m[:, None], per_row(slope, transform), transform)
            e = tl.exp2(y)
            s += tl.sum(e, 1)
            t += tl.sum(e * y, 1)
            m = new_m
        at = partial + share.to(tl.int64) * 3 * N + place
        tl.store(at, m, mask=valid)
        tl.store(at + N, s, mask=valid)
        tl.store(at + 2 * N, t, mask=valid)
        own = (target >= begin) & (target < end)
        tl.store(target_logits + place, target_logit, mask=valid & own)


@triton.jit
def linear_merge_kernel(
    partial,
    target_logits,
    targets,
    order,
    num_active,
    stats,  # KernelStats, (N) each
    N,
    V,
    num_parts,
    transform,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,  # a power of two, at least num_parts
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = place < N
    counts = place < tl.load(num_active)
    row = tl.load(order + place, mask=valid, other=0)
    target = tl.load(targets + row, mask=valid, other=0)
    m, s, t = load_shares(partial, place, N, counts, num_parts, PARTS)
    inside = counts & (target >= 0) & (target < V)
    x = tl.where(inside, tl.load(target_logits + place, mask=inside, other=0.0), float("nan"))
    store_statistics(stats, row, valid, counts, m, s, t, target_shifted(x, m, transform), transform, True)


@triton.jit
def linear_bwd_logits_kernel(
    hidden,
    weight,
    bias,
    targets,
    order,
    num_active,
    stats,
    gradients,  # StatsGradients, (N) each
    grad_logits,  # (N, columns), contiguous, in the order of ``order``; rows behind num_active are not written
    hidden_stride,
    weight_stride,
    V,
    D,
    first_column,
    columns,
    transform,
    product,
):
    first = tl.program_id(0) * product.M
    active = tl.load(num_active)
    if first < active:
        place = first + tl.arange(0, product.M)
        valid = place < active
        row = tl.load(order + place, mask=valid, other=0)
        local = tl.program_id(1) * product.N + tl.arange(0, product.N)
        column = first_column + local
        x = head_logits(hidden, weight, bias, row, column, V, D, hidden_stride, weight_stride, product)
        absent = tl.zeros((product.M,), tl.float32)
        g_logprob = absent if gradients.logprobs is None else tl.load(gradients.logprobs + row, mask=valid, other=0.0)
        g_entropy = absent if gradients.entropy is None else tl.load(gradients.entropy + row, mask=valid, other=0.0)
        g_lse = absent if gradients.logsumexp is None else tl.load(gradients.logsumexp + row, mask=valid, other=0.0)
        m, slope, a, b, own = gradient_factors(
            tl.load(stats.entropy + row, mask=valid, other=0.0),
            tl.load(stats.maximum + row, mask=valid, other=0.0),
            tl.load(stats.total + row, mask=valid, other=1.0),
            g_logprob,
            g_entropy,
            g_lse,
            transform,
        )
        factors = (m[:, None], per_row(slope, transform), a[:, None], b[:, None], own[:, None])
        target = tl.load(targets + row, mask=valid, other=-1)
        is_target = column[None, :] == target[:, None]
        g = gradient(x, factors, is_target, transform)
        at = grad_logits + place.to(tl.int64)[:, None] * columns + local[None, :]
        inside = valid[:, None] & (local < columns)[None, :]
        tl.store(at, g.to(grad_logits.dtype.element_ty), mask=inside)


@triton.jit
def linear_bwd_hidden_kernel(
    grad_logits,  # (N, columns)
    weight,
    order,
    num_active,
    d_hidden,  # (N, D), float32 or what the products are in
    weight_stride,
    D,
    first_column,
    columns,
    IS_FIRST: tl.constexpr,  # write instead of add
    product,
):
    first = tl.program_id(1) * product.M
    active = tl.load(num_active)
    if first < active:
        place = first + tl.arange(0, product.M)
        valid = place < active
        row = tl.load(order + place, mask=valid, other=0)
        d = tl.program_id(0) * product.N + tl.arange(0, product.N)
        in_d = d < D
        k = tl.arange(0, product.K)
        a_at = grad_logits + place.to(tl.int64)[:, None] * columns + k[None, :]
        inside = valid[:, None] & in_d[None, :]
        out = d_hidden + row[:, None] * D + d[None, :]
        total = tl.zeros((product.M, product.N), tl.float32)
        for i in tl.range(0, columns, product.K, num_stages=product.STAGES):
            in_k = i + k < columns
            a = tl.load(a_at + i, mask=valid[:, None] & in_k[None, :], other=0.0)
            b_at = weight + (first_column + i + k).to(tl.int64)[:, None] * weight_stride + d[None, :]
            b = tl.load(b_at, mask=in_k[:, None] & in_d[None, :], other=0.0)
            total = dot(a, b.to(a.dtype), total, product)
        if not IS_FIRST:
            total += tl.load(out, mask=inside, other=0.0).to(tl.float32)
        tl.store(out, total.to(d_hidden.dtype.element_ty), mask=inside)


@triton.jit
def linear_bwd_weight_kernel(
    grad_logits,
    hidden,
    order,
    num_active,
    d_weight,  # (V, D), or None where it is not wanted
    d_bias,  # (V), or None; its programs are those of the first columns of d_weight
    hidden_stride,
    d_weight_stride,
    D,
    first_column,
    columns,
    ADDS: tl.constexpr,  # to what d_weight holds
    product,
):
    active = tl.load(num_active).to(tl.int32)
    local = tl.program_id(1) * product.M + tl.arange(0, product.M)
    d = tl.program_id(0) * product.N + tl.arange(0, product.N)
    in_columns = local < columns
    in_d = d < D
    k = tl.arange(0, product.K)
    total = tl.zeros((product.M, product.N), tl.float32)
    bias_total = tl.zeros((product.M,), tl.float32)
    for i in tl.range(0, active, product.K, num_stages=product.STAGES):
        place = i + k
        in_k = place < active
        row = tl.load(order + place, mask=in_k, other=0)
        a_at = grad_logits + place.to(tl.int64)[:, None] * columns + local[None, :]
        a = tl.load(a_at, mask=in_k[:, None] & in_columns[None, :], other=0.0)
        if d_bias is not None:
            bias_total += tl.sum(a.to(tl.float32), 0)
        if d_weight is not None:
            b_at = hidden + row[:, None] * hidden_stride + d[None, :]
            b = tl.load(b_at, mask=in_k[:, None] & in_d[None, :], other=0.0)
            total = dot(a.T, b.to(a.dtype), total, product)
    column = (first_column + local).to(tl.int64)
    if d_weight is not None:
        out = d_weight + column[:, None] * d_weight_stride + d[None, :]
        inside = in_columns[:, None] & in_d[None, :]
        if ADDS:
            total += tl.load(out, mask=inside, other=0.0).to(tl.float32)
        tl.store(out, total.to(d_weight.dtype.element_ty), mask=inside)
    if d_bias is not None and tl.program_id(0) == 0:
        tl.store(d_bias + column, bias_total.to(d_bias.dtype.element_ty), mask=in_columns)


# --- launchers --------------------------------------------------------------------------------------------------------

_TRITON_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _unit_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _active_first(active: Tensor) -> tuple[Tensor, Tensor]:
    """Return (rows in order, those that are active first, and how many these are, (1)), both int64, without waiting."""
    order = torch.argsort((~active).to(torch.uint8), stable=True)
    return order, active.sum(dtype=torch.int64).view(1)


def product_options(device: tuning.Device, dtype: torch.dtype, loaded_bytes: int) -> tuple[Product, int]:
    """Return the constants of the kernels around ``tl.dot``, and the number of warps, for products of ``dtype``.

    ``loaded_bytes``: of an element as it is loaded; float32 under autocast takes twice the shared memory. float32 is
    multiplied as ``torch.backends.cuda.matmul.fp32_precision`` says.
    """
    matrix = tuning.matrix(device, dtype.itemsize)
    # From torch 2.9; the older call raises beside it.
    chosen = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    allows_tf32 = torch.get_float32_matmul_precision() != "highest" if chosen is None else chosen == "tf32"
    is_exact = not allows_tf32 or device.architecture == "hip"
    precision = "ieee" if dtype == torch.float32 and is_exact else "tf32"
    block_k = max(16, matrix.block_k * dtype.itemsize // loaded_bytes)
    constants = _TRITON_DTYPE[dtype], precision, matrix.block_m, matrix.block_n, block_k, matrix.num_stages
    return Product(*map(tl.constexpr, constants)), matrix.num_warps


@on_its_device
def linear_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    dtype: torch.dtype,
    transform: Transform,
) -> KernelStats:
    hidden, weight, targets = _unit_stride(hidden), _unit_stride(weight), targets.contiguous()
    (N, D), V = hidden.shape, weight.shape[0]
    out = KernelStats(*(torch.empty(N, dtype=torch.float32, device=hidden.device) for _ in KernelStats._fields))
    if N == 0:
        return out
    device = tuning.device_of(hidden)
    product, num_warps = product_options(device, dtype, max(hidden.itemsize, weight.itemsize, dtype.itemsize))
    order, num_active = _active_first(targets != transform.ignore_index)
    row_blocks, tiles = triton.cdiv(N, product.M.value), triton.cdiv(V, product.N.value)
    shares = tuning.programs_per_row(device, row_blocks, tiles)
    chunk = triton.cdiv(tiles, shares) * product.N.value
    shares = triton.cdiv(V, chunk)
    partial = torch.empty(shares, 3, N, dtype=torch.float32, device=hidden.device)
    target_logits = torch.empty(N, dtype=torch.float32, device=hidden.device)
    y = transform_of(transform)
    linear_fwd_kernel[(row_blocks, shares)](
        hidden, weight, None if bias is None else bias.contiguous(), targets, order, num_active, partial, target_logits,
        hidden.stride(0), weight.stride(0), N, V, D, chunk, y, product, num_warps=num_warps, **LAUNCH,
    )  # fmt: skip
    linear_merge_kernel[(triton.cdiv(N, 16),)](
        partial, target_logits, targets, order, num_active, out, N, V, shares, y,
        BLOCK=16, PARTS=triton.next_power_of_2(shares), **LAUNCH,
    )  # fmt: skip
    return out


@on_its_device
def linear_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    stats: KernelStats,
    gradients: StatsGradients,
    wanted: Sequence[bool],
    dtype: torch.dtype,
    transform: Transform,
    into: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    like = (hidden, weight, weight if bias is None else bias)
    hidden, weight, targets = _unit_stride(hidden), _unit_stride(weight), targets.contiguous()
    (N, D), V = hidden.shape, weight.shape[0]
    want_hidden, want_weight, want_bias = wanted
    device = tuning.device_of(hidden)
    product, num_warps = product_options(device, dtype, max(hidden.itemsize, weight.itemsize, dtype.itemsize))
    block_m, block_n = product.M.value, product.N.value
    launch = {"product": product, "num_warps": num_warps, **LAUNCH}

    active = torch.zeros_like(targets, dtype=torch.bool)
    for gradient_ in gradients:
        if gradient_ is not None:
            active |= gradient_ != 0
    order, num_active = _active_first(active & (targets != transform.ignore_index))
    d_hidden = torch.zeros(N, D, dtype=torch.float32, device=hidden.device) if want_hidden else None
    d_weight = (torch.empty_like(weight) if into is None else into) if want_weight else None
    d_bias = torch.empty(V, dtype=like[2].dtype, device=hidden.device) if want_bias else None

    width = max(1, tuning.TILE_BYTES // (max(N, 1) * dtype.itemsize) // block_n) * block_n
    width = min(width, triton.cdiv(V, block_n) * block_n)
    buffer = torch.empty(max(N, 1), width, dtype=dtype, device=hidden.device)
    row_blocks = triton.cdiv(N, block_m)
    for start in range(0, V, width) if any(wanted) and N > 0 else ():
        columns = min(width, V - start)
        linear_bwd_logits_kernel[(row_blocks, triton.cdiv(columns, block_n))](
            hidden, weight, None if bias is None else bias.contiguous(), targets, order, num_active, packed(stats),
            packed(gradients), buffer, hidden.stride(0), weight.stride(0), V, D, start, columns,
            transform_of(transform), **launch,
        )  # fmt: skip
        if want_weight or want_bias:
            linear_bwd_weight_kernel[(triton.cdiv(D, block_n) if want_weight else 1, triton.cdiv(columns, block_m))](
                buffer, hidden, order, num_active, d_weight, d_bias, hidden.stride(0),
                0 if d_weight is None else d_weight.stride(0), D, start, columns, ADDS=into is not None, **launch,
            )  # fmt: skip
        if d_hidden is not None:
            linear_bwd_hidden_kernel[(triton.cdiv(D, block_n), row_blocks)](
                buffer, weight, order, num_active, d_hidden, weight.stride(0), D, start, columns, IS_FIRST=start == 0,
                **launch,
            )  # fmt: skip
    if N == 0:
        for total in (None if into is not None else d_weight, d_bias):
            if total is not None:
                total.zero_()
    results = (d_hidden, None if into is not None else d_weight, d_bias)
    parts = zip(results, like, strict=True)
    h, w, b = (of.new_empty(0) if value is None else value.to(of.dtype) for value, of in parts)
    return h, w, b
