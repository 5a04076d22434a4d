"""From a token's statistics to its loss, the loss's derivatives and the batch's metrics: one kernel, and a small sum.

The formulas are backends/plain.py's, in its order. What concerns one token lies in functions that take blocks as well
as scalars, because the sweep over logits (grpo_sweep.py) needs a row's coefficient in its midst.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from edge_kernels.backends.triton.arithmetic import LOG2E, nan_max
from edge_kernels.backends.triton.launch import LAUNCH, on_its_device, packed
from edge_kernels.contract import METRICS, Injected, LossRule, Objective, TokenLoss, TokenTerms
from edge_kernels.reference import MAX_KL_LOG_RATIO, MAX_LOG_RATIO

BLOCK = 1024
SUMS = tl.constexpr(16)  # room for the loss and the metrics, a power of two
MAX_RATIO_LOG = tl.constexpr(MAX_LOG_RATIO)
MAX_KL_LOG = tl.constexpr(MAX_KL_LOG_RATIO)
CISPO = tl.constexpr(Objective.CISPO)
SAPO = tl.constexpr(Objective.SAPO)
GEOMETRIC = tl.constexpr(Objective.GEOMETRIC)
WEIGHTED = tl.constexpr(Objective.WEIGHTED)
SFT = tl.constexpr(Injected.SFT)
SHAPED = tl.constexpr(Injected.SHAPED)


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def ratio_part(log_ratio, A, low, high, rule):
    """A token's part in its sequence's log ratio, and whether it moves with the token's."""
    if rule.objective == GEOMETRIC:
        is_high = (A > 0) & (log_ratio > high)
        is_low = (A < 0) & (log_ratio < low)
        part = tl.where(is_high, high, tl.where(is_low, low, log_ratio))
        return tl.where(A == 0, 0.0, part), (A != 0) & ~is_high & ~is_low
    else:
        return log_ratio, A == A


@triton.jit
def policy(log_ratio, A, logprob, low, high, rule):
    """(term, derivative by the logprob, by the log ratio, ratio, clipped low, clipped high).

    ``low`` and ``high`` are the bounds of the ratio; for CISPO ``high`` is its cap, for GEOMETRIC they are those of a
    token's log ratio.
    """
    ratio = exp(tl.where(log_ratio > MAX_RATIO_LOG, MAX_RATIO_LOG, log_ratio))
    if rule.objective == CISPO:
        direct = -tl.where(ratio > high, high, ratio) * A
        is_high = (ratio > high) & (A > 0)
        never = is_high & (A < 0)
        term = tl.where(A == 0, 0.0, direct * logprob)  # not 0 * inf where the token is forbidden
        return term, direct, tl.zeros_like(direct), ratio, never, is_high
    elif rule.objective == WEIGHTED:
        term = tl.where(A == 0, 0.0, -A * logprob)
        never = (A > 0) & (A < 0)
        return term, -A, tl.zeros_like(term), ratio, never, never
    elif rule.objective == GEOMETRIC:
        term = -A * ratio
        never = (A > 0) & (A < 0)  # contribution() knows which
        return term, tl.zeros_like(term), tl.where(log_ratio > MAX_RATIO_LOG, 0.0, term), ratio, never, never
    elif rule.objective == SAPO:
        slope = tl.where(A > 0, rule.sapo_temperature_pos, rule.sapo_temperature_neg)
        x = slope * (ratio - 1)
        power = exp(-tl.abs(x))
        gate = 1 / (1 + power)  # of |x|
        term = -A * 4 / slope * tl.where(x < 0, power * gate, gate)
        through = tl.where(log_ratio > MAX_RATIO_LOG, 0.0, -A * 4 * ratio * power * gate * gate)
        never = (A > 0) & (A < 0)
        return term, tl.zeros_like(term), through, ratio, never, never
    else:
        unclipped = tl.where(ratio > rule.delta, rule.delta, ratio)
        clipped = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
        moves_unclipped = tl.where(ratio <= rule.delta, 1.0, 0.0)
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
def sampler_factor(difference, rule):
    """The correction for a sampler whose log-probabilities are off by ``difference``; NaN is unknown, and is 1."""
    floor = rule.sampler_floor
    cap = rule.sampler_cap
    ratio = exp(tl.where(difference == difference, difference, 0.0))
    if rule.sampler_masks:
        return tl.where((ratio < floor) | (ratio > cap), 0.0, ratio)
    else:
        return tl.where(ratio < floor, floor, tl.where(ratio > cap, cap, ratio))


