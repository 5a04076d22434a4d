"""From a token's statistics to its loss and the loss's derivatives by them: O(N) arithmetic, once for every op.

Here is the mathematics of all loss variants (the readable form: reference.py); what a batch's masks, totals and options
make of it is grpo_loss.py's. The derivatives are written out, because a sweep over tiles needs them inside an op, where
autograd does not reach, and because a kernel will compute the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edge_kernels.backend import kernels
from edge_kernels.config import GRPOLossConfig
from edge_kernels.reference import MAX_LOG_RATIO, k3

# The entries of the metrics vector. Those ending in _max combine by the maximum, the others by addition.
METRICS = (
    "tokens",
    "entropy_sum",
    "ratio_sum",
    "ratio_max",
    "clip_low",
    "clip_high",
    "clip_region",
    "kl_sum",
    "sampler_ratio_sum",
    "sampler_ratio_max",
)


class LossRule(NamedTuple):
    """The part of ``GRPOLossConfig`` that acts on a single token, as an op's trailing arguments."""

    loss_type: str
    level: str
    epsilon_low: float
    epsilon_high: float
    delta: float | None
    beta: float
    sampler_cap: float | None
    sampler_floor: float
    sampler_mode: str
    injected: str
    sft_weight: float
    shaped_gamma: float

    @classmethod
    def of(cls, config: GRPOLossConfig) -> LossRule:
        return cls(
            loss_type=config.loss_type,
            level=config.importance_sampling_level,
            epsilon_low=float(config.epsilon_low),
            epsilon_high=float(config.epsilon_high),
            delta=None if config.delta is None else float(config.delta),
            beta=float(config.beta),
            sampler_cap=None if config.sampler_ratio_cap is None else float(config.sampler_ratio_cap),
            sampler_floor=float(config.sampler_ratio_floor),
            sampler_mode=config.sampler_ratio_mode,
            injected=config.injected,
            sft_weight=float(config.sft_weight),
            shaped_gamma=float(config.shaped_gamma),
        )

    def for_extension(self) -> dict[str, Any]:
        """Return the rule as the compiled kernels take it; ratios of whole sequences are not among it."""
        infinity = float("inf")
        return {
            "cispo": self.loss_type == "cispo",
            "epsilon_low": self.epsilon_low,
            "epsilon_high": self.epsilon_high,
            "delta": infinity if self.delta is None else self.delta,
            "beta": self.beta,
            "sampler_cap": infinity if self.sampler_cap is None else self.sampler_cap,
            "sampler_floor": self.sampler_floor,
            "sampler_masks": self.sampler_mode.endswith("mask"),
            "injected_treatment": {"sft": 1, "shaped": 2}.get(self.injected, 0),
            "sft_weight": self.sft_weight,
            "shaped_gamma": self.shaped_gamma,
            "max_log_ratio": MAX_LOG_RATIO,
        }


class TokenTerms(NamedTuple):
    """What the loss of each token depends on besides its statistics. Per-token tensors have one shape.

    That shape is (B, T); where every quantity is the token's own (no ratio of whole sequences), any selection of
    tokens, (n,), gives that selection's part of the sum.
    """

    mask: Tensor  # bool: tokens that have a loss
    weight: Tensor  # 1 / normalizer; the loss is the weighted sum
    advantages: Tensor
    old_logprobs: Tensor | None  # NaN where there is no record; None: the current ones
    ref_logprobs: Tensor | None
    sampler_ratio: Tensor | None  # the correction factor, where it is known beforehand
    sampling_logprobs: Tensor | None  # else what it is made from, with the current logprobs
    injected: Tensor | None  # bool: tokens to treat as ``LossRule.injected`` says
    entropy_threshold: Tensor | None  # (): tokens below it have no policy gradient
    bonus_weight: Tensor | None  # (): entropy coefficient / number of tokens it acts on

    def select(self, rows: Tensor) -> TokenTerms:
        """Return the terms of some rows, where the per-token tensors have shape (N,)."""
        return self._map(lambda value: value[rows])

    def flatten(self) -> TokenTerms:
        """Return the same with per-token tensors of shape (N,)."""
        return self._map(torch.flatten)

    def _map(self, function: Callable[[Tensor], Tensor]) -> TokenTerms:
        per_token = {name: value for name, value in self._asdict().items() if value is not None and value.dim()}
        return self._replace(**{name: function(value) for name, value in per_token.items()})


class TokenLoss(NamedTuple):
    """The weighted sum of token losses, its metrics, and its derivatives by each token's logprob and entropy."""

    loss: Tensor  # ()
    metrics: Tensor  # (len(METRICS),)
    d_logprobs: Tensor
    d_entropy: Tensor


