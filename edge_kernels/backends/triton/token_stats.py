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
from edge_kernels.backends.triton.arithmetic import (
    LOWEST,
    gradient_factors,
    merged,
    oriented,
    shifted,
    slope_of,
    statistics,
)
from edge_kernels.backends.triton.launch import LAUNCH, on_its_device, packed, part_of, rows_of, transform_of
from edge_kernels.backends.triton.rows import row_sums, write_gradient
from edge_kernels.contract import KernelStats, StatsGradients, Transform, new_stats


@triton.jit
def target_logit(logits, start, target, V, transform):
    """The oriented logit of a row's target, NaN for a target outside the row."""
    inside = (target >= 0) & (target < V)
    x = tl.load(logits + start + tl.where(inside, target, 0), mask=inside, other=0.0)
    return tl.where(inside, oriented(x, transform), float("nan"))


@triton.jit
def target_shifted(x, m, transform):
    """y - m of a target; unlike in a sum, -inf stays -inf."""
    return tl.where(x == float("-inf"), x, shifted(x, m, slope_of(m, transform), transform))


@triton.jit
def token_stats_fwd_kernel(
    logits,  # Rows
    targets,  # (rows), int64; None: every row counts
    stats,  # KernelStats, (rows) each
    partial,  # (programs per row, 3, rows), float32: the sums of each share of a row, in place of its statistics
    rows,
    V,
    chunk,  # columns of a program's share
    transform,
    tile,
):
    row = tl.program_id(0)
    part = tl.program_id(1)
    start = logits.first + row.to(tl.int64) * logits.stride
    target = transform.ignore_index
    ignored = False
    if targets is not None:
        target = tl.load(targets + row)
        ignored = target == transform.ignore_index
    if ignored:
        if partial is None:
            tl.store(stats.logprobs + row, 0.0)
            tl.store(stats.entropy + row, 0.0)
            tl.store(stats.logsumexp + row, 0.0)
            tl.store(stats.maximum + row, 0.0)
            tl.store(stats.total + row, 0.0)
    else:
        m, s, t = row_sums(logits.pointer, start, V, part, chunk, transform, tile)
        if partial is not None:
            at = partial + part.to(tl.int64) * 3 * rows + row
            tl.store(at, m)
            tl.store(at + rows, s)
            tl.store(at + 2 * rows, t)
        else:
            target_y = 0.0
            if targets is not None:
                target_y = target_shifted(target_logit(logits.pointer, start, target, V, transform), m, transform)
            logprob, h, lse, total = statistics(m, s, t, target_y, transform)
            if targets is not None:
                tl.store(stats.logprobs + row, logprob)
            tl.store(stats.entropy + row, h)
            tl.store(stats.logsumexp + row, lse)
            tl.store(stats.maximum + row, m)
            tl.store(stats.total + row, tl.where(s == 0, 0.0, total))  # 0: every logit is -inf


@triton.jit
def load_shares(partial, place, rows, present, num_parts, PARTS: tl.constexpr):
    """(m, s, t) of rows whose shares lie in ``partial`` (num_parts, 3, rows)."""
    part = tl.arange(0, PARTS)
    at = partial + part[:, None].to(tl.int64) * 3 * rows + place[None, :]
    mask = (part[:, None] < num_parts) & present[None, :]
    m = tl.load(at, mask=mask, other=LOWEST)
    s = tl.load(at + rows, mask=mask, other=0.0)
    t = tl.load(at + 2 * rows, mask=mask, other=0.0)
    return merged(m, s, t, 0)


@triton.jit
def store_statistics(stats, row, valid, counts, m, s, t, target_y, transform, HAS_TARGETS: tl.constexpr):
    """Store what the sums of rows say, and 0 for the rows that do not count."""
    logprob, h, lse, total = statistics(m, s, t, target_y, transform)
    if HAS_TARGETS:
        tl.store(stats.logprobs + row, tl.where(counts, logprob, 0.0), mask=valid)
    tl.store(stats.entropy + row, tl.where(counts, h, 0.0), mask=valid)
    tl.store(stats.logsumexp + row, tl.where(counts, lse, 0.0), mask=valid)
    tl.store(stats.maximum + row, tl.where(counts, m, 0.0), mask=valid)
    tl.store(stats.total + row, tl.where(counts & (s != 0), total, 0.0), mask=valid)


