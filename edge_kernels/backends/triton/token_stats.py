"""Log-probability, entropy and logsumexp of rows of logits, and their gradient: kernels, then launchers.

One program has one row, or, where rows are few, a share of one; shares are merged by a second, small kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from edge_kernels.backends.rows import row_blocks, with_unit_stride
from edge_kernels.backends.triton import tuning
from edge_kernels.backends.triton.arithmetic import LOWEST, gradient_factors, merged, oriented, shifted, statistics
from edge_kernels.backends.triton.launch import LAUNCH, base_of, float32, on_its_device, slope_of_x, transform_arguments
from edge_kernels.backends.triton.rows import row_sums, write_gradient
from edge_kernels.contract import KernelStats, StatsGradients, Transform, new_stats


@triton.jit
def target_logit(logits, start, target, V, cap_in, cap_out, CAPPED: tl.constexpr, NEGATIVE: tl.constexpr):
    """The oriented logit of a row's target, NaN for a target outside the row."""
    inside = (target >= 0) & (target < V)
    x = tl.load(logits + start + tl.where(inside, target, 0), mask=inside, other=0.0)
    return tl.where(inside, oriented(x, cap_in, cap_out, CAPPED, NEGATIVE), float("nan"))


@triton.jit
def target_shifted(x, slope, m, CAPPED: tl.constexpr):
    """y - m of a target; unlike in a sum, -inf stays -inf."""
    return tl.where(x == float("-inf"), x, shifted(x, slope, m, CAPPED))


@triton.jit
def token_stats_fwd_kernel(
    logits,  # element (row, column) at first + row * row_stride + column
    targets,  # (rows), int64
    logprobs,  # (rows), float32, as the following three
    entropy,
    logsumexp,
    logsumexp_low,
    partial,  # (programs per row, 3, rows), float32: where SPLIT, in place of the four
    first,
    row_stride,
    rows,
    V,
    chunk,  # columns of a program's share
    ignore_index,
    cap_in,
    cap_out,
    slope,
    HAS_TARGETS: tl.constexpr,
    SPLIT: tl.constexpr,
    CAPPED: tl.constexpr,
    NEGATIVE: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0)
    part = tl.program_id(1)
    start = first + row.to(tl.int64) * row_stride
    target = ignore_index
    ignored = False
    if HAS_TARGETS:
        target = tl.load(targets + row)
        ignored = target == ignore_index
    if ignored:
        if not SPLIT:
            tl.store(logprobs + row, 0.0)
            tl.store(entropy + row, 0.0)
            tl.store(logsumexp + row, 0.0)
            tl.store(logsumexp_low + row, 0.0)
    else:
        m, s, t = row_sums(logits, start, V, part, chunk, cap_in, cap_out, slope, CAPPED, NEGATIVE, LANES, VEC, UNROLL)
        if SPLIT:
            at = partial + part.to(tl.int64) * 3 * rows + row
            tl.store(at, m)
            tl.store(at + rows, s)
            tl.store(at + 2 * rows, t)
        else:
            target_y = 0.0
            if HAS_TARGETS:
                x = target_logit(logits, start, target, V, cap_in, cap_out, CAPPED, NEGATIVE)
                target_y = target_shifted(x, slope, m, CAPPED)
            logprob, h, lse, low = statistics(m, s, t, target_y)
            if HAS_TARGETS:
                tl.store(logprobs + row, logprob)
            tl.store(entropy + row, h)
            tl.store(logsumexp + row, lse)
            tl.store(logsumexp_low + row, low)