@triton.jit
def recorded_logprob(terms, at, own, lp):
    """The logprob that the ratio's denominator has, and whether there is a record of it."""
    if terms.old_logprobs is not None:
        old = tl.load(terms.old_logprobs + at, mask=own, other=0.0)
        return tl.where(old == old, old, lp), own & (old == old)
    else:
        return lp, own


@triton.jit
def contribution(terms, rule, low, high, at, own, lp, h, threshold, sequence_log_ratio, sequence_difference):
    """(term, direct, through, acting, ratio, clipped low, clipped high, KL, its bound hit, sampler's factor) of tokens.

    Of those ``at`` some place, where they are a sequence's ``own``; a term's derivatives are by the logprob and by the
    log ratio. ``sequence_log_ratio`` and ``sequence_difference`` are None where each token has its own.
    """
    A = tl.load(terms.advantages + at, mask=own, other=0.0)
    old, _ = recorded_logprob(terms, at, own, lp)
    log_ratio = tl.zeros_like(lp)
    if sequence_log_ratio is not None:
        log_ratio += sequence_log_ratio
    elif terms.old_logprobs is not None:
        log_ratio = tl.where(old == lp, 0.0, lp - old)  # without a record too, where lp may be -inf
    term, direct, through, ratio, is_low, is_high = policy(log_ratio, A, lp, low, high, rule)
    if rule.objective == GEOMETRIC:
        _, moves = ratio_part(tl.where(old == lp, 0.0, lp - old), A, low, high, rule)
        is_low = ~moves & (A < 0)
        is_high = ~moves & (A > 0)
    if terms.injected is not None:
        injected = own & tl.load(terms.injected + at, mask=own, other=0).to(tl.int1)
        if rule.injected == SHAPED:
            p = exp(lp)
            gamma = rule.shaped_gamma
            term = tl.where(injected, -A * p / (p + gamma), term)
            direct = tl.where(injected, -A * gamma * p / ((p + gamma) * (p + gamma)), direct)
            through = tl.where(injected, 0.0, through)
    acting = own
    if terms.entropy_threshold is not None:
        acting = own & ((h >= threshold) | (h != h))  # NaN acts, and so is seen
    scale = tl.where(acting, 1.0, 0.0)
    factor = tl.zeros_like(lp) + 1.0
    if terms.sampling_logprobs is not None:
        difference = sequence_difference
        if sequence_difference is None:
            difference = old - tl.load(terms.sampling_logprobs + at, mask=own, other=0.0)
        factor = sampler_factor(tl.zeros_like(lp) + difference, rule)
        scale = scale * factor
    elif terms.sampler_ratio is not None:
        factor = tl.load(terms.sampler_ratio + at, mask=own, other=0.0)
        scale = scale * factor
    term = term * scale
    direct = direct * scale
    through = through * scale
    if terms.injected is not None and rule.injected == SFT:
        term = tl.where(injected, -rule.sft_weight * lp, term)
        direct = tl.where(injected, -rule.sft_weight, direct)
        through = tl.where(injected, 0.0, through)
    kl = tl.zeros_like(lp)
    is_bounded = own & (lp != lp) & (lp == lp)
    if terms.ref_logprobs is not None:
        d = tl.load(terms.ref_logprobs + at, mask=own, other=0.0) - lp
        is_bounded = own & (d > MAX_KL_LOG)
        bounded = tl.where(d > MAX_KL_LOG, MAX_KL_LOG, d)  # exp continues as its tangent there
        power = exp(bounded)
        share = ratio if rule.bias_corrects_kl else tl.zeros_like(lp) + 1.0
        kl = share * (power - bounded - 1 + (power - 1) * tl.where(d > MAX_KL_LOG, d - MAX_KL_LOG, 0.0))
        if rule.beta is not None:
            term = term + rule.beta * kl
            direct = direct + rule.beta * share * (1 - power)
            if rule.bias_corrects_kl:
                through = through + tl.where(log_ratio > MAX_RATIO_LOG, 0.0, rule.beta * kl)
    return term, direct, through, acting, ratio, is_low, is_high, kl, is_bounded, factor