def token_loss(logprobs: Tensor, entropy: Tensor, terms: TokenTerms, rule: LossRule) -> TokenLoss:
    """Return loss, metrics and derivatives of tokens with these log-probabilities and entropies (nats)."""
    mask, A = terms.mask, terms.advantages
    logprobs, entropy = logprobs.masked_fill(~mask, 0), entropy.masked_fill(~mask, 0)

    # The importance ratio; a token without a record has ratio 1 to its own present value.
    unknown = torch.zeros_like(mask) if terms.old_logprobs is None else terms.old_logprobs.isnan()
    old = logprobs if terms.old_logprobs is None else torch.where(unknown, logprobs, terms.old_logprobs)
    recorded = mask & ~unknown
    log_ratio = (logprobs - old).masked_fill(~mask, 0)
    lengths = recorded.sum(-1, keepdim=True).clamp(min=1) if rule.level == "sequence" else None
    if lengths is not None:
        log_ratio = log_ratio.masked_fill(~recorded, 0).sum(-1, keepdim=True) / lengths  # (B, 1)
    log_ratio = log_ratio.expand_as(mask)
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()

    # The policy term; its derivative is ``direct`` by the logprob itself, ``through_ratio`` by the log ratio.
    low = high = torch.zeros_like(mask)
    if rule.loss_type == "cispo":
        capped = ratio.clamp(max=rule.epsilon_high)
        policy, direct, through_ratio = -capped * A * logprobs, -capped * A, torch.zeros_like(logprobs)
        high = (ratio > rule.epsilon_high) & (A > 0)
    else:
        policy, through_ratio, low, high = _clipped(ratio, A, rule)
        through_ratio = through_ratio.masked_fill(log_ratio > MAX_LOG_RATIO, 0)
        direct = torch.zeros_like(policy)
    if rule.injected == "shaped" and terms.injected is not None:
        p, gamma = logprobs.exp(), rule.shaped_gamma
        policy = torch.where(terms.injected, -A * p / (p + gamma), policy)
        direct = torch.where(terms.injected, -A * gamma * p / (p + gamma).square(), direct)
        through_ratio = through_ratio.masked_fill(terms.injected, 0)

    factor, acting = terms.sampler_ratio, mask
    if terms.sampling_logprobs is not None:
        factor = sampler_correction(old, terms.sampling_logprobs, mask, rule)
    if terms.entropy_threshold is not None:
        acting = mask & ~(entropy < terms.entropy_threshold)  # NaN acts, and so is seen
        policy, direct, through_ratio = policy * acting, direct * acting, through_ratio * acting
    if factor is not None:
        policy, direct, through_ratio = policy * factor, direct * factor, through_ratio * factor
    if rule.injected == "sft" and terms.injected is not None:
        policy = torch.where(terms.injected, -rule.sft_weight * logprobs, policy)
        direct = direct.masked_fill(terms.injected, -rule.sft_weight)
        through_ratio = through_ratio.masked_fill(terms.injected, 0)
    kl = None if terms.ref_logprobs is None else k3(terms.ref_logprobs, logprobs).masked_fill(~mask, 0)
    if rule.beta > 0 and kl is not None and terms.ref_logprobs is not None:
        policy = policy + rule.beta * kl
        direct = direct + rule.beta * (1 - (terms.ref_logprobs - logprobs).exp())

    loss = (terms.weight * policy).masked_fill(~mask, 0).sum()
    d_logprobs = (terms.weight * direct).masked_fill(~mask, 0)
    through_ratio = (terms.weight * through_ratio).masked_fill(~mask, 0)
    if lengths is None:
        d_logprobs = d_logprobs + through_ratio
    else:  # every token of the sequence moves the one ratio by 1 / length
        d_logprobs = d_logprobs + recorded * (through_ratio.sum(-1, keepdim=True) / lengths)
    d_entropy = torch.zeros_like(d_logprobs)
    if terms.bonus_weight is not None:
        loss = loss - terms.bonus_weight * entropy.masked_fill(~acting, 0).sum()
        d_entropy = -terms.bonus_weight * acting

    metrics = _metrics(mask, entropy, ratio, low, high, kl, factor)
    return TokenLoss(loss, metrics.to(loss.dtype), d_logprobs, d_entropy)


def run_token_loss(logprobs: Tensor, entropy: Tensor, terms: TokenTerms, rule: LossRule) -> TokenLoss:
    """Return ``token_loss`` of real (not fake) tensors by the backend that serves them."""
    return kernels(logprobs).token_loss(logprobs, entropy, terms, rule)


