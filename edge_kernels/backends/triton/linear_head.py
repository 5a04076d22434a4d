"""Token statistics of a linear head, hidden @ weight.T + bias, and its gradients: logits exist in registers only.

Forward: a program has BLOCK_M rows and a share of the vocabulary. Per tile of logits, tl.dot over D, then every row's
(m, s, t) and its target's logit; shares are merged by a second kernel.

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
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from edge_kernels.backend import is_interpreting
from edge_kernels.backends.triton import tuning
from edge_kernels.backends.triton.arithmetic import (
    LOWEST,
    gradient,
    gradient_factors,
    merged,
    oriented,
    rescaled,
    shifted,
    statistics,
)
from edge_kernels.backends.triton.launch import LAUNCH, float32, on_its_device, slope_of_x, transform_arguments
from edge_kernels.backends.triton.token_stats import target_shifted
from edge_kernels.contract import KernelStats, StatsGradients, Transform

_INTERPRETED = tl.constexpr(is_interpreting())


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    if _INTERPRETED:  # it multiplies bfloat16 as if its bits were integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def head_logits(
    hidden,
    weight,
    bias,
    row,  # (BLOCK_M), int64: rows of hidden
    column,  # (BLOCK_N): rows of weight
    V,
    D,
    hidden_stride,
    weight_stride,
    HAS_BIAS: tl.constexpr,
    PRODUCT: tl.constexpr,  # dtype of the operands of tl.dot
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """A tile of logits (BLOCK_M, BLOCK_N), float32; columns from V on are meaningless."""
    k = tl.arange(0, BLOCK_K)
    hidden_at = hidden + row[:, None] * hidden_stride + k[None, :]
    weight_at = weight + tl.minimum(column, V - 1).to(tl.int64)[:, None] * weight_stride + k[None, :]
    logits = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.range(0, D, BLOCK_K, num_stages=NUM_STAGES):
        inside = (i + k < D)[None, :]
        a = tl.load(hidden_at + i, mask=inside, other=0.0).to(PRODUCT)
        b = tl.load(weight_at + i, mask=inside, other=0.0).to(PRODUCT)
        logits = dot(a, b.T, logits, PRECISION)
    if HAS_BIAS:
        logits += tl.load(bias + column, mask=column < V, other=0.0).to(tl.float32)[None, :]
    return logits


@triton.jit
def linear_fwd_kernel(
    hidden,  # (N, D), rows of adjacent elements
    weight,  # (V, D), likewise
    bias,  # (V)
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
    cap_in,
    cap_out,
    slope,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    NEGATIVE: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_M  # neighbouring programs have the same columns: the weight is read once
    share = tl.program_id(1)
    active = tl.load(num_active)
    if first < active:
        place = first + tl.arange(0, BLOCK_M)
        valid = place < active
        row = tl.load(order + place, mask=valid, other=0)
        target = tl.load(targets + row, mask=valid, other=0)
        m = tl.full((BLOCK_M,), LOWEST, tl.float32)
        s = tl.zeros((BLOCK_M,), tl.float32)
        t = tl.zeros((BLOCK_M,), tl.float32)
        target_logit = tl.zeros((BLOCK_M,), tl.float32)
        begin = share * chunk
        end = tl.minimum(begin + chunk, V)
        for start in range(begin, end, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            x = head_logits(
                hidden, weight, bias, row, column, V, D, hidden_stride, weight_stride,
                HAS_BIAS, PRODUCT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, NUM_STAGES,
            )  # fmt: skip
            x = oriented(x, cap_in, cap_out, CAPPED, NEGATIVE)
            is_target = column[None, :] == target[:, None]
            target_logit += tl.sum(tl.where(is_target, x, 0.0), 1)
            x = tl.where((column < end)[None, :], x, float("-inf"))
            top = tl.max(x, 1)
            new_m = tl.maximum(m, top if CAPPED else top * slope)
            s, t = rescaled(m, s, t, new_m)
            y = shifted(x, slope, new_m[:, None], CAPPED)
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
    logprobs,
    entropy,
    logsumexp,
    logsumexp_low,
    N,
    V,
    num_parts,
    slope,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,  # a power of two, at least num_parts
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = place < N
    counts = place < tl.load(num_active)
    row = tl.load(order + place, mask=valid, other=0)
    target = tl.load(targets + row, mask=valid, other=0)
    part = tl.arange(0, PARTS)
    at = partial + part[:, None].to(tl.int64) * 3 * N + place[None, :]
    present = (part[:, None] < num_parts) & counts[None, :]
    m = tl.load(at, mask=present, other=LOWEST)
    s = tl.load(at + N, mask=present, other=0.0)
    t = tl.load(at + 2 * N, mask=present, other=0.0)
    m, s, t = merged(m, s, t, 0)
    inside = counts & (target >= 0) & (target < V)
    x = tl.where(inside, tl.load(target_logits + place, mask=inside, other=0.0), float("nan"))
    logprob, h, lse, low = statistics(m, s, t, target_shifted(x, slope, m, CAPPED))
    tl.store(logprobs + row, tl.where(counts, logprob, 0.0), mask=valid)
    tl.store(entropy + row, tl.where(counts, h, 0.0), mask=valid)
    tl.store(logsumexp + row, tl.where(counts, lse, 0.0), mask=valid)
    tl.store(logsumexp_low + row, tl.where(counts, low, 0.0), mask=valid)


@triton.jit
def linear_bwd_logits_kernel(
    hidden,
    weight,
    bias,
    targets,
    order,
    num_active,
    entropy,  # (N), float32, as the following five
    logsumexp,
    logsumexp_low,
    grad_logprobs,
    grad_entropy,
    grad_logsumexp,
    grad_logits,  # (N, columns), contiguous, in the order of ``order``; rows behind num_active are not written
    hidden_stride,
    weight_stride,
    V,
    D,
    first_column,
    columns,
    cap_in,
    cap_out,
    slope,
    slope_of_x,
    HAS_BIAS: tl.constexpr,
    HAS_LOGPROBS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_LOGSUMEXP: tl.constexpr,
    CAPPED: tl.constexpr,
    NEGATIVE: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_M
    active = tl.load(num_active)
    if first < active:
        place = first + tl.arange(0, BLOCK_M)
        valid = place < active
        row = tl.load(order + place, mask=valid, other=0)
        local = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        column = first_column + local
        x = head_logits(
            hidden, weight, bias, row, column, V, D, hidden_stride, weight_stride,
            HAS_BIAS, PRODUCT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, NUM_STAGES,
        )  # fmt: skip
        zeros = tl.zeros((BLOCK_M,), tl.float32)
        g_logprob = tl.load(grad_logprobs + row, mask=valid, other=0.0) if HAS_LOGPROBS else zeros
        g_entropy = tl.load(grad_entropy + row, mask=valid, other=0.0) if HAS_ENTROPY else zeros
        g_logsumexp = tl.load(grad_logsumexp + row, mask=valid, other=0.0) if HAS_LOGSUMEXP else zeros
        reference, a, b, own = gradient_factors(
            tl.load(entropy + row, mask=valid, other=0.0),
            tl.load(logsumexp + row, mask=valid, other=0.0),
            tl.load(logsumexp_low + row, mask=valid, other=0.0),
            g_logprob,
            g_entropy,
            g_logsumexp,
            slope_of_x,
        )
        target = tl.load(targets + row, mask=valid, other=-1)
        is_target = column[None, :] == target[:, None]
        g = gradient(
            x, cap_in, cap_out, slope, reference[:, None], a[:, None], b[:, None], own[:, None], is_target,
            CAPPED, NEGATIVE,
        )  # fmt: skip
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
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    first = tl.program_id(1) * BLOCK_M
    active = tl.load(num_active)
    if first < active:
        place = first + tl.arange(0, BLOCK_M)
        valid = place < active
        row = tl.load(order + place, mask=valid, other=0)
        d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_d = d < D
        k = tl.arange(0, BLOCK_K)
        a_at = grad_logits + place.to(tl.int64)[:, None] * columns + k[None, :]
        inside = valid[:, None] & in_d[None, :]
        out = d_hidden + row[:, None] * D + d[None, :]
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in tl.range(0, columns, BLOCK_K, num_stages=NUM_STAGES):
            in_k = i + k < columns
            a = tl.load(a_at + i, mask=valid[:, None] & in_k[None, :], other=0.0)
            b_at = weight + (first_column + i + k).to(tl.int64)[:, None] * weight_stride + d[None, :]
            b = tl.load(b_at, mask=in_k[:, None] & in_d[None, :], other=0.0)
            total = dot(a, b.to(a.dtype), total, PRECISION)
        if not IS_FIRST:
            total += tl.load(out, mask=inside, other=0.0).to(tl.float32)
        tl.store(out, total.to(d_hidden.dtype.element_ty), mask=inside)


@triton.jit
def linear_bwd_weight_kernel(
    grad_logits,
    hidden,
    order,
    num_active,
    d_weight,  # (V, D)
    d_bias,  # (V)
    hidden_stride,
    d_weight_stride,
    D,
    first_column,
    columns,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,  # d_bias is wanted; its programs are those of the first columns of d_weight
    ADDS: tl.constexpr,  # to what d_weight holds
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    active = tl.load(num_active).to(tl.int32)
    local = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = local < columns
    in_d = d < D
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    bias_total = tl.zeros((BLOCK_M,), tl.float32)
    for i in tl.range(0, active, BLOCK_K, num_stages=NUM_STAGES):
        place = i + k
        in_k = place < active
        row = tl.load(order + place, mask=in_k, other=0)
        a_at = grad_logits + place.to(tl.int64)[:, None] * columns + local[None, :]
        a = tl.load(a_at, mask=in_k[:, None] & in_columns[None, :], other=0.0)
        if HAS_BIAS:
            bias_total += tl.sum(a.to(tl.float32), 0)
        if HAS_WEIGHT:
            b_at = hidden + row[:, None] * hidden_stride + d[None, :]
            b = tl.load(b_at, mask=in_k[:, None] & in_d[None, :], other=0.0)
            total = dot(a.T, b.to(a.dtype), total, PRECISION)
    column = (first_column + local).to(tl.int64)
    if HAS_WEIGHT:
        out = d_weight + column[:, None] * d_weight_stride + d[None, :]
        inside = in_columns[:, None] & in_d[None, :]
        if ADDS:
            total += tl.load(out, mask=inside, other=0.0).to(tl.float32)
        tl.store(out, total.to(d_weight.dtype.element_ty), mask=inside)
    if HAS_BIAS and tl.program_id(0) == 0:
        tl.store(d_bias + column, bias_total.to(d_bias.dtype.element_ty), mask=in_columns)


# --- launchers --------------------------------------------------------------------------------------------------------

TRITON_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _unit_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _active_first(active: Tensor) -> tuple[Tensor, Tensor]:
    """Return (rows in order, those that are active first, and how many these are, (1)), both int64, without waiting."""
    order = torch.argsort((~active).to(torch.uint8), stable=True)
    return order, active.sum(dtype=torch.int64).view(1)


def product_options(
    device: tuning.Device, dtype: torch.dtype, loaded_bytes: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (launch options, constants of the kernels around tl.dot) for products of ``dtype``.

    ``loaded_bytes``: of an element as it is loaded; float32 under autocast takes twice the shared memory. float32 is
    multiplied as ``torch.backends.cuda.matmul.fp32_precision`` says.
    """
    matrix = tuning.matrix(device, dtype.itemsize)
    chosen = getattr(
        torch.backends.cuda.matmul, "fp32_precision", None
    )  # from torch 2.9; the older call raises beside it
    allows_tf32 = torch.get_float32_matmul_precision() != "highest" if chosen is None else chosen == "tf32"
    is_exact = not allows_tf32 or device.architecture == "hip"
    blocks = {
        "PRECISION": "ieee" if dtype == torch.float32 and is_exact else "tf32",
        "BLOCK_M": matrix.block_m,
        "BLOCK_N": matrix.block_n,
        "BLOCK_K": max(16, matrix.block_k * dtype.itemsize // loaded_bytes),
        "NUM_STAGES": matrix.num_stages,
    }
    return {"num_warps": matrix.num_warps, **LAUNCH}, blocks


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
    out = KernelStats(
        *(torch.empty(N, dtype=torch.float32, device=hidden.device) for _ in KernelStats._fields),
    )
    if N == 0:
        return out
    device = tuning.device_of(hidden)
    launch, blocks = product_options(device, dtype, max(hidden.itemsize, weight.itemsize, dtype.itemsize))
    order, num_active = _active_first(targets != transform.ignore_index)
    row_blocks, tiles = triton.cdiv(N, blocks["BLOCK_M"]), triton.cdiv(V, blocks["BLOCK_N"])
    shares = tuning.programs_per_row(device, row_blocks, tiles)
    chunk = triton.cdiv(tiles, shares) * blocks["BLOCK_N"]
    shares = triton.cdiv(V, chunk)
    partial = torch.empty(shares, 3, N, dtype=torch.float32, device=hidden.device)
    target_logits = torch.empty(N, dtype=torch.float32, device=hidden.device)
    transformed = transform_arguments(transform)
    linear_fwd_kernel[(row_blocks, shares)](
        hidden, weight, None if bias is None else bias.contiguous(), targets, order, num_active, partial, target_logits,
        hidden.stride(0), weight.stride(0), N, V, D, chunk, HAS_BIAS=bias is not None, PRODUCT=TRITON_DTYPE[dtype],
        **transformed, **blocks, **launch,
    )  # fmt: skip
    linear_merge_kernel[(triton.cdiv(N, 16),)](
        partial, target_logits, targets, order, num_active, *out, N, V, shares, transformed["slope"],
        CAPPED=transformed["CAPPED"], BLOCK=16, PARTS=triton.next_power_of_2(shares), **LAUNCH,
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
    launch, blocks = product_options(device, dtype, max(hidden.itemsize, weight.itemsize, dtype.itemsize))
    block_m, block_n = blocks["BLOCK_M"], blocks["BLOCK_N"]

    active = torch.zeros_like(targets, dtype=torch.bool)
    for gradient_ in gradients:
        if gradient_ is not None:
            active |= gradient_ != 0
    order, num_active = _active_first(active & (targets != transform.ignore_index))
    d_hidden = torch.zeros(N, D, dtype=torch.float32, device=hidden.device) if want_hidden else None
    d_weight = into if into is not None or not want_weight else torch.empty_like(weight)
    d_bias = torch.empty(V, dtype=like[2].dtype, device=hidden.device) if want_bias else None

    width = max(1, tuning.TILE_BYTES // (max(N, 1) * dtype.itemsize) // block_n) * block_n
    width = min(width, triton.cdiv(V, block_n) * block_n)
    buffer = torch.empty(max(N, 1), width, dtype=dtype, device=hidden.device)
    row_blocks = triton.cdiv(N, block_m)
    for start in range(0, V, width) if any(wanted) and N > 0 else ():
        columns = min(width, V - start)
        linear_bwd_logits_kernel[(row_blocks, triton.cdiv(columns, block_n))](
            hidden, weight, None if bias is None else bias.contiguous(), targets, order, num_active,
            *(float32(value) for value in (*stats[1:], *gradients)), buffer, hidden.stride(0), weight.stride(0), V, D,
            start, columns, slope_of_x=slope_of_x(transform), HAS_BIAS=bias is not None,
            HAS_LOGPROBS=gradients.logprobs is not None, HAS_ENTROPY=gradients.entropy is not None,
            HAS_LOGSUMEXP=gradients.logsumexp is not None, PRODUCT=TRITON_DTYPE[dtype],
            **transform_arguments(transform), **blocks, **launch,
        )  # fmt: skip
        if want_weight or want_bias:
            linear_bwd_weight_kernel[(triton.cdiv(D, block_n) if want_weight else 1, triton.cdiv(columns, block_m))](
                buffer, hidden, order, num_active, d_weight, d_bias, hidden.stride(0),
                0 if d_weight is None else d_weight.stride(0), D, start, columns, HAS_WEIGHT=want_weight,
                HAS_BIAS=want_bias, ADDS=into is not None, **blocks, **launch,
            )  # fmt: skip
        if d_hidden is not None:
            linear_bwd_hidden_kernel[(triton.cdiv(D, block_n), row_blocks)](
                buffer, weight, order, num_active, d_hidden, weight.stride(0), D, start, columns, IS_FIRST=start == 0,
                **blocks, **launch,
            )  # fmt: skip
    if N == 0:
        for total in (None if into is not None else d_weight, d_bias):
            if total is not None:
                total.zero_()
    results = (d_hidden, None if into is not None else d_weight, d_bias)
    parts = zip(results, like, strict=True)
    h, w, b = (of.new_empty(0) if value is None else value.to(of.dtype) for value, of in parts)
    return h, w, b
