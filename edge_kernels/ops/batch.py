"""A checked batch of completions: what masks, totals and options make of it, and the loss once statistics are known."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from edge_kernels._checks import IGNORE_INDEX
from edge_kernels.advantages import advantages_of_means, mean_entropy_of, penalized_rewards
from edge_kernels.backends.plain import sampler_correction, token_loss
from edge_kernels.config import GRPOLossConfig
from edge_kernels.contract import METRICS, LossRule, TokenTerms, Transform
from edge_kernels.ops.token_loss import KnownLoss, token_loss_op
from edge_kernels.reference import tokens_above_quantile
from edge_kernels.sequences import Sequences, gamma_weight, geometric_mean, is_on_policy
from edge_kernels.types import GRPOLossOutput, TokenStats

Total = Tensor | float | None


class Batch(NamedTuple):
    """Checked arguments, in the statistics' dtype; ``mask`` is where a loss is taken.

    (B, T) below is (N,) where tokens are packed. It has methods and no properties: torch.compile of torch 2.9 takes a
    property of a named tuple for a tensor.
    """

    config: GRPOLossConfig
    dtype: torch.dtype
    sequences: Sequences
    shape: tuple[int, ...]  # of the tensors per token that were given: (B, T), (N,) or (1, N)
    lengths: Tensor  # (B,), int64: of the tokens in the mask
    targets: Tensor  # (B, T), ignore_index outside the mask
    mask: Tensor  # (B, T)
    advantages: Tensor | None  # (B,) or ``shape``
    rewards: Tensor | None  # (B,)
    group_ids: Tensor | None  # (B,)
    old_logprobs: Tensor | None  # (B, T), as the following four
    ref_logprobs: Tensor | None
    sampler_ratio: Tensor | None
    sampling_logprobs: Tensor | None
    injected: Tensor | None
    temperature: Any  # as ``Transform``'s
    behavior_logprobs: Tensor | None  # (B, T): what the off-policy mask compares with
    masked: dict[str, Tensor]  # the metrics of what a mask has dropped
    num_items: Total
    num_sequences: Total
    entropy_threshold: Tensor | None

    def transform(self) -> Transform:
        config = self.config
        softcap = None if config.softcap is None else float(config.softcap)
        return Transform(self.temperature, softcap, float(config.logit_scale), IGNORE_INDEX)

    def needs_statistics_first(self) -> bool:
        """Whether some token's coefficient depends on other tokens' statistics, so that one sweep is not enough."""
        config = self.config
        counts_high_entropy = config.top_entropy_quantile < 1 and config.entropy_coef != 0 and self.num_items is None
        return (
            self.advantages is None
            or config.importance_sampling_level == "sequence"
            or config.loss_type in ("geo_mean", "vespo")
            or self.behavior_logprobs is not None
            or (config.top_entropy_quantile < 1 and self.entropy_threshold is None)
            or counts_high_entropy
            or (self.sampling_logprobs is not None and config.sampler_ratio_mode.startswith("sequence"))
        )

    def terms(self, advantages: Tensor, stats: TokenStats | None) -> TokenTerms:
        """Return what each token's loss depends on; with ``stats``, also what whole-batch statistics decide."""
        config, mask = self.config, self.mask
        advantages = advantages.to(self.dtype)
        threshold, bonus_weight = self.entropy_threshold, None
        if config.top_entropy_quantile < 1 and threshold is None and stats is not None:
            every = self.sequences.of_all(stats.entropy.detach().masked_fill(~mask, torch.nan))
            threshold = _entropy_threshold(every, config.top_entropy_quantile)
        if config.entropy_coef != 0:
            if self.num_items is not None:
                acting_items = tokens_above_quantile(self.num_items, config.top_entropy_quantile)
            elif threshold is None or stats is None:
                acting_items = self.lengths.sum()
            else:
                acting_items = self.sequences.total(mask & ~(stats.entropy.detach() < threshold))
            acting_items = scalar(acting_items, self.dtype, mask.device)
            bonus_weight = config.entropy_coef / acting_items.clamp(min=1)
        if advantages.shape == self.lengths.shape:
            advantages = self.sequences.spread(advantages).expand(mask.shape)
        else:
            advantages = advantages.view(mask.shape)
        factor, sampling = self.sampler_ratio, self.sampling_logprobs
        is_in_kernel = self.sequences.are_rows() or not config.sampler_ratio_mode.startswith("sequence")
        if stats is not None and (config.loss_type in ("geo_mean", "vespo") or not is_in_kernel):
            factor, sampling = self._factor_of_sequences(advantages, stats.logprobs.detach()), None
        return TokenTerms(
            mask=mask,
            weight=self._loss_weight(),
            advantages=advantages,
            old_logprobs=self.old_logprobs,
            ref_logprobs=self.ref_logprobs,
            sampler_ratio=factor,
            sampling_logprobs=sampling,
            injected=self.injected,
            entropy_threshold=threshold,
            bonus_weight=bonus_weight,
        )

    def _loss_weight(self) -> Tensor:
        """Return what each token's loss is multiplied by before it is summed, (B, T)."""
        config, weight = self.config, self.mask.to(self.dtype)
        sequences = _at_least_one(self.sequences.num_responses if self.num_sequences is None else self.num_sequences)
        items = _at_least_one(self.lengths.sum() if self.num_items is None else self.num_items)
        if config.loss_type in ("grpo", "sapo", "geo_mean"):
            return weight / self.sequences.spread(self.lengths.clamp(min=1)) / sequences
        if config.loss_type == "luspo":
            return weight / sequences
        if config.loss_type == "dr_grpo" and config.max_completion_length is not None:  # the configuration ensures it
            return weight / config.max_completion_length / sequences
        return weight / items

    def _factor_of_sequences(self, advantages: Tensor, logprobs: Tensor) -> Tensor | None:
        """Return what the sampler, "geo_mean" and "vespo" multiply each token's term by, (B, T); None for nothing."""
        old = logprobs if self.old_logprobs is None else self.old_logprobs
        old = torch.where(old.isnan(), logprobs, old)
        factor, loss_type, layout = self.sampler_ratio, self.config.loss_type, self.sequences
        if self.sampling_logprobs is not None:
            factor = sampler_correction(old, self.sampling_logprobs, self.mask, LossRule.of(self.config), layout)
        if loss_type == "vespo":
            return gamma_weight(logprobs - old, factor, advantages, self.mask, self.config, layout).expand_as(self.mask)
        if loss_type == "geo_mean" and factor is not None:
            return geometric_mean(factor, self.mask, layout).expand_as(self.mask)
        return factor