def _clipped(ratio: Tensor, A: Tensor, rule: LossRule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the clipped objective, its derivative by the log ratio, and which tokens are clipped low and high."""
    floor, ceiling = 1 - rule.epsilon_low, 1 + rule.epsilon_high
    unclipped, moves_unclipped = ratio, torch.ones_like(ratio)
    if rule.delta is not None:
        unclipped, moves_unclipped = ratio.clamp(max=rule.delta), (ratio <= rule.delta).to(ratio.dtype)
    clipped, moves_clipped = ratio.clamp(floor, ceiling), ((ratio >= floor) & (ratio <= ceiling)).to(ratio.dtype)
    # The lesser of the two counts; where they are equal autograd gives each one half, and so does this.
    first, second = unclipped * A, clipped * A
    moves = torch.where(first < second, moves_unclipped, moves_clipped)
    moves = torch.where(first == second, (moves_unclipped + moves_clipped) / 2, moves)
    low, high = (unclipped < floor) & (A < 0), (unclipped > ceiling) & (A > 0)
    return -torch.minimum(first, second), -A * moves * ratio, low, high


def sampler_correction(logprobs: Tensor, sampling_logprobs: Tensor, mask: Tensor, rule: LossRule) -> Tensor:
    """Return the factor that makes up for the sampler's probabilities not being the trainer's, in the mask's shape.

    exp(logprobs - sampling_logprobs), of a token or of a whole sequence, truncated to or masked outside [floor, cap]. A
    token without a record (NaN) changes nothing.
    """
    difference = (logprobs - sampling_logprobs).masked_fill(~mask, 0).nan_to_num(nan=0.0)
    if rule.sampler_mode.startswith("sequence"):
        difference = difference.sum(-1, keepdim=True).expand_as(mask)
    ratio = difference.exp()
    if rule.sampler_mode.endswith("truncate"):
        return ratio.clamp(rule.sampler_floor, rule.sampler_cap)
    outside = (ratio < rule.sampler_floor) | (ratio > (float("inf") if rule.sampler_cap is None else rule.sampler_cap))
    return ratio.masked_fill(outside, 0)


def _metrics(
    mask: Tensor, entropy: Tensor, ratio: Tensor, low: Tensor, high: Tensor, kl: Tensor | None, factor: Tensor | None
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
        "sampler_ratio_sum": factor,
    }
    greatest = {"ratio_max": ratio, "sampler_ratio_max": factor}
    values = {name: value.sum().to(ratio.dtype) for name, value in sums.items()}
    for name, value in greatest.items():
        values[name] = value.max() if value.numel() else value.sum()
    return torch.stack([values[name] for name in METRICS])


# --- op and autograd --------------------------------------------------------------------------------------------------


@torch.library.custom_op("edge_kernels::token_loss", mutates_args=())
def token_loss_op(
    logprobs: Tensor,
    entropy: Tensor,
    mask: Tensor,
    weight: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    sampler_ratio: Tensor | None,
    sampling_logprobs: Tensor | None,
    injected: Tensor | None,
    entropy_threshold: Tensor | None,
    bonus_weight: Tensor | None,
    loss_type: str,
    level: str,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None,
    beta: float,
    sampler_cap: float | None,
    sampler_floor: float,
    sampler_mode: str,
    injected_treatment: str,
    sft_weight: float,
    shaped_gamma: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    terms = TokenTerms(
        mask,
        weight,
        advantages,
        old_logprobs,
        ref_logprobs,
        sampler_ratio,
        sampling_logprobs,
        injected,
        entropy_threshold,
        bonus_weight,
    )
    clip = (loss_type, level, epsilon_low, epsilon_high, delta, beta)
    rule = LossRule(*clip, sampler_cap, sampler_floor, sampler_mode, injected_treatment, sft_weight, shaped_gamma)
    return run_token_loss(logprobs, entropy, terms, rule)


@token_loss_op.register_fake
def _(logprobs: Tensor, entropy: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = logprobs.shape
    return logprobs.new_empty(()), logprobs.new_empty(len(METRICS)), logprobs.new_empty(shape), entropy.new_empty(shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, metrics, d_logprobs, d_entropy = output
    ctx.save_for_backward(d_logprobs, d_entropy)
    ctx.mark_non_differentiable(metrics, d_logprobs, d_entropy)
    ctx.set_materialize_grads(False)
    ctx.has_bonus = inputs[2 + TokenTerms._fields.index("bonus_weight")] is not None
    ctx.num_inputs = len(inputs)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    none = (None,) * ctx.num_inputs
    if grad_loss is None:
        return none
    d_logprobs, d_entropy = ctx.saved_tensors
    # Without a bonus the entropy has no gradient at all, which spares the kernel its part.
    return grad_loss * d_logprobs, grad_loss * d_entropy if ctx.has_bonus else None, *none[2:]


token_loss_op.register_autograd(_backward, setup_context=_setup_context)