@triton.jit
def token_loss_kernel(
    logprobs,  # (num_tokens), float32
    entropy,
    terms,  # TokenTerms, (num_tokens) or () each, float32 or bool
    d_logprobs,
    d_entropy,
    sums,  # (programs, SUMS): the loss, then METRICS
    num_tokens,
    length,  # tokens of a program: a sequence, where anything is of sequences
    rule,
    low,
    high,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    base = program.to(tl.int64) * length
    offsets = tl.arange(0, BLOCK)
    threshold = tl.load(terms.entropy_threshold) if terms.entropy_threshold is not None else 0.0
    bonus = tl.load(terms.bonus_weight) if terms.bonus_weight is not None else 0.0
    HAS_FACTOR: tl.constexpr = terms.sampling_logprobs is not None or terms.sampler_ratio is not None

    sequence_log_ratio = None
    sequence_difference = None
    if rule.ratio_of_sequence or (terms.sampling_logprobs is not None and rule.sampler_of_sequence):
        total_ratio = tl.zeros((BLOCK,), tl.float32)
        total_recorded = tl.zeros((BLOCK,), tl.float32)
        total_difference = tl.zeros((BLOCK,), tl.float32)
        for i in range(0, length, BLOCK):  # what the whole sequence says, first
            at = base + i + offsets
            here = i + offsets < length
            own = here & tl.load(terms.mask + at, mask=here, other=0).to(tl.int1)
            lp = tl.load(logprobs + at, mask=own, other=0.0)
            old, recorded = recorded_logprob(terms, at, own, lp)
            A = tl.load(terms.advantages + at, mask=own, other=0.0)
            part, _ = ratio_part(tl.where(old == lp, 0.0, lp - old), A, low, high, rule)
            total_ratio += tl.where(recorded, part, 0.0)
            total_recorded += tl.where(recorded, 1.0, 0.0)
            if terms.sampling_logprobs is not None:
                difference = old - tl.load(terms.sampling_logprobs + at, mask=own, other=0.0)
                total_difference += tl.where(own & (difference == difference), difference, 0.0)
        if rule.ratio_of_sequence:
            recorded_tokens = tl.maximum(tl.sum(total_recorded, 0), 1.0)
            sequence_log_ratio = tl.sum(total_ratio, 0) / recorded_tokens
        if rule.sampler_of_sequence:
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
    num_bounded = tl.zeros((BLOCK,), tl.float32)
    factor_sum = tl.zeros((BLOCK,), tl.float32)
    factor_max = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, length, BLOCK):
        at = base + i + offsets
        here = (i + offsets < length) & (at < num_tokens)
        own = here & tl.load(terms.mask + at, mask=here, other=0).to(tl.int1)
        lp = tl.load(logprobs + at, mask=own, other=0.0)
        h = tl.load(entropy + at, mask=own, other=0.0)
        w = tl.load(terms.weight + at, mask=own, other=0.0)
        term, direct, through, acting, ratio, is_low, is_high, kl, is_bounded, factor = contribution(
            terms, rule, low, high, at, own, lp, h, threshold, sequence_log_ratio, sequence_difference
        )
        loss = w * term
        if terms.bonus_weight is not None:
            loss -= tl.where(acting, bonus * h, 0.0)
        through = tl.where(own, w * through, 0.0)
        derivative = tl.where(own, w * direct, 0.0)
        if not rule.ratio_of_sequence:
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
        num_bounded += tl.where(own & is_bounded, 1.0, 0.0)
        if HAS_FACTOR:
            factor_sum += tl.where(own, factor, 0.0)
            factor_max = nan_max(factor_max, tl.where(own, factor, 0.0))

    if rule.ratio_of_sequence:  # every token of the sequence that is not clipped moves the one ratio by 1 / length
        each = tl.sum(total_through, 0) / recorded_tokens
        tl.debug_barrier()  # another thread may have written what this one adds to
        for i in range(0, length, BLOCK):
            at = base + i + offsets
            here = i + offsets < length
            own = here & tl.load(terms.mask + at, mask=here, other=0).to(tl.int1)
            derivative = tl.load(d_logprobs + at, mask=here, other=0.0)
            lp = tl.load(logprobs + at, mask=own, other=0.0)
            old, recorded = recorded_logprob(terms, at, own, lp)
            A = tl.load(terms.advantages + at, mask=own, other=0.0)
            _, moves = ratio_part(tl.where(old == lp, 0.0, lp - old), A, low, high, rule)
            tl.store(d_logprobs + at, derivative + tl.where(recorded & moves, each, 0.0), mask=here)

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
    tl.store(out + 9, tl.sum(num_bounded, 0))
    tl.store(out + 10, tl.sum(factor_sum, 0))
    tl.store(out + 11, tl.reduce(factor_max, 0, nan_max))


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


