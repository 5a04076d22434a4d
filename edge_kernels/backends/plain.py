"""The backend "reference": the contract (contract.py) in plain PyTorch, on any device and in any dtype.

Its ``token_loss`` is the specification of a token's loss and of its derivatives, which are written out: a sweep over
tiles needs them inside an op, where autograd does not reach. The same in a readable form, for whole batches and by
autograd: reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edge_kernels import reference
from edge_kernels.contract import (
    METRICS,
    Injected,
    KernelStats,
    LossRule,
    Objective,
    StatsGradients,
    TokenLoss,
    TokenTerms,
    Transform,
)
from edge_kernels.reference import MAX_KL_LOG_RATIO, MAX_LOG_RATIO, k3
from edge_kernels.sequences import ROWS, Sequences


def token_stats_forward(logits: Tensor, targets: Tensor | None, transform: Transform) -> KernelStats:
    stats = reference.token_stats(logits, targets, **transform._asdict())
    logprobs, entropy, logsumexp = (value.contiguous() for value in stats)
    options = transform._asdict()
    ignore_index = options.pop("ignore_index")
    z = reference.transform_logits(logits, **options)
    if targets is not None:
        z = z.masked_fill((targets == ignore_index)[..., None], 0)
    maximum = z.amax(-1)
    total = (z - maximum[..., None].masked_fill(maximum[..., None] == -torch.inf, 0)).exp().sum(-1)
    return KernelStats(logprobs, entropy, logsumexp, maximum, total)


def units_per_nat(transform: Transform, device: torch.device) -> tuple[float, float]:
    return 1.0, 1.0


def token_stats_backward(
    logits: Tensor,
    targets: Tensor | None,
    stats: KernelStats,
    gradients: StatsGradients,
    transform: Transform,
    *,
    out: Tensor,
) -> None:
    of_row = (stats.entropy, stats.maximum, stats.total)
    out.copy_(reference.token_stats_backward(logits, targets, *gradients, **transform._asdict(), of_row=of_row))


def grpo_sweep(
    logits: Tensor, targets: Tensor, terms: TokenTerms, rule: LossRule, transform: Transform, *, out: Tensor
) -> tuple[Tensor, Tensor]:
    stats = token_stats_forward(logits, targets, transform)
    part = token_loss(stats.logprobs, stats.entropy, terms, rule)
    token_stats_backward(logits, targets, stats, part.gradients(terms), transform, out=out)
    return stats.logprobs, stats.entropy


def token_loss(
    logprobs: Tensor, entropy: Tensor, terms: TokenTerms, rule: LossRule, sequences: Sequences = ROWS
) -> TokenLoss:
    """Return loss, metrics and derivatives of tokens with these log-probabilities and entropies (nats).

    Of tokens split over processes the derivatives are those of the whole loss, loss and metrics this process's part.
    """
    mask, A = terms.mask, terms.advantages
    logprobs, entropy = logprobs.masked_fill(~mask, 0), entropy.masked_fill(~mask, 0)

    # The importance ratio; a token without a record has ratio 1 to its own present value, even where that is -inf.
    has_record = torch.zeros_like(mask) if terms.old_logprobs is None else ~terms.old_logprobs.isnan()
    old = logprobs if terms.old_logprobs is None else torch.where(has_record, terms.old_logprobs, logprobs)
    recorded = mask if terms.old_logprobs is None else mask & has_record
    log_ratio = (logprobs - old).masked_fill(~(mask & has_record), 0)
    part, moves = log_ratio, recorded
    if rule.objective == Objective.GEOMETRIC:
        part, moves = _clipped_part(log_ratio, A, rule)
        moves = moves & recorded
    lengths = None
    if rule.ratio_of_sequence:
        total, lengths = sequences.sums(part, recorded)
        lengths = lengths.clamp(min=1)
        log_ratio = sequences.spread(total / lengths)
    log_ratio = log_ratio.expand_as(mask)
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()

    policy, direct, through_ratio, low, high = _policy_term(ratio, log_ratio, A, logprobs, rule)
    if rule.objective == Objective.GEOMETRIC:
        low, high = recorded & ~moves & (A < 0), recorded & ~moves & (A > 0)
    if rule.injected == Injected.SHAPED and terms.injected is not None:
        p, gamma = logprobs.exp(), rule.shaped_gamma
        policy = torch.where(terms.injected, -A * p / (p + gamma), policy)
        direct = torch.where(terms.injected, -A * gamma * p / (p + gamma).square(), direct)
        through_ratio = through_ratio.masked_fill(terms.injected, 0)

    factor, acting = terms.sampler_ratio, mask
    if terms.sampling_logprobs is not None:
        factor = sampler_correction(old, terms.sampling_logprobs, mask, rule, sequences)
    if terms.entropy_threshold is not None:
        acting = mask & ~(entropy < terms.entropy_threshold)  # NaN acts, and so is seen
        policy, direct, through_ratio = policy * acting, direct * acting, through_ratio * acting
    if factor is not None:
        policy, direct, through_ratio = policy * factor, direct * factor, through_ratio * factor
    if rule.injected == Injected.SFT and terms.injected is not None:
        policy = torch.where(terms.injected, -rule.sft_weight * logprobs, policy)
        direct = direct.masked_fill(terms.injected, -rule.sft_weight)
        through_ratio = through_ratio.masked_fill(terms.injected, 0)
    kl = None if terms.ref_logprobs is None else k3(terms.ref_logprobs, logprobs).masked_fill(~mask, 0)
    if kl is not None and rule.bias_corrects_kl:
        kl = kl * ratio
    if rule.beta > 0 and kl is not None and terms.ref_logprobs is not None:
        policy = policy + rule.beta * kl
        share = rule.beta * ratio if rule.bias_corrects_kl else rule.beta
        direct = direct + share * (1 - (terms.ref_logprobs - logprobs).clamp(max=MAX_KL_LOG_RATIO).exp())
        if rule.bias_corrects_kl:
            through_ratio = through_ratio + (rule.beta * kl).masked_fill(log_ratio > MAX_LOG_RATIO, 0)

    loss = (terms.weight * policy).masked_fill(~mask, 0).sum()
    d_logprobs = (terms.weight * direct).masked_fill(~mask, 0)
    through_ratio = (terms.weight * through_ratio).masked_fill(~mask, 0)
    if lengths is None:
        d_logprobs = d_logprobs + through_ratio
    else:  # every token of the sequence moves the one ratio by 1 / length
        (through_sequence,) = sequences.sums(through_ratio)
        d_logprobs = d_logprobs + moves * sequences.spread(through_sequence / lengths)
    d_entropy = torch.zeros_like(d_logprobs)
    if terms.bonus_weight is not None:
        loss = loss - terms.bonus_weight * entropy.masked_fill(~acting, 0).sum()
        d_entropy = -terms.bonus_weight * acting

    bounded = torch.zeros_like(mask)
    if terms.ref_logprobs is not None:
        bounded = mask & (terms.ref_logprobs - logprobs > MAX_KL_LOG_RATIO)
    metrics = _metrics(mask, entropy, ratio, low, high, kl, bounded, factor)
    return TokenLoss(loss, metrics.to(loss.dtype), d_logprobs.contiguous(), d_entropy.contiguous())


def _policy_term(
    ratio: Tensor, log_ratio: Tensor, A: Tensor, logprobs: Tensor, rule: LossRule
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the policy term, its derivatives by the logprob itself and by the log ratio, and what is clipped."""
    zeros = torch.zeros_like(logprobs)
    low = high = torch.zeros_like(A, dtype=torch.bool)
    if rule.objective == Objective.CISPO:
        direct = -ratio.clamp(max=rule.epsilon_high) * A
        policy = torch.where(A == 0, 0, direct * logprobs)  # not 0 * inf where the token is forbidden
        return policy, direct, zeros, low, (ratio > rule.epsilon_high) & (A > 0)
    if rule.objective == Objective.WEIGHTED:
        return torch.where(A == 0, 0, -A * logprobs), -A, zeros, low, high
    if rule.objective == Objective.GEOMETRIC:
        policy = through_ratio = -A * ratio
    elif rule.objective == Objective.SAPO:
        slope = torch.full_like(ratio, rule.sapo_temperature_neg).masked_fill(A > 0, rule.sapo_temperature_pos)
        gate = (slope * (ratio - 1)).sigmoid()
        policy, through_ratio = -A * gate * 4 / slope, -A * gate * (1 - gate) * 4 * ratio
    else:
        policy, through_ratio, low, high = _clipped(ratio, A, rule)
    return policy, zeros, through_ratio.masked_fill(log_ratio > MAX_LOG_RATIO, 0), low, high


