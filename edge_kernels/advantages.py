"""Advantages of whole responses: GRPO's group advantage and EDGE-GRPO's Entropy-Driven Advantage. O(B) and O(N) work.

Groups are named by an id per response: any integers, in any order. Nothing here depends on how responses are sharded or
shuffled, as long as every group is whole in the tensors passed. Vectorized; never waits for the device.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edge_kernels._checks import check_finite, check_float, check_like, stats_dtype
from edge_kernels.config import EDAConfig, KLEstimator, ScaleRewards, _one_of, scale_of
from edge_kernels.reference import SCALE_EPSILON
from edge_kernels.sequences import ROWS, Sequences, kl_estimate, tokens_of


class _Groups(NamedTuple):
    """Responses numbered by group: ``number`` lies in [0, B), so that per-group sums have a static shape."""

    number: Tensor  # (B,)

    def sum(self, values: Tensor) -> Tensor:
        """Return, for each response, the sum of ``values`` over its group, (B,)."""
        return torch.zeros_like(values).index_add(0, self.number, values)[self.number]

    def least(self, values: Tensor) -> Tensor:
        """Return, for each response, the minimum of ``values`` over its group (NaN if any is), (B,)."""
        return torch.zeros_like(values).scatter_reduce(0, self.number, values, "amin", include_self=False)[self.number]


def _groups(group_ids: Tensor) -> _Groups:
    # torch.unique would do, but its output's shape depends on the values, which torch.compile(fullgraph=True) rejects.
    ordered, order = group_ids.sort()
    starts = torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).long()])[: len(ordered)]
    return _Groups(torch.empty_like(order).scatter(0, order, starts.cumsum(0)))


def _check_groups(group_ids: Tensor, like: Tensor) -> None:
    remedy = "pass one group number per response; responses to the same prompt share it"
    check_like("group_ids", group_ids, {"(B,)": (like.shape[0],)}, "int64", like, remedy=remedy)


def _check_config(config: EDAConfig | None) -> EDAConfig:
    if config is not None and not isinstance(config, EDAConfig):
        raise TypeError(f"config must be an EDAConfig; got {type(config).__name__}; pass GRPOLossConfig's .eda")
    return config or EDAConfig()


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    scale_rewards: bool | ScaleRewards = "group",
    batch_rewards: Tensor | None = None,
) -> Tensor:
    """Return the group advantage of each response: ``(r - mean(r)) / (std(r) + 1e-4)`` over its group, (B,).

    Equivalent, for responses ordered by group: ``r = rewards.view(-1, G);
    (r - r.mean(1, True)) / (r.std(1, keepdim=True) + 1e-4)`` (std with Bessel's correction).

    rewards        (B,), floating point, finite: NaN and infinity are refused on a CPU; on a GPU, whose values are not
                   waited for, and in compiled code, they make their whole group NaN.
    group_ids      (B,), int64, any numbers in any order; groups may differ in size and must be whole.
    scale_rewards  whose standard deviation divides: "group" or True, "batch" (one for all rewards), "none" or False.
    batch_rewards  (any,), floating point: all rewards of the batch where these are a part of it, for "batch".

    Exactly 0 throughout a group of equal rewards, and for a group of one response, whose standard deviation is
    undefined. A NaN makes everything NaN under "batch". Rewards may be as large as their dtype allows, if their
    differences are too. float64 for float64 rewards, else float32; no gradient. Raises ValueError or TypeError for
    wrong shapes, dtypes and values. arXiv:2507.21848, eq. 1.
    """
    check_like("rewards", rewards, {"(B,)": tuple(rewards.shape[:1])}, "floating point", rewards, remedy="flatten it")
    for name, values in (("rewards", rewards), ("batch_rewards", batch_rewards)):
        if values is not None:
            check_finite(name, values, remedy="leave the response out, or give it a number")
    return _group_advantages(rewards, group_ids, scale_rewards=scale_rewards, batch_rewards=batch_rewards)


def _group_advantages(
    rewards: Tensor, group_ids: Tensor, *, scale_rewards: bool | ScaleRewards, batch_rewards: Tensor | None = None
) -> Tensor:
    _check_groups(group_ids, rewards)
    scale = scale_of(scale_rewards)
    everyone = rewards if batch_rewards is None else batch_rewards
    everyone = everyone.detach().to(stats_dtype(rewards.dtype))
    rewards = rewards.detach().to(everyone.dtype)
    groups = _groups(group_ids)
    # Relative to the group's minimum, so that equal rewards give exactly 0 however their mean rounds.
    rewards = rewards - groups.least(rewards)
    size = groups.sum(torch.ones_like(rewards))
    centred = rewards - groups.sum(rewards) / size
    if scale == "none":
        return centred
    if scale == "batch":
        count = torch.ones_like(everyone).sum()
        deviations = everyone - everyone.sum() / count
        unit = _unit(deviations.abs().amax()) if everyone.numel() else count
        variance = (deviations / unit).square().sum() / (count - 1).clamp(min=1)
    else:
        unit = _unit(-groups.least(-centred.abs()))
        variance = groups.sum((centred / unit).square()) / (size - 1).clamp(min=1)
    return centred / (unit * variance.sqrt() + SCALE_EPSILON)


def _unit(largest: Tensor) -> Tensor:
    """Return what deviations are divided by before they are squared: squares of 1e20 overflow in float32."""
    return torch.where(largest == 0, 1, largest)


def kl_penalized_rewards(
    rewards: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    completion_mask: Tensor,
    *,
    coef: float,
    estimator: KLEstimator = "k1",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Return the rewards less ``coef`` times the estimated KL divergence to the reference policy, (B,).

    Equivalent: ``rewards - coef * (kl * completion_mask).sum(1)``; verl's ``apply_kl_penalty``, summed over a response.

    rewards          (B,), floating point.
    logprobs         (B, T), floating point: those of the policy that sampled.
    ref_logprobs     (B, T), floating point: those of the reference policy.
    completion_mask  (B, T), bool: the tokens that were sampled. Values outside are not read (NaN is fine there).
    estimator        "k1" d, "abs" |d|, "k2" d^2 / 2, "k3" exp(-d) + d - 1 (d within 20, the estimate at most 10), with
                     d = logprob - ref_logprob.
    cu_seqlens       (B + 1,), int32 or int64: the responses are packed into (N,) or (1, N) in place of (B, T); see
                     ``edge_grpo_loss``.

    float64 for float64 rewards, else float32. No gradient. Raises ValueError or TypeError for wrong shapes and dtypes.
    """
    _one_of("estimator", estimator, KLEstimator)
    check_float("logprobs", logprobs, least_dims=1, may_be_empty=True)
    tokens, sequences, shapes = tokens_of("logprobs", logprobs, cu_seqlens)
    B = sequences.num_responses
    check_like("rewards", rewards, {"(B,)": (B,)}, "floating point", logprobs, remedy="pass one reward per response")
    remedy = "score the reference policy on the same tokens"
    check_like("ref_logprobs", ref_logprobs, shapes, "floating point", logprobs, remedy=remedy)
    remedy = "pass the mask of the tokens that were sampled"
    check_like("completion_mask", completion_mask, shapes, "bool", logprobs, remedy=remedy)
    others = (value.view(tokens.shape) for value in (ref_logprobs, completion_mask))
    return penalized_rewards(rewards, tokens, *others, coef=coef, estimator=estimator, sequences=sequences)


def penalized_rewards(
    rewards: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    coef: float,
    estimator: KLEstimator,
    sequences: Sequences,
) -> Tensor:
    """Return ``kl_penalized_rewards`` of checked tensors."""
    rewards = rewards.detach().to(stats_dtype(rewards.dtype))
    kl = kl_estimate(logprobs.detach().to(rewards.dtype), ref_logprobs.detach().to(rewards.dtype), estimator)
    return rewards - coef * sequences.sums(kl.masked_fill(~mask, 0))[0]


def response_entropy(entropy: Tensor, completion_mask: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """Return the mean entropy P of each response over its own tokens, (B,); -inf for a response without tokens.

    Equivalent: ``(entropy * completion_mask).sum(1) / completion_mask.sum(1)``.

    entropy          (B, T), floating point, nats. Values outside the mask are not read (NaN is fine there).
    completion_mask  (B, T), bool: the response's own tokens.
    cu_seqlens       (B + 1,), int32 or int64: the responses are packed into (N,) or (1, N) in place of (B, T); see
                     ``edge_grpo_loss``.

    -inf, and not NaN, so that a NaN entropy inside the mask is not taken for a missing one. float64 for float64
    entropy, else float32. No gradient. Raises ValueError or TypeError for wrong shapes and dtypes. arXiv:2507.21848,
    eq. 3.
    """
    return mean_entropy_of(*checked_entropy(entropy, completion_mask, cu_seqlens))


def checked_entropy(
    entropy: Tensor, completion_mask: Tensor, cu_seqlens: Tensor | None, group: Any = None
) -> tuple[Tensor, Tensor, Sequences]:
    """Return entropy and mask as (B, T) or (N,), and which tokens are whose; ``group``: see ``Sequences``."""
    check_float("entropy", entropy, least_dims=1, may_be_empty=True)
    tokens, sequences, shapes = tokens_of("entropy", entropy, cu_seqlens, group)
    remedy = "pass the mask of the completion's own tokens"
    check_like("completion_mask", completion_mask, shapes, "bool", entropy, remedy=remedy)
    return tokens, completion_mask.view(tokens.shape), sequences


def mean_entropy_of(entropy: Tensor, mask: Tensor, sequences: Sequences = ROWS) -> Tensor:
    """Return ``response_entropy`` of checked tensors."""
    entropy = entropy.detach().to(stats_dtype(entropy.dtype))
    total, lengths = sequences.sums(entropy.masked_fill(~mask, 0), mask)
    return (total / lengths.clamp(min=1)).masked_fill(lengths == 0, -math.inf)


def response_entropy_weights(
    mean_entropy: Tensor, group_ids: Tensor, config: EDAConfig | None = None, *, advantages: Tensor | None = None
) -> Tensor:
    """Return the weight 1 / P_hat of each response from its mean entropy, (B,): what ``entropy_weights`` returns.

    Processes that share groups exchange these means, one number per response, instead of the entropy of every token.

    mean_entropy  (B,), floating point, nats: what ``response_entropy`` returns, -inf for a response without tokens.

    Other arguments, results and errors as in ``entropy_weights``. arXiv:2507.21848, eq. 6.
    """
    config = _check_config(config)
    shapes = {"(B,)": tuple(mean_entropy.shape[:1])}
    remedy = "pass one mean per response"
    check_like("mean_entropy", mean_entropy, shapes, "floating point", mean_entropy, remedy=remedy)
    _check_groups(group_ids, mean_entropy)
    if advantages is not None:
        remedy = "pass one advantage per response"
        check_like("advantages", advantages, shapes, "floating point", mean_entropy, remedy=remedy)
    elif config.preserve_scale:
        raise ValueError(
            "preserve_scale=True rescales weights by the advantages' magnitude; got advantages=None; "
            "pass advantages=group_advantages(...)"
        )

    groups = _groups(group_ids)
    mean_entropy = mean_entropy.detach().to(stats_dtype(mean_entropy.dtype))
    has_tokens = mean_entropy != -math.inf
    mean_entropy = torch.where(has_tokens, mean_entropy, 0)  # P, (B,)
    if config.mean_over == "group":
        mean = groups.sum(mean_entropy) / groups.sum(has_tokens.to(mean_entropy.dtype)).clamp(min=1)
    else:
        mean = (mean_entropy.sum() / has_tokens.sum().clamp(min=1)).expand_as(mean_entropy)
    ratio = torch.where(mean == 0, 1, mean_entropy / mean)  # P_hat
    weights = torch.where(has_tokens, 1 / ratio.clamp(config.min_ratio, config.max_ratio), 1)
    if config.preserve_scale and advantages is not None:
        advantages = advantages.detach().to(weights.dtype)
        before = groups.sum(advantages.abs())
        after = groups.sum(apply_weights(advantages, weights).abs())
        weights = weights * torch.where(after == 0, 1, before / after)
    return weights


def entropy_weights(
    entropy: Tensor,
    completion_mask: Tensor,
    group_ids: Tensor,
    config: EDAConfig | None = None,
    *,
    advantages: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Return the weight 1 / P_hat of each response, (B,): below 1 where it was uncertain, above 1 where it was sure.

    Equivalent, for responses ordered by group: ``P = (entropy * mask).sum(1) / mask.sum(1);
    P_hat = P.view(-1, G) / P.view(-1, G).mean(1, True); 1 / P_hat.clamp(config.min_ratio, config.max_ratio)``.

    entropy          (B, T), floating point, nats. Values outside the mask are not read (NaN is fine there).
    completion_mask  (B, T), bool: the response's own tokens.
    group_ids        (B,), int64, any numbers in any order; groups must be whole.
    config           EDAConfig: bounds, ``mean_over``, ``preserve_scale``.
    advantages       (B,), floating point: needed by ``preserve_scale`` alone, which rescales a group's weights so that
                     its mean \\|advantage\\| stays what it was.
    cu_seqlens       (B + 1,), int32 or int64: the responses are packed into (N,) or (1, N) in place of (B, T); see
                     ``edge_grpo_loss``.

    A response without tokens has weight 1 and stays out of its group's mean; a group of entropy 0 has weights 1. A NaN
    entropy inside the mask gives NaN. float64 for float64 entropy, else float32. No gradient: the weight is a constant
    of the loss, unlike in the published code, where it leaked through (NaN on peaked logits). Raises ValueError or
    TypeError for wrong shapes and dtypes. arXiv:2507.21848, eqs. 3 and 6. Unlike the published code, the mean is over
    the response's own tokens and over its group, and P_hat is bounded, so that entropy 0 gives a finite weight.
    """
    config = _check_config(config)
    means = response_entropy(entropy, completion_mask, cu_seqlens=cu_seqlens)
    return response_entropy_weights(means, group_ids, config, advantages=advantages)


def apply_weights(advantages: Tensor, weights: Tensor) -> Tensor:
    """Return ``advantages * weights`` with 0 * inf = 0: no advantage is no signal, however small the entropy."""
    return torch.where((advantages == 0) & weights.isinf(), 0, advantages * weights)


def entropy_driven_advantages(
    rewards: Tensor,
    entropy: Tensor,
    completion_mask: Tensor,
    group_ids: Tensor,
    config: EDAConfig | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Return the Entropy-Driven Advantage of each response: its group advantage divided by P_hat, (B,).

    Equivalent: ``group_advantages(rewards, group_ids) * entropy_weights(entropy, completion_mask, group_ids, config)``.
    Shapes, dtypes, errors and limits as there. A group of equal rewards stays exactly 0. No gradient.
    arXiv:2507.21848, eq. 7.
    """
    tokens, mask, sequences = checked_entropy(entropy, completion_mask, cu_seqlens)
    remedy = "pass one reward per response"
    check_like("rewards", rewards, {"(B,)": (sequences.num_responses,)}, "floating point", entropy, remedy=remedy)
    check_finite("rewards", rewards, remedy="leave the response out, or give it a number")
    return advantages_of_means(rewards, mean_entropy_of(tokens, mask, sequences), group_ids, config)


def advantages_of_means(rewards: Tensor, mean_entropy: Tensor, group_ids: Tensor, config: EDAConfig | None) -> Tensor:
    """Return ``entropy_driven_advantages`` of rewards that were checked (NaN where logits are) and mean entropies."""
    config = _check_config(config)
    advantages = _group_advantages(rewards, group_ids, scale_rewards=config.scale_rewards)
    weights = response_entropy_weights(mean_entropy, group_ids, config, advantages=advantages)
    return apply_weights(advantages, weights)