def rule_arguments(rule: LossRule) -> dict[str, Any]:
    """Return the rule as kernels take it: what is no float is constant, a beta of 0 is None; and the ratio's bounds."""
    fields: dict[str, Any] = {n: x if isinstance(x, float) else tl.constexpr(x) for n, x in rule._asdict().items()}
    fields["beta"] = rule.beta or None
    low, high = 1 - rule.epsilon_low, 1 + rule.epsilon_high
    if rule.objective == Objective.CISPO:
        high = rule.epsilon_high
    if rule.objective == Objective.GEOMETRIC:
        low, high = -rule.epsilon_low, rule.epsilon_high
    return {"rule": LossRule(**fields), "low": low, "high": high}


@on_its_device
def token_loss(logprobs: Tensor, entropy: Tensor, terms: TokenTerms, rule: LossRule) -> TokenLoss:
    shape, num_tokens = logprobs.shape, logprobs.numel()
    of_sequences = rule.ratio_of_sequence or (terms.sampling_logprobs is not None and rule.sampler_of_sequence)
    length = shape[-1] if of_sequences else BLOCK
    programs = -(-num_tokens // max(length, 1))
    block = min(BLOCK, max(16, triton.next_power_of_2(length)))
    d_logprobs, d_entropy = (torch.empty(shape, dtype=torch.float32, device=logprobs.device) for _ in range(2))
    sums = torch.empty(programs, int(SUMS), dtype=torch.float32, device=logprobs.device)
    loss, metrics = logprobs.new_empty((), dtype=torch.float32), sums.new_empty(len(METRICS))
    if programs > 0:
        token_loss_kernel[(programs,)](
            logprobs.float().contiguous(), entropy.float().contiguous(), packed(terms), d_logprobs, d_entropy, sums,
            num_tokens, length, **rule_arguments(rule), BLOCK=block, **LAUNCH,
        )  # fmt: skip
    token_loss_sum_kernel[(1,)](
        sums, loss, metrics, programs, NUM_METRICS=len(METRICS), RATIO_MAX=1 + METRICS.index("ratio_max"),
        FACTOR_MAX=1 + METRICS.index("sampler_ratio_max"), BLOCK=64, **LAUNCH,
    )  # fmt: skip
    return TokenLoss(loss, metrics, d_logprobs, d_entropy)
