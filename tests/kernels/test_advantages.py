"""Group advantages and entropy-driven advantages: against the loop in reference.py, invariances, errors, compile."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edge_kernels import (
    EDAConfig,
    entropy_driven_advantages,
    entropy_weights,
    group_advantages,
    reference,
    response_entropy,
    response_entropy_weights,
)

CONFIGS = [
    EDAConfig(),
    EDAConfig(min_ratio=0.0, max_ratio=math.inf),
    EDAConfig(mean_over="batch"),
    EDAConfig(preserve_scale=True),
    EDAConfig(scale_rewards=False, preserve_scale=True, mean_over="batch", min_ratio=0.9, max_ratio=1.1),
]


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rewards (B,), entropy (B, T), completion_mask (B, T) and group ids (B,), of any size, in any order."""
    size, length = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    groups = torch.tensor(draw(st.lists(st.sampled_from([-7, 0, 3, 10**12]), min_size=size, max_size=size)))
    rewards = draw(st.lists(st.sampled_from([0.0, 0.1, 1.0, -0.5]), min_size=size, max_size=size))
    entropy = torch.rand(size, length, generator=generator, dtype=torch.float64) * 3 + 0.01
    mask = torch.rand(size, length, generator=generator) < 0.7
    mask[torch.rand(size, generator=generator) < 0.2] = False  # a response without any token is possible
    rewards = torch.tensor(rewards, dtype=torch.float64)  # 0.1 in it: three of them do not sum to 0.3
    return rewards, entropy.masked_fill(~mask, math.nan), mask, groups


@given(batches())
def test_everything_agrees_with_the_loop_over_groups(batch: tuple[Tensor, ...]) -> None:
    rewards, entropy, mask, groups = batch
    for scale in (True, "batch", False):
        actual = group_advantages(rewards, groups, scale_rewards=scale)
        torch.testing.assert_close(actual, reference.group_advantages(rewards, groups, scale_rewards=scale))
    for config in CONFIGS:
        advantages = group_advantages(rewards, groups)
        torch.testing.assert_close(
            entropy_weights(entropy, mask, groups, config, advantages=advantages),
            reference.entropy_weights(entropy, mask, groups, config, advantages=advantages),
        )
        torch.testing.assert_close(
            entropy_driven_advantages(rewards, entropy, mask, groups, config),
            reference.entropy_driven_advantages(rewards, entropy, mask, groups, config),
        )


@given(batches())
def test_advantages_of_a_group_sum_to_zero_and_equal_rewards_give_exactly_zero(batch: tuple[Tensor, ...]) -> None:
    rewards, entropy, mask, groups = batch
    advantages = group_advantages(rewards, groups)
    driven = entropy_driven_advantages(rewards, entropy, mask, groups)
    for group in groups.unique():
        members = groups == group
        assert abs(advantages[members].sum().item()) < 1e-9
        if len(rewards[members].unique()) == 1:
            assert (advantages[members] == 0).all()
            assert (driven[members] == 0).all()
    assert torch.equal(advantages.sign(), driven.sign())


@given(batches(), st.randoms(use_true_random=False))
def test_the_order_of_responses_and_the_names_of_groups_do_not_matter(batch: tuple[Tensor, ...], random) -> None:
    rewards, entropy, mask, groups = batch
    order = torch.tensor(random.sample(range(len(rewards)), len(rewards)))
    expected = entropy_driven_advantages(rewards, entropy, mask, groups)[order]
    renamed = 7 - 3 * groups[order]
    shuffled = entropy_driven_advantages(rewards[order], entropy[order], mask[order], renamed)
    torch.testing.assert_close(shuffled, expected)


