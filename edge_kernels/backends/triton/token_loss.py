"""From a token's statistics to its loss, the loss's derivatives and the batch's metrics: one kernel, and a small sum.

The formulas are edge_kernels/token_loss.py's, in its order. What concerns one token stands in functions that take
blocks as well as scalars, because the sweep over logits (grpo_sweep.py) needs a row's coefficient in its midst.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from edge_kernels.backends.triton.arithmetic import LOG2E, nan_max
from edge_kernels.backends.triton.launch import LAUNCH, float32, on_its_device
from edge_kernels.contract import METRICS, Injected, LossRule, Objective, TokenLoss, TokenTerms
from edge_kernels.reference import MAX_LOG_RATIO

BLOCK = 1024
SUMS = tl.constexpr(16)  # room for the loss and the metrics, a power of two
MAX_RATIO_LOG = tl.constexpr(MAX_LOG_RATIO)


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def policy(log_ratio, A, logprob, low, high, delta, CISPO: tl.constexpr):
    """(term, derivative by the logprob, by the log ratio, ratio, clipped low, clipped high).

    ``low`` and ``high`` are the bounds of the ratio; for CISPO ``high`` is its cap.
    """
    ratio = exp(tl.where(log_ratio > MAX_RATIO_LOG, MAX_RATIO_LOG, log_ratio))
    if CISPO:
        direct = -tl.where(ratio > high, high, ratio) * A
        is_high = (ratio > high) & (A > 0)
        never = is_high & (A < 0)
        return direct * logprob, direct, tl.zeros_like(direct), ratio, never, is_high
    else:
        unclipped = tl.where(ratio > delta, delta, ratio)
        clipped = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
        moves_unclipped = tl.where(ratio <= delta, 1.0, 0.0)
        moves_clipped = tl.where((ratio >= low) & (ratio <= high), 1.0, 0.0)
        # The lesser of the two counts; where they are equal autograd gives each one half, and so does this.
        first = unclipped * A
        second = clipped * A
        moves = tl.where(first < second, moves_unclipped, moves_clipped)
        moves = tl.where(first == second, (moves_unclipped + moves_clipped) / 2, moves)
        term = -tl.minimum(first, second, propagate_nan=tl.PropagateNan.ALL)
        through = tl.where(log_ratio > MAX_RATIO_LOG, 0.0, -A * moves * ratio)
        is_low = (unclipped < low) & (A < 0)
        is_high = (unclipped > high) & (A > 0)
        return term, tl.zeros_like(term), through, ratio, is_low, is_high


@triton.jit
def sampler_factor(difference, floor, cap, MASKS: tl.constexpr):
    """The correction for a sampler whose log-probabilities are off by ``difference``; NaN is unknown, and is 1."""
    ratio = exp(tl.where(difference == difference, difference, 0.0))
    if MASKS:
        return tl.where((ratio < floor) | (ratio > cap), 0.0, ratio)
    else:
        return tl.where(ratio < floor, floor, tl.where(ratio > cap, cap, ratio))


@triton.jit
def corrected(
    term,
    direct,
    through,
    A,
    logprob,
    factor,
    acting,
    injected,
    ref,
    beta,
    sft_weight,
    gamma,
    HAS_FACTOR: tl.constexpr,
    HAS_INJECTED: tl.constexpr,
    SFT: tl.constexpr,
    SHAPED: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_BETA: tl.constexpr,
):
    """The policy term and its derivatives after everything that is done to them, and the KL estimate."""
    if SHAPED and HAS_INJECTED:
        p = exp(logprob)
        term = tl.where(injected, -A * p / (p + gamma), term)
        direct = tl.where(injected, -A * gamma * p / ((p + gamma) * (p + gamma)), direct)
        through = tl.where(injected, 0.0, through)
    scale = tl.where(acting, 1.0, 0.0)
    if HAS_FACTOR:
        scale = scale * factor
    term = term * scale
    direct = direct * scale
    through = through * scale
    if SFT and HAS_INJECTED:
        term = tl.where(injected, -sft_weight * logprob, term)
        direct = tl.where(injected, -sft_weight, direct)
        through = tl.where(injected, 0.0, through)
    kl = tl.zeros_like(term)
    if HAS_REF:
        d = ref - logprob
        power = exp(d)
        kl = power - d - 1
        if HAS_BETA:
            term = term + beta * kl
            direct = direct + beta * (1 - power)
    return term, direct, through, kl


@triton.jit
def token_loss_kernel(
    logprobs,  # (num_tokens), float32, as all per-token tensors that are not said to be bool
    entropy,
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
    d_logprobs,
    d_entropy,
    sums,  # (programs, SUMS): the loss, then METRICS
    num_tokens,
    length,  # tokens of a program: a sequence, where SEQUENCE or SEQUENCE_SAMPLER
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
    SEQUENCE: tl.constexpr,
    SEQUENCE_SAMPLER: tl.constexpr,
    SAMPLER_MASKS: tl.constexpr,
    SFT: tl.constexpr,
    SHAPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    base = program.to(tl.int64) * length
    offsets = tl.arange(0, BLOCK)
    threshold = tl.load(entropy_threshold) if HAS_THRESHOLD else 0.0
    bonus = tl.load(bonus_weight) if HAS_BONUS else 0.0

    mean_log_ratio = 0.0
    recorded_tokens = 1.0
    sequence_difference = 0.0
    if SEQUENCE or SEQUENCE_SAMPLER:  # what the whole sequence says, first
        total_ratio = tl.zeros((BLOCK,), tl.float32)
        total_recorded = tl.zeros((BLOCK,), tl.float32)
        total_difference = tl.zeros((BLOCK,), tl.float32)
        for i in range(0, length, BLOCK):
            at = base + i + offsets
            here = i + offsets < length
            own = here & tl.load(mask + at, mask=here, other=0).to(tl.int1)
            lp = tl.load(logprobs + at, mask=own, other=0.0)
            old = lp
            if HAS_OLD:
                old = tl.load(old_logprobs + at, mask=own, other=0.0)
            recorded = own & (old == old)
            if not HAS_OLD:
                recorded = own
            old = tl.where(old == old, old, lp)
            total_ratio += tl.where(recorded, lp - old, 0.0)
            total_recorded += tl.where(recorded, 1.0, 0.0)
            if SEQUENCE_SAMPLER:
                difference = old - tl.load(sampling_logprobs + at, mask=own, other=0.0)
                total_difference += tl.where(own & (difference == difference), difference, 0.0)
        recorded_tokens = tl.maximum(tl.sum(total_recorded, 0), 1.0)
        mean_log_ratio = tl.sum(total_ratio, 0) / recorded_tokens
        sequence_difference = tl.sum(total_difference, 0)

    total_loss = tl.zeros((BLOCK,), tl.float32)
    total_through = tl.zeros((BLOCK,), tl.float32)
    num_own = tl.zeros((BLOCK,), tl.float32)
    total_entropy = tl.zeros((BLOCK,), tl.float32)
    ratio_sum = tl.zeros((BLOCK,), tl.float32)
    ratio_max = tl.zeros((BLOCK,), tl.float32)
    num_low = tl.zeros((BLOCK,), tl.float32)
    num_high = tl.zeros((BLOCK,), tl.float32)
    num_clipped = tl.zeros((BLOCK,), tl.float32)
    kl_sum = tl.zeros((BLOCK,), tl.float32)
    factor_sum = tl.zeros((BLOCK,), tl.float32)
    factor_max = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, length, BLOCK):
        at = base + i + offsets
        here = (i + offsets < length) & (at < num_tokens)
        own = here & tl.load(mask + at, mask=here, other=0).to(tl.int1)
        lp = tl.load(logprobs + at, mask=own, other=0.0)
        h = tl.load(entropy + at, mask=own, other=0.0)
        A = tl.load(advantages + at, mask=own, other=0.0)
        w = tl.load(weight + at, mask=own, other=0.0)
        old = lp
        if HAS_OLD:
            old = tl.load(old_logprobs + at, mask=own, other=0.0)
            old = tl.where(old == old, old, lp)
        log_ratio = tl.zeros_like(lp) + mean_log_ratio if SEQUENCE else lp - old
        term, direct, through, ratio, is_low, is_high = policy(log_ratio, A, lp, low, high, delta, CISPO)
        is_injected = own
        if HAS_INJECTED:
            is_injected = own & tl.load(injected + at, mask=own, other=0).to(tl.int1)
        factor = tl.full((BLOCK,), 1.0, tl.float32)
        if HAS_SAMPLING:
            difference = tl.zeros_like(lp) + sequence_difference
            if not SEQUENCE_SAMPLER:
                difference = old - tl.load(sampling_logprobs + at, mask=own, other=0.0)
            factor = sampler_factor(difference, sampler_floor, sampler_cap, SAMPLER_MASKS)
        elif HAS_SAMPLER_RATIO:
            factor = tl.load(sampler_ratio + at, mask=own, other=0.0)
        acting = own
        if HAS_THRESHOLD:
            acting = own & ((h >= threshold) | (h != h))  # NaN acts, and so is seen
        ref = lp
        if HAS_REF:
            ref = tl.load(ref_logprobs + at, mask=own, other=0.0)
        term, direct, through, kl = corrected(
            term, direct, through, A, lp, factor, acting, is_injected, ref, beta, sft_weight, gamma,
            HAS_SAMPLING or HAS_SAMPLER_RATIO, HAS_INJECTED, SFT, SHAPED, HAS_REF, HAS_BETA,
        )  # fmt: skip
        loss = w * term
        if HAS_BONUS:
            loss -= tl.where(acting, bonus * h, 0.0)
        through = tl.where(own, w * through, 0.0)
        derivative = tl.where(own, w * direct, 0.0)
        if not SEQUENCE:
            derivative += through
        tl.store(d_logprobs + at, derivative, mask=here)
        tl.store(d_entropy + at, tl.where(acting, -bonus, 0.0), mask=here)
        total_loss += tl.where(own, loss, 0.0)
        total_through += through
        num_own += tl.where(own, 1.0, 0.0)
        total_entropy += h
        ratio_sum += tl.where(own, ratio, 0.0)
        ratio_max = nan_max(ratio_max, tl.where(own, ratio, 0.0))
        num_low += tl.where(own & is_low, 1.0, 0.0)
        num_high += tl.where(own & is_high, 1.0, 0.0)
        num_clipped += tl.where(own & (is_low | is_high), 1.0, 0.0)
        kl_sum += tl.where(own, kl, 0.0)
        if HAS_SAMPLING or HAS_SAMPLER_RATIO:
            factor_sum += tl.where(own, factor, 0.0)
            factor_max = nan_max(factor_max, tl.where(own, factor, 0.0))

    if SEQUENCE:  # every token of the sequence moves the one ratio by 1 / length
        each = tl.sum(total_through, 0) / recorded_tokens
        tl.debug_barrier()  # another thread may have written what this one adds to
        for i in range(0, length, BLOCK):
            at = base + i + offsets
            here = i + offsets < length
            own = here & tl.load(mask + at, mask=here, other=0).to(tl.int1)
            recorded = own
            if HAS_OLD:
                old = tl.load(old_logprobs + at, mask=own, other=0.0)
                recorded = own & (old == old)
            derivative = tl.load(d_logprobs + at, mask=here, other=0.0)
            tl.store(d_logprobs + at, derivative + tl.where(recorded, each, 0.0), mask=here)

    out = sums + program.to(tl.int64) * SUMS
    tl.store(out + 0, tl.sum(total_loss, 0))
    tl.store(out + 1, tl.sum(num_own, 0))
    tl.store(out + 2, tl.sum(total_entropy, 0))
    tl.store(out + 3, tl.sum(ratio_sum, 0))
    tl.store(out + 4, tl.reduce(ratio_max, 0, nan_max))
    tl.store(out + 5, tl.sum(num_low, 0))
    tl.store(out + 6, tl.sum(num_high, 0))
    tl.store(out + 7, tl.sum(num_clipped, 0))
    tl.store(out + 8, tl.sum(kl_sum, 0))
    tl.store(out + 9, tl.sum(factor_sum, 0))
    tl.store(out + 10, tl.reduce(factor_max, 0, nan_max))


@triton.jit
def token_loss_sum_kernel(
    sums,  # (programs, SUMS)
    loss,  # (1)
    metrics,  # (len(METRICS))
    programs,
    NUM_METRICS: tl.constexpr,
    RATIO_MAX: tl.constexpr,  # columns of what combines by the maximum
    FACTOR_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, SUMS)
    is_max = (column == RATIO_MAX) | (column == FACTOR_MAX)
    total = tl.zeros((BLOCK, SUMS), tl.float32)
    for i in range(0, programs, BLOCK):
        row = i + tl.arange(0, BLOCK)
        inside = (row < programs)[:, None] & (column <= NUM_METRICS)[None, :]
        value = tl.load(sums + row[:, None].to(tl.int64) * SUMS + column[None, :], mask=inside, other=0.0)
        total = tl.where(is_max[None, :], nan_max(total, value), total + value)
    result = tl.where(is_max, tl.reduce(total, 0, nan_max), tl.sum(total, 0))
    tl.store(loss + column, result, mask=column == 0)
    tl.store(metrics + column - 1, result, mask=(column > 0) & (column <= NUM_METRICS))


# --- launchers --------------------------------------------------------------------------------------------------------


def rule_arguments(rule: LossRule, terms: TokenTerms) -> dict[str, Any]:
    """Return the arguments that say what a token's loss is; which tensors there are is part of it."""
    return {
        "low": 1 - rule.epsilon_low,
        "high": rule.epsilon_high if rule.objective == Objective.CISPO else 1 + rule.epsilon_high,
        "delta": rule.delta,
        "beta": rule.beta,
        "sampler_floor": rule.sampler_floor,
        "sampler_cap": rule.sampler_cap,
        "sft_weight": rule.sft_weight,
        "gamma": rule.shaped_gamma,
        "HAS_OLD": terms.old_logprobs is not None,
        "HAS_REF": terms.ref_logprobs is not None,
        "HAS_BETA": rule.beta > 0,
        "HAS_SAMPLER_RATIO": terms.sampler_ratio is not None,
        "HAS_SAMPLING": terms.sampling_logprobs is not None,
        "HAS_INJECTED": terms.injected is not None,
        "HAS_THRESHOLD": terms.entropy_threshold is not None,
        "HAS_BONUS": terms.bonus_weight is not None,
        "CISPO": rule.objective == Objective.CISPO,
        "SAMPLER_MASKS": rule.sampler_masks,
        "SFT": rule.injected == Injected.SFT,
        "SHAPED": rule.injected == Injected.SHAPED,
    }