def _clipped_part(log_ratio: Tensor, A: Tensor, rule: LossRule) -> tuple[Tensor, Tensor]:
    """Return GMPO's part of each token in its sequence's log ratio, and which of them move with the token's.

    Each is clipped on the side to which its advantage would push it.
    """
    high, low = (A > 0) & (log_ratio > rule.epsilon_high), (A < 0) & (log_ratio < -rule.epsilon_low)
    part = log_ratio.masked_fill(high, rule.epsilon_high).masked_fill(low, -rule.epsilon_low)
    return part.masked_fill(A == 0, 0), ~(high | low | (A == 0))


def _clipped(ratio: Tensor, A: Tensor, rule: LossRule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the clipped objective, its derivative by the log ratio, and which tokens are clipped low and high."""
    floor, ceiling = 1 - rule.epsilon_low, 1 + rule.epsilon_high
    unclipped, moves_unclipped = ratio.clamp(max=rule.delta), (ratio <= rule.delta).to(ratio.dtype)
    clipped, moves_clipped = ratio.clamp(floor, ceiling), ((ratio >= floor) & (ratio <= ceiling)).to(ratio.dtype)
    # The lesser of the two counts; where they are equal autograd gives each one half, and so does this.
    first, second = unclipped * A, clipped * A
    moves = torch.where(first < second, moves_unclipped, moves_clipped)
    moves = torch.where(first == second, (moves_unclipped + moves_clipped) / 2, moves)
    low, high = (unclipped < floor) & (A < 0), (unclipped > ceiling) & (A > 0)
    return -torch.minimum(first, second), -A * moves * ratio, low, high


def sampler_correction(
    logprobs: Tensor, sampling_logprobs: Tensor, mask: Tensor, rule: LossRule, sequences: Sequences = ROWS
) -> Tensor:
    """Return the factor that makes up for the sampler's probabilities not being the trainer's, in the mask's shape.

    exp(logprobs - sampling_logprobs), of a token or of a whole sequence, truncated to or masked outside [floor, cap]. A
    token without a record (NaN) changes nothing.
    """
    difference = (logprobs - sampling_logprobs).masked_fill(~mask, 0).nan_to_num(nan=0.0)
    if rule.sampler_of_sequence:
        difference = sequences.spread(*sequences.sums(difference)).expand_as(mask)
    ratio = difference.exp()
    if not rule.sampler_masks:
        return ratio.clamp(rule.sampler_floor, rule.sampler_cap)
    outside = (ratio < rule.sampler_floor) | (ratio > rule.sampler_cap)
    return ratio.masked_fill(outside, 0)


def _metrics(
    mask: Tensor,
    entropy: Tensor,
    ratio: Tensor,
    low: Tensor,
    high: Tensor,
    kl: Tensor | None,
    bounded: Tensor,
    factor: Tensor | None,
) -> Tensor:
    ratio = ratio.masked_fill(~mask, 0)
    zeros = torch.zeros_like(ratio)
    factor = zeros if factor is None else factor.masked_fill(~mask, 0)
    sums = {
        "tokens": mask,
        "entropy_sum": entropy,
        "ratio_sum": ratio,
        "clip_low": low & mask,
        "clip_high": high & mask,
        "clip_region": (low | high) & mask,
        "kl_sum": zeros if kl is None else kl,
        "kl_bounded": bounded,
        "sampler_ratio_sum": factor,
    }
    greatest = {"ratio_max": ratio, "sampler_ratio_max": factor}
    values = {name: value.sum().to(ratio.dtype) for name, value in sums.items()}
    for name, value in greatest.items():
        values[name] = value.max() if value.numel() else value.sum()
    return torch.stack([values[name] for name in METRICS])