@given(batches(), st.floats(0.1, 10), st.floats(-5, 5))
def test_what_scales_and_shifts_out(batch: tuple[Tensor, ...], factor: float, shift: float) -> None:
    rewards, entropy, mask, groups = batch
    weights = entropy_weights(entropy, mask, groups)
    torch.testing.assert_close(entropy_weights(entropy * factor, mask, groups), weights)  # nats or bits
    padding = torch.full_like(entropy, math.nan), torch.zeros_like(mask)
    padded = entropy_weights(torch.cat([entropy, padding[0]], 1), torch.cat([mask, padding[1]], 1), groups)
    torch.testing.assert_close(padded, weights)
    advantages = group_advantages(rewards, groups, scale_rewards=False)
    moved = group_advantages(rewards * factor + shift, groups, scale_rewards=False)
    torch.testing.assert_close(moved, advantages * factor)


@given(batches())
def test_whole_groups_may_be_computed_apart(batch: tuple[Tensor, ...]) -> None:
    rewards, entropy, mask, groups = batch
    together = entropy_driven_advantages(rewards, entropy, mask, groups)
    for group in groups.unique():
        members = groups == group
        apart = entropy_driven_advantages(rewards[members], entropy[members], mask[members], groups[members])
        torch.testing.assert_close(apart, together[members])


@given(batches())
def test_preserve_scale_keeps_the_mean_magnitude_of_each_group(batch: tuple[Tensor, ...]) -> None:
    rewards, entropy, mask, groups = batch
    before = group_advantages(rewards, groups)
    after = entropy_driven_advantages(rewards, entropy, mask, groups, EDAConfig(preserve_scale=True))
    for group in groups.unique():
        members = groups == group
        torch.testing.assert_close(after[members].abs().mean(), before[members].abs().mean())


def test_response_entropy_is_the_mean_over_a_responses_own_tokens() -> None:
    entropy = torch.tensor([[1.0, 2.0, math.nan], [3.0, 3.0, 6.0], [math.nan, 0.0, 0.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False], [False, False, False]])
    means = response_entropy(entropy, mask)
    torch.testing.assert_close(means, torch.tensor([1.5, 4.0, math.nan, -math.inf]), equal_nan=True)
    assert response_entropy(entropy.double(), mask).dtype == torch.float64
    assert response_entropy(entropy.bfloat16(), mask).dtype == torch.float32
    assert not response_entropy(entropy.requires_grad_(), mask).requires_grad


