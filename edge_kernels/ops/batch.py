"""A checked batch of completions: what masks, totals and options make of it, and the loss once statistics are known."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from edge_kernels._checks import IGNORE_INDEX, check_finite, check_like, check_temperature, describe, stats_dtype
from edge_kernels.advantages import advantages_of_checked, kl_penalized_rewards
from edge_kernels.backends.plain import sampler_correction
from edge_kernels.config import GRPOLossConfig
from edge_kernels.contract import METRICS, LossRule, TokenTerms, Transform
from edge_kernels.ops.token_loss import token_loss_op
from edge_kernels.reference import tokens_above_quantile
from edge_kernels.sequences import gamma_weight, geometric_mean, is_on_policy
from edge_kernels.types import GRPOLossOutput, TokenStats

Total = Tensor | float | None


class Batch(NamedTuple):
    """Checked arguments, in the statistics' dtype; ``mask`` is where a loss is taken.

    It has methods and no properties: torch.compile of torch 2.9 takes a property of a named tuple for a tensor.
    """

    config: GRPOLossConfig
    dtype: torch.dtype
    targets: Tensor  # (B, T), ignore_index outside the mask
    mask: Tensor  # (B, T)
    advantages: Tensor | None  # (B,) or (B, T)
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
            threshold = _entropy_threshold(stats.entropy.detach(), mask, config.top_entropy_quantile)
        if config.entropy_coef != 0:
            if self.num_items is not None:
                acting_items = tokens_above_quantile(self.num_items, config.top_entropy_quantile)
            elif threshold is None or stats is None:
                acting_items = mask.sum()
            else:
                acting_items = (mask & ~(stats.entropy.detach() < threshold)).sum()
            acting_items = _scalar(acting_items, self.dtype, mask.device)
            bonus_weight = config.entropy_coef / acting_items.clamp(min=1)
        advantages = (advantages[:, None] if advantages.dim() == 1 else advantages).expand(mask.shape)
        factor, sampling = self.sampler_ratio, self.sampling_logprobs
        if config.loss_type in ("geo_mean", "vespo") and stats is not None:
            factor, sampling = self._factor_of_sequences(advantages, stats.logprobs.detach()), None
        return TokenTerms(
            mask=mask,
            weight=_loss_weight(mask, config, self.num_items, self.num_sequences, self.dtype),
            advantages=advantages,
            old_logprobs=self.old_logprobs,
            ref_logprobs=self.ref_logprobs,
            sampler_ratio=factor,
            sampling_logprobs=sampling,
            injected=self.injected,
            entropy_threshold=threshold,
            bonus_weight=bonus_weight,
        )

    def _factor_of_sequences(self, advantages: Tensor, logprobs: Tensor) -> Tensor | None:
        """Return what "geo_mean" and "vespo" multiply each token's term by, (B, T); None for nothing."""
        old = logprobs if self.old_logprobs is None else self.old_logprobs
        old = torch.where(old.isnan(), logprobs, old)
        factor = self.sampler_ratio
        if self.sampling_logprobs is not None:
            factor = sampler_correction(old, self.sampling_logprobs, self.mask, LossRule.of(self.config))
        if self.config.loss_type == "vespo":
            return gamma_weight(logprobs - old, factor, advantages, self.mask, self.config).expand(self.mask.shape)
        return None if factor is None else geometric_mean(factor, self.mask).expand(self.mask.shape)


