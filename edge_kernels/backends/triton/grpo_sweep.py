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
from edge_kernels.backends.triton.launch import LAUNCH, base_of, on_its_device, slope_of_x, transform_arguments
from edge_kernels.backends.triton.rows import row_sums, write_gradient
from edge_kernels.backends.triton.token_loss import (
    corrected,
    policy,
    rule_arguments,
    sampler_factor,
    term_tensors,
    token_loss,
)
from edge_kernels.backends.triton.token_stats import (
    same_shift,
    target_logit,
    target_shifted,
    token_stats_backward,
    token_stats_forward,
)
from edge_kernels.contract import LossRule, StatsGradients, TokenTerms, Transform


@triton.jit
def grpo_sweep_kernel(
    logits,
    targets,
    logprobs,  # (rows), float32, as all per-row tensors that are not said to be bool
    entropy,
    out,
    mask,  # bool
    weight,
    advantages,
    old_logprobs,
    ref_logprobs,
    sampler_ratio,
    sampling_logprobs,
    injected,  # bool
    entropy_threshold,  # (1)
    bonus_weight,  # (1)
    first,
    row_stride,
    out_first,
    out_stride,
    rows,
    V,
    chunk,  # at least V
    ignore_index,
    cap_in,
    cap_out,
    slope,
    slope_of_x,
    low,
    high,
    delta,
    beta,
    sampler_floor,
    sampler_cap,
    sft_weight,
    gamma,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_SAMPLER_RATIO: tl.constexpr,
    HAS_SAMPLING: tl.constexpr,
    HAS_INJECTED: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    HAS_BONUS: tl.constexpr,
    CISPO: tl.constexpr,
    SAMPLER_MASKS: tl.constexpr,
    SFT: tl.constexpr,
    SHAPED: tl.constexpr,
    SAME_SHIFT: tl.constexpr,
    CAPPED: tl.constexpr,
    NEGATIVE: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    UNROLL: tl.constexpr,
):
    threshold = tl.load(entropy_threshold) if HAS_THRESHOLD else 0.0
    bonus = tl.load(bonus_weight) if HAS_BONUS else 0.0
    zero = tl.full((), 0.0, tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        long_row = tl.full((), 0, tl.int64) + row
        start = first + long_row * row_stride
        out_start = out_first + long_row * out_stride
        target = tl.load(targets + row)
        column = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
        reference = zero
        a = zero
        b = zero
        own = zero
        active = False
        if target == ignore_index:
            tl.store(logprobs + row, 0.0)
            tl.store(entropy + row, 0.0)
        else:
            x = target_logit(logits, start, target, V, cap_in, cap_out, CAPPED, NEGATIVE)
            m, s, t = row_sums(logits, start, V, 0, chunk, cap_in, cap_out, slope, CAPPED, NEGATIVE, LANES, VEC, UNROLL)
            lp, h, lse, lse_low = statistics(m, s, t, target_shifted(x, slope, m, CAPPED))
            tl.store(logprobs + row, lp)
            tl.store(entropy + row, h)

            A = tl.load(advantages + row)
            old = lp
            if HAS_OLD:
                old = tl.load(old_logprobs + row)
                old = tl.where(old == old, old, lp)
            term, direct, through, _, _, _ = policy(lp - old, A, lp, low, high, delta, CISPO)
            is_injected = tl.load(injected + row).to(tl.int1) if HAS_INJECTED else target == ignore_index
            factor = 1.0
            if HAS_SAMPLING:
                difference = old - tl.load(sampling_logprobs + row)
                factor = sampler_factor(difference, sampler_floor, sampler_cap, SAMPLER_MASKS)
            elif HAS_SAMPLER_RATIO:
                factor = tl.load(sampler_ratio + row)
            acting = target != ignore_index
            if HAS_THRESHOLD:
                acting = (h >= threshold) | (h != h)
            ref = tl.load(ref_logprobs + row) if HAS_REF else lp
            term, direct, through, _ = corrected(
                term, direct, through, A, lp, factor, acting, is_injected, ref, beta, sft_weight, gamma,
                HAS_SAMPLING or HAS_SAMPLER_RATIO, HAS_INJECTED, SFT, SHAPED, HAS_REF, HAS_BETA,
            )  # fmt: skip
            d_logprob = tl.load(weight + row) * (direct + through)
            d_entropy = tl.where(acting, -bonus, 0.0)
            active = (d_logprob != 0) | (d_entropy != 0)
            reference, a, b, own = gradient_factors(h, lse, lse_low, d_logprob, d_entropy, zero, slope_of_x)
        tl.debug_barrier()  # every thread has read the target's logit before another writes its gradient there
        if active:
            write_gradient(
                logits, start, out, out_start, column, V, 0, chunk, cap_in, cap_out, slope, reference, a, b, own,
                CAPPED, NEGATIVE, SAME_SHIFT, True, LANES, VEC, UNROLL,
            )  # fmt: skip
        else:
            write_gradient(
                logits, start, out, out_start, column, V, 0, chunk, cap_in, cap_out, slope, zero, zero, zero, zero,
                CAPPED, NEGATIVE, SAME_SHIFT, False, LANES, VEC, UNROLL,
            )  # fmt: skip


@on_its_device
def grpo_sweep(
    logits: Tensor, targets: Tensor, terms: TokenTerms, rule: LossRule, transform: Transform, *, out: Tensor
) -> tuple[Tensor, Tensor]:
    device = tuning.device_of(logits)
    rows = targets.numel()
    if rows < device.multiprocessors:
        stats = token_stats_forward(logits, targets, transform)
        part = token_loss(stats.logprobs, stats.entropy, terms, rule)
        gradients = StatsGradients(part.d_logprobs, None if terms.bonus_weight is None else part.d_entropy, None)
        token_stats_backward(logits, targets, stats, gradients, transform, out=out)
        return stats.logprobs, stats.entropy
    logprobs, entropy = (torch.empty(targets.shape, dtype=torch.float32, device=logits.device) for _ in range(2))
    per_row = {"targets": targets.contiguous(), "logprobs": logprobs, "entropy": entropy, **term_tensors(terms)}
    options = tuning.sweep(device, logits.element_size())
    for (start, block), (_, out_block) in zip(row_blocks(logits), row_blocks(out, like=logits), strict=True):
        rows, V = block.shape
        span = slice(start, start + rows)
        base, out_base = base_of(block), base_of(out_block)
        programs = min(rows, tuning.rows_in_cache(device, V * block.element_size()))
        grpo_sweep_kernel[(programs,)](
            logits=base.pointer,
            out=out_base.pointer,
            **{n: t if t is None or t.dim() == 0 else t.view(-1)[span] for n, t in per_row.items()},
            first=base.first,
            row_stride=block.stride(0),
            out_first=out_base.first,
            out_stride=out_block.stride(0),
            rows=rows,
            V=V,
            chunk=V,
            ignore_index=transform.ignore_index,
            slope_of_x=slope_of_x(transform),
            SAME_SHIFT=same_shift(block, out_block, options["VEC"]),
            **transform_arguments(transform),
            **rule_arguments(rule, terms),
            **options,
            **LAUNCH,
        )
    return logprobs, entropy