@triton.jit
def token_stats_merge_kernel(
    partial,  # (num_parts, 3, rows)
    logits,
    targets,
    stats,
    rows,
    V,
    num_parts,
    transform,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,  # a power of two, at least num_parts
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < rows
    target = tl.zeros((BLOCK,), tl.int64)
    counts = valid
    if targets is not None:
        target = tl.load(targets + row, mask=valid, other=0)
        counts = valid & (target != transform.ignore_index)
    m, s, t = load_shares(partial, row, rows, counts, num_parts, PARTS)
    target_y = tl.zeros((BLOCK,), tl.float32)
    if targets is not None:
        inside = counts & (target >= 0) & (target < V)
        at = logits.first + row.to(tl.int64) * logits.stride + target
        x = tl.load(logits.pointer + at, mask=inside, other=0.0)
        target_y = target_shifted(tl.where(inside, oriented(x, transform), float("nan")), m, transform)
    store_statistics(stats, row, valid, counts, m, s, t, target_y, transform, targets is not None)


@triton.jit
def token_stats_bwd_kernel(
    logits,
    targets,
    stats,
    gradients,  # StatsGradients, (rows) each
    out,  # Rows
    V,
    chunk,
    transform,
    SAME_SHIFT: tl.constexpr,
    tile,
):
    row = tl.program_id(0)
    part = tl.program_id(1)
    start = logits.first + row.to(tl.int64) * logits.stride
    out_start = out.first + row.to(tl.int64) * out.stride
    zero = tl.full((), 0.0, tl.float32)
    g_logprob = tl.load(gradients.logprobs + row) if gradients.logprobs is not None else zero
    g_entropy = tl.load(gradients.entropy + row) if gradients.entropy is not None else zero
    g_logsumexp = tl.load(gradients.logsumexp + row) if gradients.logsumexp is not None else zero
    active = (g_logprob != 0) | (g_entropy != 0) | (g_logsumexp != 0)
    target = tl.full((), -1, tl.int64)
    if targets is not None:
        target = tl.load(targets + row)
        active = active & (target != transform.ignore_index)
    target = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
    if active:
        factors = gradient_factors(
            tl.load(stats.entropy + row),
            tl.load(stats.maximum + row),
            tl.load(stats.total + row),
            g_logprob,
            g_entropy,
            g_logsumexp,
            transform,
        )
        write_gradient(
            logits.pointer, start, out.pointer, out_start, target, V, part, chunk, factors, transform, SAME_SHIFT, tile
        )
    else:
        write_gradient(
            logits.pointer, start, out.pointer, out_start, target, V, part, chunk, None, transform, SAME_SHIFT, tile
        )


# --- launchers --------------------------------------------------------------------------------------------------------


def share(rows: int, vocab: int, device: tuning.Device, step: int) -> tuple[int, int]:
    """Return (programs per row, columns of each), the latter a whole number of tiles of ``step`` columns."""
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
    flat = packed(out)
    device = tuning.device_of(logits)
    tile, num_warps = tuning.stream(device, logits.element_size())
    y = transform_of(transform)
    for start, block in row_blocks(with_unit_stride(logits)):
        rows, V = block.shape
        span = slice(start, start + rows)
        source, stats = rows_of(block), part_of(flat, span)
        block_targets = None if targets is None else targets[span]
        parts, chunk = share(rows, V, device, tile.columns)
        partial = None
        if parts > 1:
            partial = torch.empty(parts, 3, rows, dtype=torch.float32, device=logits.device)
        token_stats_fwd_kernel[(rows, parts)](
            source, block_targets, stats, partial, rows, V, chunk, y, tile, num_warps=num_warps, **LAUNCH
        )
        if partial is not None:
            token_stats_merge_kernel[(triton.cdiv(rows, 16),)](
                partial, source, block_targets, stats, rows, V, parts, y,
                BLOCK=16, PARTS=triton.next_power_of_2(parts), **LAUNCH,
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
    stats, gradients = packed(stats), packed(gradients)
    device = tuning.device_of(logits)
    tile, num_warps = tuning.stream(device, logits.element_size())
    for (start, block), (_, out_block) in zip(row_blocks(source), row_blocks(out, like=source), strict=True):
        rows, V = block.shape
        span = slice(start, start + rows)
        parts, chunk = share(rows, V, device, tile.columns)
        token_stats_bwd_kernel[(rows, parts)](
            rows_of(block),
            None if targets is None else targets[span],
            part_of(stats, span),
            part_of(gradients, span),
            rows_of(out_block),
            V,
            chunk,
            transform_of(transform),
            same_shift(block, out_block),
            tile,
            num_warps=num_warps,
            **LAUNCH,
        )


def same_shift(block: Tensor, out_block: Tensor) -> bool:
    """Whether the vectors of each row lie at the same columns in both."""
    vector = tuning.VECTOR_BYTES // block.element_size()
    first = block.storage_offset() - out_block.storage_offset()
    stride = 0 if block.shape[0] == 1 else block.stride(0) - out_block.stride(0)
    return first % vector == 0 and stride % vector == 0
