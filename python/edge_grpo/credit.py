"""Entropy-driven advantages over the groups of a step (arXiv:2507.21848, section 3.2): pure, one number per response.

A process computes the mean entropies of its own responses; weights and advantages follow from those of whole groups,
gathered from all processes that share them. The arithmetic is in ``edge_kernels.advantages``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from edge_grpo.batching import Sample, counted_tokens
from edge_grpo.types import Provenance
from edge_kernels import (
    EDAConfig,
    GRPOLossConfig,
    group_advantages,
    kl_penalized_rewards,
    response_entropy,
    response_entropy_weights,
)
from edge_kernels.advantages import apply_weights
from edge_kernels.config import KLEstimator


class Credit(NamedTuple):
    """The advantage of each response, and the entropy weight contained in it (1 without EDA)."""

    advantages: Tensor  # (B,)
    weights: Tensor  # (B,)


def mean_entropies(entropy: Sequence[Tensor], counts: Sequence[Sequence[bool]]) -> Tensor:
    """Return the mean entropy of each response over the tokens that count, (B,); -inf where none does.

    entropy  one (T,) per response, nats; lengths may differ.
    counts   one flag per token: whether it is the response's own.
    """
    masks = [torch.tensor(flags, dtype=torch.bool) for flags in counts]
    pad = torch.nn.utils.rnn.pad_sequence
    return response_entropy(pad(list(entropy), batch_first=True), pad(masks, batch_first=True))


def credit(
    rewards: Tensor,
    mean_entropy: Tensor,
    group_ids: Tensor,
    config: EDAConfig | None = None,
    *,
    entropy_driven: bool = True,
) -> Credit:
    """Return the advantages and weights of responses whose groups are whole (eqs. 1, 6, 7).

    rewards       (B,), floating point.
    mean_entropy  (B,), what ``mean_entropies`` returns, gathered from all processes that share these groups.
    group_ids     (B,), int64, any numbers in any order.

    Without ``entropy_driven`` these are the group advantages, and weights 1.
    """
    config = config or EDAConfig()
    advantages = group_advantages(rewards, group_ids, scale_rewards=config.scale_rewards)
    if not entropy_driven:
        return Credit(advantages, torch.ones_like(advantages))
    weights = response_entropy_weights(mean_entropy, group_ids, config, advantages=advantages)
    return Credit(apply_weights(advantages, weights), weights)


class Outcome(NamedTuple):
    """What one response contributes to advantages: small enough to be gathered from all processes."""

    group: int
    reward: float  # less its KL penalty
    mean_entropy: float


def outcomes(samples: Sequence[Sample], loss: GRPOLossConfig, kl_coef: float = 0.0) -> list[Outcome]:
    """Return the outcomes of the responses that take part in advantages: those that were not skipped.

    Fills their mean entropies, but for those that were measured over padding too.
    """
    samples = [sample for sample in samples if not sample.reward.skipped]
    if not samples:
        return []
    means = mean_entropies(
        [sample.entropy for sample in samples if sample.entropy is not None],
        [counted_tokens(sample.response, loss) for sample in samples],
    )
    for sample, mean in zip(samples, means.tolist(), strict=True):
        if not sample.padding:
            sample.mean_entropy = mean
    return [
        Outcome(sample.group, sample.reward.total - kl_coef * sample.reward_kl, sample.mean_entropy)
        for sample in samples
    ]


def measure_kl(samples: Sequence[Sample], estimator: KLEstimator) -> None:
    """Fill each sample's KL divergence to the reference policy, of the tokens that the policy sampled."""
    for sample in samples:
        assert sample.logprobs is not None, "the scoring pass fills the logprobs of every sample"
        assert sample.ref_logprobs is not None, "it fills the reference's where there is a reference"
        sampled = torch.tensor([mark != Provenance.INJECTED for mark in sample.response.provenance], dtype=torch.bool)
        rows = (sample.logprobs[None], sample.ref_logprobs[None], sampled[None])
        sample.reward_kl = -float(kl_penalized_rewards(torch.zeros(1), *rows, coef=1.0, estimator=estimator))


def assign_advantages(
    samples: Sequence[Sample],
    loss: GRPOLossConfig,
    *,
    entropy_driven: bool,
    kl_coef: float = 0.0,
    others: Sequence[Outcome] = (),
) -> None:
    """Fill the advantages and weights of samples whose groups are whole and whose entropy is known.

    ``others`` are the ``outcomes`` of other processes' groups, for what is relative to the whole batch. Skipped
    responses are in no group: their advantage stays 0, and the others' is as if they were not there.
    """
    counted = [sample for sample in samples if not sample.reward.skipped]
    if not counted:
        return
    groups, rewards, means = zip(*outcomes(counted, loss, kl_coef), *others, strict=True)
    result = credit(
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(means),
        torch.tensor(groups),
        loss.eda,
        entropy_driven=entropy_driven,
    )
    number = len(counted)
    pairs = zip(result.advantages[:number].tolist(), result.weights[:number].tolist(), strict=True)
    for sample, (advantage, weight) in zip(counted, pairs, strict=True):
        sample.advantage, sample.weight = advantage, weight