def _scalar(value: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a scalar on the device; a number is filled in there, since copying it would wait for the device."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype)
    if torch.compiler.is_compiling():  # a filled-in number would be a constant of the graph, a factor is an input
        return torch.ones((), dtype=dtype, device=device) * value
    return torch.full((), value, dtype=dtype, device=device)


def _at_least_one(total: Tensor | float) -> Tensor | float:
    return total.clamp(min=1) if isinstance(total, Tensor) else max(total, 1)


def _loss_weight(
    mask: Tensor, config: GRPOLossConfig, num_items: Total, num_sequences: Total, dtype: torch.dtype
) -> Tensor:
    """Return what each token's loss is multiplied by before it is summed, (B, T)."""
    sequences = _at_least_one(mask.shape[0] if num_sequences is None else num_sequences)
    items = _at_least_one(mask.sum() if num_items is None else num_items)
    weight = mask.to(dtype)
    if config.loss_type in ("grpo", "sapo", "geo_mean"):
        return weight / mask.sum(-1, keepdim=True).clamp(min=1) / sequences
    if config.loss_type == "luspo":
        return weight / sequences
    if config.loss_type == "dr_grpo" and config.max_completion_length is not None:  # the configuration ensures it
        return weight / config.max_completion_length / sequences
    return weight / items


def _entropy_threshold(entropy: Tensor, mask: Tensor, share: float) -> Tensor:
    """Return the (1 - share) quantile of the masked tokens' entropy, a scalar."""
    if entropy.numel() == 0:
        return entropy.new_zeros(())
    # torch.nanquantile interpolates alike, but refuses more than 2^24 values.
    counted = mask & ~entropy.isnan()
    ordered = entropy.masked_fill(~counted, float("inf")).flatten().sort().values
    count = counted.sum()
    position = (count - 1).clamp(min=0).double() * (1 - share)
    below = position.floor().long()
    above = torch.minimum(below + 1, (count - 1).clamp(min=0))
    lower, upper = ordered.index_select(0, torch.stack([below, above])).double().unbind()
    threshold = torch.lerp(lower, upper, position - below)
    return torch.where(count == 0, float("nan"), threshold).to(entropy.dtype)


def _check_credit(advantages: Tensor | None, rewards: Tensor | None, group_ids: Tensor | None, like: Tensor) -> None:
    """Require either advantages, or rewards with their groups."""
    B, T = like.shape[0], like.shape[1]
    if (advantages is None) == (rewards is None):
        raise ValueError(
            f"exactly one of advantages and rewards must be given; got {'neither' if rewards is None else 'both'}; "
            "pass advantages, or rewards with group_ids for entropy-driven advantages"
        )
    if advantages is not None:
        remedy = "pass one advantage per response or per token"
        shapes = {"(B,)": (B,), "(B, T)": (B, T)}
        check_like("advantages", advantages, shapes, "floating point", like, remedy=remedy)
        if group_ids is not None:
            raise ValueError("group_ids belongs to rewards; got it with advantages; leave it out")
    else:
        check_like("rewards", rewards, {"(B,)": (B,)}, "floating point", like, remedy="pass one reward per response")
        remedy = "pass one group number per response; responses to the same prompt share it"
        check_like("group_ids", group_ids, {"(B,)": (B,)}, "int64", like, remedy=remedy)


def _check_total(name: str, total: Total) -> None:
    """Require a positive number, or a scalar tensor, whose value is not read: that might wait for its device."""
    if isinstance(total, Tensor):
        if total.dim():
            raise ValueError(f"{name} must be a number or a scalar tensor; got {describe(total)}; pass its sum")
    elif total is not None and (isinstance(total, bool) or not total > 0):
        raise ValueError(f"{name} must be greater than 0; got {total!r}; pass the count over everything that is summed")


def _check_needs(
    config: GRPOLossConfig,
    ref_logprobs: Tensor | None,
    sampling_logprobs: Tensor | None,
    truncated_mask: Tensor | None,
    rewards: Tensor | None,
) -> None:
    """Require what the configuration has a use for."""
    if config.beta > 0 and ref_logprobs is None:
        raise ValueError(
            f"beta = {config.beta} needs ref_logprobs; got None; score the reference policy, or set beta=0"
        )
    if config.sampler_ratio_cap is not None and sampling_logprobs is None:
        raise ValueError(
            f"sampler_ratio_cap = {config.sampler_ratio_cap} needs sampling_logprobs; got None; "
            "pass the sampler's log-probabilities, or set sampler_ratio_cap=None"
        )
    if config.mask_truncated_completions and truncated_mask is None:
        raise ValueError(
            "mask_truncated_completions=True needs truncated_mask; got None; pass which responses the length limit cut "
            "off, or set mask_truncated_completions=False"
        )
    if config.reward_kl_coef > 0 and (rewards is None or ref_logprobs is None):
        raise ValueError(
            f"reward_kl_coef = {config.reward_kl_coef} needs rewards and ref_logprobs; got "
            f"{'advantages' if rewards is None else 'no ref_logprobs'}; pass both, or form the advantages of "
            "kl_penalized_rewards(...) and set reward_kl_coef=0"
        )


def _counted(name: str, dropped: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return how many tokens a mask has dropped, and from how many responses."""
    return {f"{name}_tokens": dropped.sum().to(dtype), f"{name}_sequences": dropped.any(-1).sum().to(dtype)}


def _masks(
    config: GRPOLossConfig,
    completion_mask: Tensor,
    injected_mask: Tensor | None,
    truncated_mask: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return where a loss is taken, (B, T), and the metrics of what is masked so far."""
    if truncated_mask is not None:
        remedy = "pass which responses the length limit cut off"
        shapes = {"(B,)": tuple(completion_mask.shape[:1])}
        check_like("truncated_mask", truncated_mask, shapes, "bool", completion_mask, remedy=remedy)
    mask, masked = completion_mask, {}
    if config.injected == "mask" and injected_mask is not None:
        mask = mask & ~injected_mask
    if config.mask_truncated_completions and truncated_mask is not None:
        dropped = mask & truncated_mask[:, None]
        mask = mask & ~truncated_mask[:, None]
        masked = _counted("truncated", dropped, dtype)
    if config.off_policy_mask_threshold is not None:  # to be replaced where there is something to compare with
        masked |= _counted("off_policy", torch.zeros_like(mask), dtype)
    return mask, masked


def _check_values(advantages: Tensor | None, rewards: Tensor | None, mask: Tensor) -> None:
    """Require finite advantages where a loss is taken, or finite rewards, as far as ``check_finite`` looks."""
    if advantages is not None:
        counts = mask.any(-1) if advantages.dim() == 1 else mask
        check_finite("advantages", advantages, counts, remedy="leave the response out of completion_mask")
    elif rewards is not None:
        check_finite("rewards", rewards, remedy="leave the response out, or give it a number")


def check_batch(
    like: Tensor,  # logits or hidden states: the batch's shape and device
    dtype: torch.dtype,
    targets: Tensor,
    completion_mask: Tensor,
    config: GRPOLossConfig | None,
    *,
    advantages: Tensor | None,
    rewards: Tensor | None,
    group_ids: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    sampling_logprobs: Tensor | None,
    injected_mask: Tensor | None,
    truncated_mask: Tensor | None,
    temperature: Tensor | float | None,
    num_items: Total,
    num_sequences: Total,
    entropy_threshold: Total,
) -> Batch:
    if config is not None and not isinstance(config, GRPOLossConfig):
        raise TypeError(f"config must be a GRPOLossConfig; got {type(config).__name__}")
    config = config or GRPOLossConfig()
    B, T = like.shape[0], like.shape[1]
    tokens = {"(B, T)": (B, T)}
    remedy = "pass the mask that batching returned"
    check_like("targets", targets, tokens, "int64", like, remedy="pass one token id per position of the completion")
    check_like("completion_mask", completion_mask, tokens, "bool", like, remedy=remedy)

    _check_credit(advantages, rewards, group_ids, like)
    per_token = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "sampling_logprobs": sampling_logprobs}
    for name, value in per_token.items():
        if value is not None:
            check_like(name, value, tokens, "floating point", like, remedy="pass one log-probability per token")
            per_token[name] = value.detach().to(stats_dtype(dtype))
    if injected_mask is not None:
        remedy = "pass the mask of tokens that the policy did not sample"
        check_like("injected_mask", injected_mask, tokens, "bool", like, remedy=remedy)
    _check_needs(config, ref_logprobs, sampling_logprobs, truncated_mask, rewards)
    _check_total("num_items", num_items)
    _check_total("num_sequences", num_sequences)
    if isinstance(entropy_threshold, Tensor) and entropy_threshold.dim():
        raise ValueError(f"entropy_threshold must be a number or a scalar tensor; got {describe(entropy_threshold)}")

    mask, masked = _masks(config, completion_mask, injected_mask, truncated_mask, stats_dtype(dtype))
    _check_values(advantages, rewards, mask)
    old, sampling = per_token["old_logprobs"], per_token["sampling_logprobs"]
    behavior = None
    if config.off_policy_mask_threshold is not None:
        behavior = old if sampling is None else sampling
    sampler_ratio = None
    if config.sampler_ratio_cap is None:
        sampling = None
    elif old is not None and sampling is not None:
        sampler_ratio = sampler_correction(old, sampling, mask, LossRule.of(config))
        sampling = None
    if entropy_threshold is not None:
        entropy_threshold = _scalar(entropy_threshold, stats_dtype(dtype), like.device).detach()
    return Batch(
        config=config,
        dtype=stats_dtype(dtype),
        targets=targets.masked_fill(~mask, IGNORE_INDEX),
        mask=mask,
        advantages=None if advantages is None else advantages.detach(),
        rewards=rewards,
        group_ids=group_ids,
        old_logprobs=old,
        ref_logprobs=per_token["ref_logprobs"],
        sampler_ratio=sampler_ratio,
        sampling_logprobs=sampling,
        injected=injected_mask if config.injected in ("sft", "shaped") else None,
        temperature=float(config.temperature) if temperature is None else check_temperature(temperature, like),
        behavior_logprobs=behavior,
        masked=masked,
        num_items=num_items,
        num_sequences=num_sequences,
        entropy_threshold=entropy_threshold if config.top_entropy_quantile < 1 else None,
    )


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
        advantages = advantages_of_checked(rewards, stats.entropy, batch.mask, batch.group_ids, batch.config.eda)
    terms, rule = batch.terms(advantages, stats), LossRule.of(batch.config)
    if batch.behavior_logprobs is not None and batch.config.off_policy_mask_threshold is not None:
        compared = (stats.logprobs.detach(), batch.behavior_logprobs, terms.advantages, batch.mask)
        kept = is_on_policy(*compared, batch.config.off_policy_mask_threshold)
        if batch.config.loss_type == "geo_mean":  # the sign of an advantage decides a ratio, which the penalty needs
            factor = kept.to(batch.dtype) if terms.sampler_ratio is None else terms.sampler_ratio * kept
            terms = terms._replace(sampler_ratio=factor)
        else:  # without a product, which inf would survive as NaN
            terms = terms._replace(advantages=terms.advantages.masked_fill(~kept, 0))
        batch = batch._replace(masked=batch.masked | _counted("off_policy", batch.mask & ~kept, batch.dtype))
    loss, metrics, _, _ = token_loss_op(stats.logprobs, stats.entropy, terms.pack(), rule.pack())
    return output_of(loss, metrics, stats.logprobs, stats.entropy, advantages, batch)


def _penalized(rewards: Tensor, stats: TokenStats, batch: Batch) -> Tensor:
    """Return the rewards less the KL penalty of the tokens that the policy sampled."""
    assert batch.ref_logprobs is not None
    sampled, logprobs = batch.mask, stats.logprobs.detach()
    if batch.old_logprobs is not None:
        sampled, logprobs = sampled & ~batch.old_logprobs.isnan(), batch.old_logprobs
    config = batch.config
    options: Any = {"coef": config.reward_kl_coef, "estimator": config.reward_kl_penalty}
    return kl_penalized_rewards(rewards, logprobs, batch.ref_logprobs, sampled, **options)


def output_of(
    loss: Tensor, metrics: Tensor, logprobs: Tensor, entropy: Tensor, advantages: Tensor, batch: Batch
) -> GRPOLossOutput:
    named = dict(zip(METRICS, metrics.unbind(), strict=True))
    if batch.ref_logprobs is None:
        del named["kl_sum"], named["kl_bounded"]
    if batch.config.loss_type == "vespo":
        named |= {"phi_sum": named["sampler_ratio_sum"], "phi_max": named["sampler_ratio_max"]}
    if batch.config.sampler_ratio_cap is None or batch.config.loss_type == "vespo":
        del named["sampler_ratio_sum"], named["sampler_ratio_max"]
    named |= batch.masked
    return GRPOLossOutput(loss, logprobs.detach(), entropy.detach(), advantages, named)