def scalar(value: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a scalar on the device; a number is filled in there, since copying it would wait for the device."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype)
    if torch.compiler.is_compiling():  # a filled-in number would be a constant of the graph, a factor is an input
        return torch.ones((), dtype=dtype, device=device) * value
    return torch.full((), value, dtype=dtype, device=device)


def _at_least_one(total: Tensor | float) -> Tensor | float:
    return total.clamp(min=1) if isinstance(total, Tensor) else max(total, 1)


def _entropy_threshold(entropy: Tensor, share: float) -> Tensor:
    """Return the (1 - share) quantile of the tokens' entropy, NaN for those that do not count, a scalar."""
    if entropy.numel() == 0:
        return entropy.new_zeros(())
    # torch.nanquantile interpolates alike, but refuses more than 2^24 values.
    missing = entropy.isnan()
    ordered = entropy.masked_fill(missing, float("inf")).flatten().sort().values
    count = (~missing).sum()
    position = (count - 1).clamp(min=0).double() * (1 - share)
    below = position.floor().long()
    above = torch.minimum(below + 1, (count - 1).clamp(min=0))
    lower, upper = ordered.index_select(0, torch.stack([below, above])).double().unbind()
    threshold = torch.lerp(lower, upper, position - below)
    return torch.where(count == 0, float("nan"), threshold).to(entropy.dtype)


def counted(name: str, dropped: Tensor, dtype: torch.dtype, sequences: Sequences) -> dict[str, Tensor]:
    """Return how many tokens a mask has dropped, and from how many responses."""
    (tokens,) = sequences.sums(dropped)
    return {f"{name}_tokens": tokens.sum().to(dtype), f"{name}_sequences": (tokens > 0).sum().to(dtype)}


# --- sweeps -----------------------------------------------------------------------------------------------------------


def loss_of_stats(stats: TokenStats, batch: Batch) -> GRPOLossOutput:
    """Return the loss from statistics that carry a gradient: the second half of two sweeps."""
    advantages = batch.advantages
    if advantages is None:
        assert batch.rewards is not None
        assert batch.group_ids is not None
        rewards = batch.rewards.to(batch.dtype)
        if batch.config.reward_kl_coef > 0:
            rewards = _penalized(rewards, stats, batch)
        means = mean_entropy_of(stats.entropy, batch.mask, batch.sequences)
        advantages = advantages_of_means(rewards, means, batch.group_ids, batch.config.eda)
    terms, rule = batch.terms(advantages, stats), LossRule.of(batch.config)
    if batch.behavior_logprobs is not None and batch.config.off_policy_mask_threshold is not None:
        compared = (stats.logprobs.detach(), batch.behavior_logprobs, terms.advantages, batch.mask)
        kept = is_on_policy(*compared, batch.config.off_policy_mask_threshold, batch.sequences)
        if batch.config.loss_type == "geo_mean":  # the sign of an advantage decides a ratio, which the penalty needs
            factor = kept.to(batch.dtype) if terms.sampler_ratio is None else terms.sampler_ratio * kept
            terms = terms._replace(sampler_ratio=factor)
        else:  # without a product, which inf would survive as NaN
            terms = terms._replace(advantages=terms.advantages.masked_fill(~kept, 0))
        dropped = counted("off_policy", batch.mask & ~kept, batch.dtype, batch.sequences)
        batch = batch._replace(masked=batch.masked | dropped)
    if rule.ratio_of_sequence and not batch.sequences.are_rows():
        # A kernel knows whole responses as rows alone. This is O(N), as what sequences.py does.
        known = token_loss(stats.logprobs.detach(), stats.entropy.detach(), terms, rule, batch.sequences)
        loss, metrics = KnownLoss.apply(stats.logprobs, stats.entropy, known, terms.bonus_weight is not None)
    else:
        loss, metrics, _, _ = token_loss_op(stats.logprobs, stats.entropy, terms.pack(), rule.pack())
    return output_of(loss, metrics, stats.logprobs, stats.entropy, advantages, batch)


def _penalized(rewards: Tensor, stats: TokenStats, batch: Batch) -> Tensor:
    """Return the rewards less the KL penalty of the tokens that the policy sampled."""
    assert batch.ref_logprobs is not None
    sampled, logprobs = batch.mask, stats.logprobs.detach()
    if batch.old_logprobs is not None:
        sampled, logprobs = sampled & ~batch.old_logprobs.isnan(), batch.old_logprobs
    config = batch.config
    options: Any = {"coef": config.reward_kl_coef, "estimator": config.reward_kl_penalty, "sequences": batch.sequences}
    return penalized_rewards(rewards, logprobs, batch.ref_logprobs, sampled, **options)


def output_of(
    loss: Tensor, metrics: Tensor, logprobs: Tensor, entropy: Tensor, advantages: Tensor, batch: Batch
) -> GRPOLossOutput:
    if batch.sequences.group is not None:
        loss, metrics = _of_all_processes(loss, metrics, batch.sequences.group)
    named = dict(zip(METRICS, metrics.unbind(), strict=True))
    if batch.ref_logprobs is None:
        del named["kl_sum"], named["kl_bounded"]
    if batch.config.loss_type == "vespo":
        named |= {"phi_sum": named["sampler_ratio_sum"], "phi_max": named["sampler_ratio_max"]}
    if batch.config.sampler_ratio_cap is None or batch.config.loss_type == "vespo":
        del named["sampler_ratio_sum"], named["sampler_ratio_max"]
    named |= batch.masked
    return GRPOLossOutput(
        loss, logprobs.detach().view(batch.shape), entropy.detach().view(batch.shape), advantages, named
    )


class _Whole(torch.autograd.Function):
    """A sum over processes whose gradient is that of this process's part: the derivative of the whole."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, whole: Tensor) -> Tensor:
        return whole.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _of_all_processes(loss: Tensor, metrics: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Return the loss and the metrics of all processes' tokens, in one all-gather."""
    dist = torch.distributed
    own = torch.cat([loss.detach()[None], metrics])
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    every = torch.stack(parts)
    sums, largest = every.double().sum(0).to(own.dtype), every.amax(0)
    is_largest = torch.tensor([False, *(name.endswith("_max") for name in METRICS)], device=own.device)
    whole = torch.where(is_largest, largest, sums)
    return _Whole.apply(loss, whole[0]), whole[1:]
