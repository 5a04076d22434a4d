"""What verl 0.9 has and TRL has not, against verl's own functions on the same tensors, in value and gradient."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from grpo_batch import ALL_PATHS, Path, config_of, from_reference, make_batch
from torch import Tensor
from verl_source import verl

from edge_kernels import EDAConfig, group_advantages, kl_penalized_rewards, reference

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(verl is None, reason="verl is not installed; it is the other side of every comparison here"),
]

# verl adds 1e-8 to a response's number of tokens before it divides by it.
TOLERANCE = {"rtol": 1e-7, "atol": 1e-8}
CLIP = {"epsilon_low": 0.15, "epsilon_high": 0.28}


def verl_loss(name: str, logprobs: Tensor, batch: SimpleNamespace, advantages: Tensor, **options: Any) -> Tensor:
    assert verl is not None
    config = SimpleNamespace(
        clip_ratio=0.2, clip_ratio_low=0.15, clip_ratio_high=0.28, tau_pos=1.5, tau_neg=0.75, global_batch_info={}
    )
    mask = batch.mask.double()
    loss, _ = getattr(verl, f"compute_policy_loss_{name}")(
        old_log_prob=batch.old,
        log_prob=logprobs,
        advantages=advantages[:, None].expand_as(mask),
        response_mask=mask,
        config=config,
        **options,
    )
    return loss


@pytest.mark.parametrize("path", ALL_PATHS)
@pytest.mark.parametrize("loss_type", ["geo_mean", "sapo"])
@pytest.mark.parametrize("mode", [None, "token_truncate", "sequence_truncate"])
def test_losses(loss_type: str, path: Path, mode: str | None) -> None:
    batch = make_batch(3)
    batch.old, batch.sampling = (
        x.nan_to_num(nan=-1.0) for x in (batch.old, batch.sampling)
    )  # verl has no missing ones
    batch.advantages = torch.tensor([1.3, -0.8, 0.5, 0.0], dtype=torch.float64)
    factor = None
    if mode is not None:
        difference = (batch.old - batch.sampling).masked_fill(~batch.mask, 0)
        if mode.startswith("sequence"):
            difference = difference.sum(-1, keepdim=True).expand_as(difference)
        factor = difference.exp().clamp(max=1.15)
    targets = batch.targets.masked_fill(~batch.mask, -100)
    stats = reference.linear_token_stats(batch.hidden, batch.weight, targets, batch.bias)
    parameters = (batch.hidden, batch.weight, batch.bias)
    expected = verl_loss(loss_type, stats.logprobs, batch, batch.advantages, rollout_is_weights=factor)
    if loss_type == "sapo":  # verl's mean is over the responses that have tokens: three of four here
        expected = expected * 3 / 4
    config = config_of(
        loss_type,
        **CLIP,
        sapo_temperature_pos=1.5,
        sapo_temperature_neg=0.75,
        sampler_ratio_cap=None if mode is None else 1.15,
        sampler_ratio_mode=mode or "token_truncate",
    )
    sampling = {} if mode is None else {"sampling_logprobs": batch.sampling}
    out = path(batch, advantages=batch.advantages, old_logprobs=batch.old, config=config, **sampling)
    torch.testing.assert_close(out.loss, expected, **TOLERANCE)
    gradients = (torch.autograd.grad(loss, parameters) for loss in (out.loss, expected))
    torch.testing.assert_close(*gradients, **TOLERANCE)
    if loss_type == "geo_mean":
        log_ratio = (stats.logprobs - batch.old)[batch.mask]
        A = batch.advantages[:, None].expand_as(batch.mask)[batch.mask]
        assert out.metrics["clip_low"] == ((log_ratio < -0.15) & (A < 0)).sum() > 0
        assert out.metrics["clip_high"] == ((log_ratio > 0.28) & (A > 0)).sum() > 0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_the_kl_divergence_in_the_reward(estimator: str) -> None:
    """The penalty of each token is subtracted where it stands; an outcome advantage sees the sum over the response."""
    assert verl is not None
    batch = make_batch(5)
    batch.old = batch.old.nan_to_num(nan=-1.0)
    batch.ref[0, 1] = batch.old[0, 1] + 30  # beyond the bounds of k3
    scores = torch.zeros(batch.mask.shape, dtype=torch.float64)
    scores[:, 0] = batch.rewards
    tensors = {
        "response_mask": batch.mask.double(),
        "token_level_scores": scores,
        "old_log_probs": batch.old,
        "ref_log_prob": batch.ref,
    }
    data = SimpleNamespace(batch=Batch(tensors))
    controller = SimpleNamespace(value=0.3, update=lambda **_: None)
    verl.apply_kl_penalty(data, controller, kl_penalty=estimator)
    expected = data.batch["token_level_rewards"].sum(-1)
    options = {"coef": 0.3, "estimator": estimator}
    rewards = kl_penalized_rewards(batch.rewards, batch.old, batch.ref, batch.mask, **options)
    torch.testing.assert_close(rewards, expected)

    # In the loss of rewards: the same advantages as from rewards that were lessened beforehand.
    eda = EDAConfig(min_ratio=1.0, max_ratio=1.0)  # which leaves the group advantage as it is
    config = config_of(reward_kl_coef=0.3, reward_kl_penalty=estimator, eda=eda)
    inputs = {"rewards": batch.rewards, "group_ids": batch.groups, "old_logprobs": batch.old, "config": config}
    for path in (*ALL_PATHS, from_reference):
        out = path(batch, ref_logprobs=batch.ref, **inputs)
        torch.testing.assert_close(out.advantages, group_advantages(rewards, batch.groups))


class Batch(dict):
    """What verl's function asks of a TensorDict: items, and how many there are."""

    @property
    def batch_size(self) -> tuple[int]:
        return (len(self["token_level_scores"]),)
