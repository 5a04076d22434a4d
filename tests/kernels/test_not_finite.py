"""Rewards and advantages that are no finite numbers: refused on a CPU, passed on to the loss where no value is read."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from edge_kernels import (
    GRPOLossConfig,
    edge_grpo_loss,
    entropy_driven_advantages,
    group_advantages,
    linear_edge_grpo_loss,
)

GROUPS = torch.tensor([0, 0, 1, 1])
MASK = torch.tensor([[True, False]] * 4)


def from_logits(**credit: Tensor):
    logits = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    return edge_grpo_loss(logits, torch.ones(4, 2, dtype=torch.long), MASK, **credit).loss, logits


def from_hidden(**credit: Tensor):
    hidden = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    return linear_edge_grpo_loss(
        hidden, torch.ones(5, 3), torch.ones(4, 2, dtype=torch.long), MASK, **credit
    ).loss, hidden


def compiled_from_logits(**credit: Tensor):
    return torch.compile(from_logits, backend="eager")(**credit)


@pytest.mark.parametrize("loss", [from_logits, from_hidden])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_losses_refuse_them(loss, value):
    spoiled = torch.tensor([1.0, value, 0.0, 1.0])
    with pytest.raises(
        ValueError, match=rf"advantages must be finite; got {value} at \(1,\); leave the response out of"
    ):
        loss(advantages=spoiled)
    with pytest.raises(ValueError, match=rf"advantages must be finite; got {value} at \(1, 0\)"):
        loss(advantages=torch.stack([spoiled, torch.zeros(4)], dim=1))
    with pytest.raises(ValueError, match=rf"rewards must be finite; got {value} at \(1,\); leave the response out, or"):
        loss(rewards=spoiled, group_ids=GROUPS)


def test_what_the_mask_leaves_out_is_not_looked_at():
    value, logits = from_logits(advantages=torch.tensor([[1.0, math.nan]] * 4))
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_advantages_refuse_them(value):
    rewards = torch.tensor([1.0, 0.0, value, 1.0])
    with pytest.raises(ValueError, match="rewards must be finite"):
        group_advantages(rewards, GROUPS)
    with pytest.raises(ValueError, match="batch_rewards must be finite"):
        group_advantages(torch.ones(4), GROUPS, scale_rewards="batch", batch_rewards=rewards)
    with pytest.raises(ValueError, match="rewards must be finite"):
        entropy_driven_advantages(rewards, torch.ones(4, 2), MASK, GROUPS)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_compiled_code_passes_them_on(value):
    """As a GPU does: their group has advantages of NaN, the loss is no number, and the other group is as it was."""
    compiled = torch.compile(group_advantages, backend="eager", fullgraph=True)
    found = compiled(torch.tensor([1.0, 0.0, value, 1.0]), GROUPS)
    assert found.isnan().tolist() == [False, False, True, True]
    loss, logits = compiled_from_logits(advantages=torch.tensor([1.0, value, 0.0, 1.0]))
    loss.backward()
    assert not loss.isfinite()
    assert logits.grad[:, 0].isfinite().all(-1).tolist() == [True, False, True, True]


@pytest.mark.parametrize("scale", ["group", "batch"])
@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 1e38), (torch.bfloat16, 1e38), (torch.float64, 1e307)])
def test_the_largest_rewards_have_the_advantages_of_small_ones(scale, dtype, largest):
    """Their squares overflow, which made every advantage 0."""
    small = torch.tensor([1.0, 0.0, 0.5, 0.5, 0.0, 0.0], dtype=dtype)
    groups = torch.tensor([0, 0, 0, 0, 1, 1])
    found = group_advantages(small * largest, groups, scale_rewards=scale)
    expected = group_advantages(small * 1e6, groups, scale_rewards=scale)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert (found[:2] != 0).all()
    assert (found[4:] == 0).all()


@pytest.mark.parametrize("config", [GRPOLossConfig(), GRPOLossConfig(reward_kl_coef=0.1)])
def test_nan_logits_are_not_blamed_on_the_rewards(config):
    logits = torch.zeros(4, 2, 5).index_fill(0, torch.tensor(1), math.nan)
    rewards, targets = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.ones(4, 2, dtype=torch.long)
    credit = {"rewards": rewards, "group_ids": GROUPS, "ref_logprobs": torch.zeros(4, 2)}
    assert edge_grpo_loss(logits, targets, MASK, **credit, config=config).loss.isnan()