@given(batches(), st.integers(1, 4))
def test_weights_from_gathered_means_are_those_from_all_tokens(batch: tuple[Tensor, ...], processes: int) -> None:
    """Each process sends one number per response, from its own part of the tokens; groups may span processes."""
    rewards, entropy, mask, groups = batch
    parts = [slice(rank, None, processes) for rank in range(processes)]
    gathered = torch.cat([response_entropy(entropy[part], mask[part]) for part in parts])
    order = torch.cat([torch.arange(len(rewards))[part] for part in parts])
    advantages = group_advantages(rewards, groups)
    for config in CONFIGS:
        torch.testing.assert_close(
            response_entropy_weights(gathered, groups[order], config, advantages=advantages[order]),
            entropy_weights(entropy, mask, groups, config, advantages=advantages)[order],
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero_however_their_mean_rounds(dtype: torch.dtype) -> None:
    for size in range(1, 20):
        rewards, groups = torch.full((size,), 0.1, dtype=dtype), torch.zeros(size, dtype=torch.long)
        assert (group_advantages(rewards, groups) == 0).all()


def test_a_response_of_entropy_zero_gets_the_greatest_weight_not_infinity() -> None:
    entropy, mask = torch.tensor([[0.0], [2.0]]), torch.ones(2, 1, dtype=torch.bool)
    groups, rewards = torch.tensor([0, 0]), torch.tensor([1.0, 0.0])
    torch.testing.assert_close(entropy_weights(entropy, mask, groups), torch.tensor([10.0, 0.5]))
    unbounded = EDAConfig(min_ratio=0.0, max_ratio=math.inf)
    assert entropy_weights(entropy, mask, groups, unbounded)[0] == math.inf
    collapsed = entropy_driven_advantages(torch.ones(2), entropy, mask, groups, unbounded)
    assert collapsed.tolist() == [0, 0]
    assert entropy_weights(entropy * 0, mask, groups).tolist() == [1, 1]
    assert entropy_driven_advantages(rewards, entropy, mask, groups).isfinite().all()


def test_nan_is_passed_on_to_its_group_alone() -> None:
    groups, mask = torch.tensor([0, 0, 1, 1]), torch.ones(4, 1, dtype=torch.bool)
    entropy = torch.tensor([[1.0], [math.nan], [1.0], [1.0]])
    assert entropy_weights(entropy, mask, groups).isnan().tolist() == [True, True, False, False]


def test_dtypes_and_gradients() -> None:
    groups, mask = torch.tensor([0, 0]), torch.ones(2, 1, dtype=torch.bool)
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        rewards = torch.tensor([1.0, 0.0], dtype=dtype, requires_grad=True)
        entropy = torch.tensor([[1.0], [2.0]], dtype=dtype, requires_grad=True)
        for result in (
            group_advantages(rewards, groups),
            entropy_weights(entropy, mask, groups),
            entropy_driven_advantages(rewards, entropy, mask, groups),
        ):
            assert result.dtype == expected
            assert not result.requires_grad


def test_an_empty_batch() -> None:
    empty, groups, mask = torch.zeros(0), torch.zeros(0, dtype=torch.long), torch.zeros(0, 3, dtype=torch.bool)
    assert group_advantages(empty, groups).shape == (0,)
    assert entropy_driven_advantages(empty, torch.zeros(0, 3), mask, groups).shape == (0,)


def test_compiles_into_one_graph() -> None:
    entropy, mask = torch.rand(6, 4), torch.ones(6, 4, dtype=torch.bool)
    rewards, groups = torch.tensor([1.0, 0, 0, 1, 1, 1]), torch.tensor([5, 5, 2, 5, 2, 2])
    for config in CONFIGS[2:4]:
        compiled = torch.compile(entropy_driven_advantages, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            compiled(rewards, entropy, mask, groups, config),
            entropy_driven_advantages(rewards, entropy, mask, groups, config),
        )


def test_errors_name_what_was_expected() -> None:
    rewards, groups = torch.zeros(4), torch.zeros(4, dtype=torch.long)
    entropy, mask = torch.zeros(4, 2), torch.ones(4, 2, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"group_ids must be int64 with shape \(B,\) = \(4,\); got float32 \(4,\)"):
        group_advantages(rewards, groups.float())
    with pytest.raises(ValueError, match=r"group_ids must be int64 with shape \(B,\) = \(4,\); got int64 \(3,\)"):
        group_advantages(rewards, groups[:3])
    with pytest.raises(TypeError, match=r"rewards must be floating point .*; got int64 \(4,\)"):
        group_advantages(groups, groups)
    with pytest.raises(ValueError, match=r"rewards must .* got float32 \(4, 1\)"):
        group_advantages(rewards[:, None], groups)
    with pytest.raises(TypeError, match=r"completion_mask must be bool with shape \(B, T\) = \(4, 2\); got int64"):
        entropy_weights(entropy, mask.long(), groups)
    with pytest.raises(ValueError, match=r"entropy must have shape \(B, T\); got float32 \(4,\)"):
        entropy_weights(rewards, mask, groups)
    with pytest.raises(ValueError, match=r"preserve_scale=True .* pass advantages=group_advantages"):
        entropy_weights(entropy, mask, groups, EDAConfig(preserve_scale=True))
    with pytest.raises(ValueError, match=r"mean_entropy must .* got float32 \(4, 2\); pass one mean per response"):
        response_entropy_weights(entropy, groups)
    with pytest.raises(ValueError, match=r"preserve_scale=True .* pass advantages=group_advantages"):
        response_entropy_weights(rewards, groups, EDAConfig(preserve_scale=True))
    with pytest.raises(TypeError, match=r"completion_mask must be bool with shape \(B, T\) = \(4, 2\); got int64"):
        response_entropy(entropy, mask.long())
    with pytest.raises(TypeError, match=r"config must be an EDAConfig; got dict"):
        entropy_driven_advantages(rewards, entropy, mask, groups, {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rewards must .* \(B,\) = \(4,\); got float32 \(3,\)"):
        entropy_driven_advantages(rewards[:3], entropy, mask, groups)