@triton.jit
def token_stats_merge_kernel(
    partial,  # (num_parts, 3, rows)
    logits,
    targets,
    logprobs,
    entropy,
    logsumexp,
    logsumexp_low,
    first,
    row_stride,
    rows,
    V,
    num_parts,
    ignore_index,
    cap_in,
    cap_out,
    slope,
    HAS_TARGETS: tl.constexpr,
    CAPPED: tl.constexpr,
    NEGATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,  # a power of two, at least num_parts
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < rows
    target = tl.zeros((BLOCK,), tl.int64)
    counts = valid
    if HAS_TARGETS:
        target = tl.load(targets + row, mask=valid, other=0)
        counts = valid & (target != ignore_index)
    part = tl.arange(0, PARTS)
    at = partial + part[:, None].to(tl.int64) * 3 * rows + row[None, :]
    present = (part[:, None] < num_parts) & counts[None, :]
    m = tl.load(at, mask=present, other=LOWEST)
    s = tl.load(at + rows, mask=present, other=0.0)
    t = tl.load(at + 2 * rows, mask=present, other=0.0)
    m, s, t = merged(m, s, t, 0)
    target_y = tl.zeros((BLOCK,), tl.float32)
    if HAS_TARGETS:
        inside = counts & (target >= 0) & (target < V)
        x = tl.load(logits + first + row.to(tl.int64) * row_stride + target, mask=inside, other=0.0)
        x = tl.where(inside, oriented(x, cap_in, cap_out, CAPPED, NEGATIVE), float("nan"))
        target_y = target_shifted(x, slope, m, CAPPED)
    logprob, h, lse, low = statistics(m, s, t, target_y)
    if HAS_TARGETS:
        tl.store(logprobs + row, tl.where(counts, logprob, 0.0), mask=valid)
    tl.store(entropy + row, tl.where(counts, h, 0.0), mask=valid)
    tl.store(logsumexp + row, tl.where(counts, lse, 0.0), mask=valid)
    tl.store(logsumexp_low + row, tl.where(counts, low, 0.0), mask=valid)


@triton.jit
def token_stats_bwd_kernel(
    logits,
    targets,
    entropy,
    logsumexp,
    logsumexp_low,
    grad_logprobs,  # (rows), float32, as the following two
    grad_entropy,
    grad_logsumexp,
    out,
    first,
    row_stride,
    out_first,
    out_stride,
    V,
    chunk,
    ignore_index,
    cap_in,
    cap_out,
    slope,
    slope_of_x,
    HAS_TARGETS: tl.constexpr,
    HAS_LOGPROBS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_LOGSUMEXP: tl.constexpr,
    SAME_SHIFT: tl.constexpr,
    CAPPED: tl.constexpr,
    NEGATIVE: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0)
    part = tl.program_id(1)
    start = first + row.to(tl.int64) * row_stride
    out_start = out_first + row.to(tl.int64) * out_stride
    zero = tl.full((), 0.0, tl.float32)
    g_logprob = tl.load(grad_logprobs + row) if HAS_LOGPROBS else zero
    g_entropy = tl.load(grad_entropy + row) if HAS_ENTROPY else zero
    g_logsumexp = tl.load(grad_logsumexp + row) if HAS_LOGSUMEXP else zero
    active = (g_logprob != 0) | (g_entropy != 0) | (g_logsumexp != 0)
    target = tl.full((), -1, tl.int64)
    if HAS_TARGETS:
        target = tl.load(targets + row)
        active = active & (target != ignore_index)
    target = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
    if active:
        reference, a, b, own = gradient_factors(
            tl.load(entropy + row),
            tl.load(logsumexp + row),
            tl.load(logsumexp_low + row),
            g_logprob,
            g_entropy,
            g_logsumexp,
            slope_of_x,
        )
        write_gradient(
            logits, start, out, out_start, target, V, part, chunk, cap_in, cap_out, slope, reference, a, b, own,
            CAPPED, NEGATIVE, SAME_SHIFT, True, LANES, VEC, UNROLL,
        )  # fmt: skip
    else:
        write_gradient(
            logits, start, out, out_start, target, V, part, chunk, cap_in, cap_out, slope, zero, zero, zero, zero,
            CAPPED, NEGATIVE, SAME_SHIFT, False, LANES, VEC, UNROLL,
        )  # fmt: skip


# --- launchers --------------------------------------------------------------------------------------------------------


def share(rows: int, vocab: int, device: tuning.Device, options: dict[str, int]) -> tuple[int, int]:
    """Return (programs per row, columns of each), the latter a whole number of tiles."""
    step = options["LANES"] * options["VEC"] * options["UNROLL"]
    tiles = -(-vocab // step)
    parts = tuning.programs_per_row(device, rows, tiles)
    chunk = -(-tiles // parts) * step
    return -(-vocab // chunk), chunk


@on_its_device
def token_stats_forward(logits: Tensor, targets: Tensor | None, transform: Transform) -> KernelStats:
    out = KernelStats(*(new_stats(logits) for _ in KernelStats._fields))
    if targets is None:
        out.logprobs.zero_()
    targets = None if targets is None else targets.contiguous().view(-1)
    flat = KernelStats(*(value.view(-1) for value in out))
    device = tuning.device_of(logits)
    options = tuning.stream(device, logits.element_size())
    common = {"ignore_index": transform.ignore_index, **transform_arguments(transform), **LAUNCH}
    for start, block in row_blocks(with_unit_stride(logits)):
        rows, V = block.shape
        span = slice(start, start + rows)
        base, stats = base_of(block), [value[span] for value in flat]
        block_targets = None if targets is None else targets[span]
        parts, chunk = share(rows, V, device, options)
        where = {"first": base.first, "row_stride": block.stride(0), "rows": rows, "V": V}
        partial = None
        if parts > 1:
            partial = torch.empty(parts, 3, rows, dtype=torch.float32, device=logits.device)
        token_stats_fwd_kernel[(rows, parts)](
            base.pointer, block_targets, *stats, partial, **where, chunk=chunk, HAS_TARGETS=targets is not None,
            SPLIT=parts > 1, **common, **options,
        )  # fmt: skip
        if partial is not None:
            token_stats_merge_kernel[(triton.cdiv(rows, 16),)](
                partial, base.pointer, block_targets, *stats, **where, num_parts=parts, HAS_TARGETS=targets is not None,
                BLOCK=16, PARTS=triton.next_power_of_2(parts), **common,
            )  # fmt: skip
    return out


@on_its_device
def token_stats_backward(
    logits: Tensor,
    targets: Tensor | None,
    stats: KernelStats,
    gradients: StatsGradients,
    transform: Transform,
    *,
    out: Tensor,
) -> None:
    source = out if out is logits else with_unit_stride(logits)
    targets = None if targets is None else targets.contiguous().view(-1)
    per_row = [float32(None if value is None else value.reshape(-1)) for value in (*stats[1:], *gradients)]
    device = tuning.device_of(logits)
    options = tuning.stream(device, logits.element_size())
    for (start, block), (_, out_block) in zip(row_blocks(source), row_blocks(out, like=source), strict=True):
        rows, V = block.shape
        span = slice(start, start + rows)
        base, out_base = base_of(block), base_of(out_block)
        parts, chunk = share(rows, V, device, options)
        token_stats_bwd_kernel[(rows, parts)](
            base.pointer,
            None if targets is None else targets[span],
            *(None if value is None else value[span] for value in per_row),
            out_base.pointer,
            first=base.first,
            row_stride=block.stride(0),
            out_first=out_base.first,
            out_stride=out_block.stride(0),
            V=V,
            chunk=chunk,
            ignore_index=transform.ignore_index,
            slope_of_x=slope_of_x(transform),
            HAS_TARGETS=targets is not None,
            HAS_LOGPROBS=gradients.logprobs is not None,
            HAS_ENTROPY=gradients.entropy is not None,
            HAS_LOGSUMEXP=gradients.logsumexp is not None,
            SAME_SHIFT=same_shift(block, out_block, options["VEC"]),
            **transform_arguments(transform),
            **options,
            **LAUNCH,
        )


def same_shift(block: Tensor, out_block: Tensor, vector: int) -> bool:
    """Whether the vectors of each row lie at the same columns in both."""
    first = block.storage_offset() - out_block.storage_offset()
    stride = 0 if block.shape[0] == 1 else block.stride(0) - out_block.stride(0)
    return first % vector == 0 and stride % vector == 0
