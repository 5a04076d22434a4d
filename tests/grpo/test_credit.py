"""Advantages of a step: against the paper by hand, gathered over processes, and without skipped responses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from corrections import INJECTED, SAMPLED, prompt, sampled

from edge_grpo.batching import Sample
from edge_grpo.credit import assign_advantages, credit, mean_entropies, measure_kl, outcomes
from edge_grpo.types import Provenance, Response, Reward
from edge_kernels import EDAConfig, GRPOLossConfig, entropy_driven_advantages, entropy_weights, group_advantages

GROUPS = torch.tensor([5, 2, 5, 2, 2, 9])  # interleaved, and of three sizes
REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
ENTROPY = [torch.tensor(values) for values in ([1.0, 3.0], [2.0], [0.5, 0.5, 0.5], [4.0], [0.0, 6.0], [1.0])]
COUNTS = [[True] * len(values) for values in ENTROPY]


def test_mean_entropies_are_over_the_tokens_that_count():
    counts = [[True, False], [False], *COUNTS[2:]]
    expected = torch.tensor([1.0, -math.inf, 0.5, 4.0, 3.0, 1.0])
    torch.testing.assert_close(mean_entropies(ENTROPY, counts), expected)


def test_credit_by_hand():
    """Group 5: entropies 2 and 0.5, so P_hat 1.6 and 0.4; advantages +-0.5 over the deviation 0.7071."""
    result = credit(REWARDS, mean_entropies(ENTROPY, COUNTS), GROUPS)
    advantage = 0.5 / (0.5**0.5 + 1e-4)
    torch.testing.assert_close(result.weights[[0, 2]], torch.tensor([1 / 1.6, 1 / 0.4]))
    torch.testing.assert_close(result.advantages[[0, 2]], torch.tensor([advantage / 1.6, -advantage / 0.4]))
    assert (result.advantages[5], result.weights[5]) == (0, 1)  # alone in its group


def test_without_entropy_it_is_the_group_advantage():
    result = credit(REWARDS, mean_entropies(ENTROPY, COUNTS), GROUPS, entropy_driven=False)
    torch.testing.assert_close(result.advantages, group_advantages(REWARDS, GROUPS), rtol=0, atol=0)
    assert result.weights.tolist() == [1] * 6
    unscaled = credit(REWARDS, torch.zeros(6), GROUPS, EDAConfig(scale_rewards=False), entropy_driven=False)
    torch.testing.assert_close(unscaled.advantages, group_advantages(REWARDS, GROUPS, scale_rewards=False))


def test_one_scale_for_the_whole_batch():
    """Three groups of six responses: the deviation is that of all six, whose mean is 2/3."""
    config, plain = EDAConfig(scale_rewards="batch"), torch.tensor([0.5, -2 / 3, -0.5, 1 / 3, 1 / 3, 0.0])
    groups = torch.tensor([5, 2, 5, 2, 2, 9])
    deviation = (6 * 2 / 9 / 5) ** 0.5 + 1e-4
    whole = credit(REWARDS, torch.zeros(6), groups, config, entropy_driven=False)
    torch.testing.assert_close(whole.advantages, plain / deviation)


@pytest.mark.parametrize("eda", [EDAConfig(scale_rewards="batch"), EDAConfig(mean_over="batch")])
def test_what_is_relative_to_the_batch_reaches_over_processes(eda):
    """One process has two groups, of which one response was skipped, or each of two processes has one of them."""
    samples = [
        sample(0, 1.0, [9.0, 2.0]),
        sample(0, 0.0, [9.0, 0.5, 0.5]),
        sample(1, 3.0, [9.0, 0.1]),
        sample(1, 0.5, [9.0, 4.0]),
        sample(1, 9.0, [9.0, 9.0], skipped=True),
    ]
    loss = GRPOLossConfig(injected="mask", eda=eda)
    assign_advantages(samples, loss, entropy_driven=True)
    whole = [(one.advantage, one.weight) for one in samples]
    assert len(set(whole)) == 5
    shares = [samples[:2], samples[2:]]
    alone = []
    for share, other in (shares, shares[::-1]):
        assign_advantages(share, loss, entropy_driven=True)
        alone += [(one.advantage, one.weight) for one in share]
        assign_advantages(share, loss, entropy_driven=True, others=outcomes(other, loss))
    for got, expected in zip([(one.advantage, one.weight) for one in samples], whole, strict=True):
        assert got == pytest.approx(expected)
    for own in (slice(0, 2), slice(2, 4)):
        assert any(one != pytest.approx(with_all) for one, with_all in zip(alone[own], whole[own], strict=True))


def test_the_kl_divergence_lessens_the_reward_by_its_sum_over_sampled_tokens():
    """Differences of 0.3 and -0.1 to the reference; the third token is injected."""
    first, second = sample(0, 1.0, [1.0] * 3), sample(0, 1.0, [1.0] * 3)
    marks = (Provenance.SAMPLED, Provenance.SAMPLED, Provenance.INJECTED)
    for each, differences in ((first, [0.3, -0.1, 9.0]), (second, [0.0, 0.0, 0.0])):
        each.response = replace(each.response, provenance=marks)
        each.logprobs = torch.tensor([-1.0, -2.0, -3.0])
        each.ref_logprobs = each.logprobs - torch.tensor(differences)
    for estimator, expected in (("k1", 0.2), ("abs", 0.4), ("k2", 0.05)):
        measure_kl([first, second], estimator)
        assert first.reward_kl == pytest.approx(expected)
        assert second.reward_kl == 0
    rewards = [outcome.reward for outcome in outcomes([first, second], GRPOLossConfig(), kl_coef=2.0)]
    assert rewards == pytest.approx([1 - 2 * 0.05, 1])
    assign_advantages([first, second], GRPOLossConfig(), entropy_driven=False, kl_coef=2.0)
    assert first.advantage == pytest.approx(-second.advantage)
    assert first.advantage < 0


@pytest.mark.parametrize("config", [EDAConfig(), EDAConfig(preserve_scale=True), EDAConfig(mean_over="batch")])
def test_gathered_means_give_what_all_tokens_together_give(config):
    """Three processes of two responses each, whose groups span them: each sends two numbers."""
    parts = [slice(0, 2), slice(2, 4), slice(4, 6)]
    gathered = torch.cat([mean_entropies(ENTROPY[part], COUNTS[part]) for part in parts])
    result = credit(REWARDS, gathered, GROUPS, config)
    entropy = torch.nn.utils.rnn.pad_sequence(ENTROPY, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.tensor(flags) for flags in COUNTS], batch_first=True)
    plain = group_advantages(REWARDS, GROUPS)
    torch.testing.assert_close(result.weights, entropy_weights(entropy, mask, GROUPS, config, advantages=plain))
    torch.testing.assert_close(result.advantages, entropy_driven_advantages(REWARDS, entropy, mask, GROUPS, config))


def sample(group: int, total: float, entropy: Sequence[float], *, skipped: bool = False) -> Sample:
    """The first token of each is ours."""
    marks: tuple[Provenance, ...] = (INJECTED, *[SAMPLED] * (len(entropy) - 1))
    records = (-1.0,) * len(entropy)
    response = Response((7,) * len(entropy), records, records, marks, "stop")
    reward = Reward(total, {}, "wrong", skipped=skipped)
    return Sample(prompt(), group, sampled(""), reward, response, reward, entropy=torch.tensor(entropy))


def test_samples_get_their_advantages_and_skipped_ones_none():
    others = [sample(3, 1.0, [9.0, 2.0]), sample(3, 0.0, [9.0, 0.5, 0.5])]
    gone = sample(3, 5.0, [9.0, 9.0], skipped=True)
    assign_advantages([others[0], gone, others[1]], GRPOLossConfig(injected="mask"), entropy_driven=True)
    assert (gone.advantage, gone.weight) == (0.0, 1.0)
    assert [one.weight for one in others] == pytest.approx([1 / 1.6, 1 / 0.4])  # masked tokens do not count
    advantage = 0.5 / (0.5**0.5 + 1e-4)
    assert [one.advantage for one in others] == pytest.approx([advantage / 1.6, -advantage / 0.4])
    assign_advantages(others, GRPOLossConfig(), entropy_driven=True)  # injected tokens are credited like any other
    assert [one.weight for one in others] == pytest.approx([(5.5 + 10 / 3) / 2 / 5.5, (5.5 + 10 / 3) / 2 / (10 / 3)])
    assign_advantages([gone], GRPOLossConfig(), entropy_driven=True)
    assert gone.advantage == 0.0
