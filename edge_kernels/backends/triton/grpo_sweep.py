"""The one-sweep loss: a row's sums, its token's coefficient, and the gradient written over the logits.

One program has a row from its first read to its last write. Only as many rows are under way as L2 holds, so that the
second read does not reach memory. Fewer rows than multiprocessors are split, in three launches, all of them in L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from edge_kernels.backends.rows import row_blocks
from edge_kernels.backends.triton import tuning
from edge_kernels.backends.triton.arithmetic import gradient_factors, statistics
from edge_kernels.backends.triton.launch import LAUNCH, on_its_device, packed, part_of, rows_of, transform_of
from edge_kernels.backends.triton.rows import row_sums, write_gradient
from edge_kernels.backends.triton.token_loss import contribution, rule_arguments, token_loss
from edge_kernels.backends.triton.token_stats import (
    same_shift,
    target_logit,
    target_shifted,
    token_stats_backward,
    token_stats_forward,
)
from edge_kernels.contract import LossRule, TokenTerms, Transform


@triton.jit
def grpo_sweep_kernel(
    logits,  # Rows
    targets,  # (rows), int64
    logprobs,  # (rows), float32
    entropy,
    terms,  # TokenTerms, (rows) or () each, float32 or bool
    out,  # Rows
    rows,
    V,
    transform,
    rule,  # of no sequences
    low,
    high,
    SAME_SHIFT: tl.constexpr,
    tile,
):
    threshold = tl.load(terms.entropy_threshold) if terms.entropy_threshold is not None else 0.0
    bonus = tl.load(terms.bonus_weight) if terms.bonus_weight is not None else 0.0
    zero = tl.full((), 0.0, tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        long_row = tl.full((), 0, tl.int64) + row
        start = logits.first + long_row * logits.stride
        out_start = out.first + long_row * out.stride
        target = tl.load(targets + row)
        column = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
        m = zero
        slope = zero
        a = zero
        b = zero
        own = zero
        active = False
        counts = target != transform.ignore_index
        if counts:
            x = target_logit(logits.pointer, start, target, V, transform)
            m, s, t = row_sums(logits.pointer, start, V, 0, V, transform, tile)
            lp, h, _, total = statistics(m, s, t, target_shifted(x, m, transform), transform)
            tl.store(logprobs + row, lp)
            tl.store(entropy + row, h)
            _, direct, through, acting, _, _, _, _, _, _ = contribution(
                terms, rule, low, high, row, counts, lp, h, threshold, None, None
            )
            d_logprob = tl.load(terms.weight + row) * (direct + through)
            d_entropy = tl.where(acting, -bonus, 0.0)
            active = (d_logprob != 0) | (d_entropy != 0)
            m, slope, a, b, own = gradient_factors(h, m, total, d_logprob, d_entropy, zero, transform)
        else:
            tl.store(logprobs + row, 0.0)
            tl.store(entropy + row, 0.0)
        tl.debug_barrier()  # every thread has read the target's logit before another writes its gradient there
        if active:
            write_gradient(
                logits.pointer, start, out.pointer, out_start, column, V, 0, V, (m, slope, a, b, own), transform,
                SAME_SHIFT, tile,
            )  # fmt: skip
        else:
            write_gradient(
                logits.pointer, start, out.pointer, out_start, column, V, 0, V, None, transform, SAME_SHIFT, tile
            )


@on_its_device
def grpo_sweep(
    logits: Tensor, targets: Tensor, terms: TokenTerms, rule: LossRule, transform: Transform, *, out: Tensor
) -> tuple[Tensor, Tensor]:
    device = tuning.device_of(logits)
    rows = targets.numel()
    if rows < device.multiprocessors:
        stats = token_stats_forward(logits, targets, transform)
        part = token_loss(stats.logprobs, stats.entropy, terms, rule)
        token_stats_backward(logits, targets, stats, part.gradients(terms), transform, out=out)
        return stats.logprobs, stats.entropy
    logprobs, entropy = (torch.empty(targets.shape, dtype=torch.float32, device=logits.device) for _ in range(2))
    per_row = logprobs.view(-1), entropy.view(-1), targets.contiguous().view(-1)
    flat = packed(terms)
    tile, num_warps = tuning.sweep(device, logits.element_size())
    for (start, block), (_, out_block) in zip(row_blocks(logits), row_blocks(out, like=logits), strict=True):
        rows, V = block.shape
        span = slice(start, start + rows)
        lp, h, target = (value[span] for value in per_row)
        programs = min(rows, tuning.rows_in_cache(device, V * block.element_size()))
        grpo_sweep_kernel[(programs,)](
            rows_of(block), target, lp, h, part_of(flat, span), rows_of(out_block), rows, V, transform_of(transform),
            **rule_arguments(rule), SAME_SHIFT=same_shift(block, out_block), tile=tile, num_warps=num_warps, **LAUNCH,
        )  # fmt: skip
    return logprobs, entropy