def term_tensors(terms: TokenTerms) -> dict[str, Tensor | None]:
    """Return the tensors of a batch as the kernels take them: contiguous, float32 or bool."""

    def prepared(value: Tensor | None) -> Tensor | None:
        return value.contiguous() if value is not None and value.dtype == torch.bool else float32(value)

    return {name: prepared(value) for name, value in terms._asdict().items()}


@on_its_device
def token_loss(logprobs: Tensor, entropy: Tensor, terms: TokenTerms, rule: LossRule) -> TokenLoss:
    shape, num_tokens = logprobs.shape, logprobs.numel()
    of_sequences = rule.ratio_of_sequence
    of_sequences_sampler = terms.sampling_logprobs is not None and rule.sampler_of_sequence
    length = shape[-1] if of_sequences or of_sequences_sampler else BLOCK
    programs = -(-num_tokens // max(length, 1))
    block = min(BLOCK, max(16, triton.next_power_of_2(length)))
    d_logprobs, d_entropy = (torch.empty(shape, dtype=torch.float32, device=logprobs.device) for _ in range(2))
    sums = torch.empty(programs, int(SUMS), dtype=torch.float32, device=logprobs.device)
    loss, metrics = logprobs.new_empty((), dtype=torch.float32), sums.new_empty(len(METRICS))
    if programs > 0:
        token_loss_kernel[(programs,)](
            float32(logprobs), float32(entropy), **term_tensors(terms), d_logprobs=d_logprobs, d_entropy=d_entropy,
            sums=sums, num_tokens=num_tokens, length=length, SEQUENCE=of_sequences,
            SEQUENCE_SAMPLER=of_sequences_sampler, BLOCK=block, **rule_arguments(rule, terms), **LAUNCH,
        )  # fmt: skip
    token_loss_sum_kernel[(1,)](
        sums, loss, metrics, programs, NUM_METRICS=len(METRICS), RATIO_MAX=1 + METRICS.index("ratio_max"),
        FACTOR_MAX=1 + METRICS.index("sampler_ratio_max"), BLOCK=64, **LAUNCH,
    )  # fmt: skip
    return TokenLoss(loss, metrics, d_logprobs, d_entropy)
