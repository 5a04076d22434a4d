"""Rewards that nothing can be learned from: beyond what the loss can hold, and functions that never give a number."""

from __future__ import annotations

import logging

import pytest
import torch

from edge_grpo.config import RewardConfig
from edge_grpo.credit import credit
from edge_grpo.grading.rewards import Rewarder
from edge_grpo.types import Example, Prompt

SOURCE = """
def huge(completions): return [1e300] * len(completions)
def large(completions): return [1e30] * len(completions)
def whole(completions): return [10**400] * len(completions)
def nothing(completions): return [None] * len(completions)
def late(completions): return [1.0 if "now" in completion else None for completion in completions]
"""
PROMPTS = [Prompt(Example(40 + i, "What is 2 + 3?", "5"), "What is 2 + 3?", (1, 2)) for i in range(2)]


@pytest.fixture
def rewarder(tmp_path, monkeypatch):
    """A function that makes a rewarder of one function above; the last one is closed in the end."""
    (tmp_path / "useless_rewards.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def make(name, weight=1.0):
        made.append(Rewarder(RewardConfig(weights={f"useless_rewards:{name}": weight})))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_reward_beyond_the_range_is_a_failure_of_its_function(rewarder):
    for name in ("huge", "whole"):
        with pytest.raises(
            RuntimeError, match=rf"useless_rewards:{name}' failed on .*: returned 1.*0, not a number from"
        ):
            rewarder(name)(PROMPTS, ["a", "b"])


def test_so_is_a_sum_beyond_it(rewarder):
    assert [reward.total for reward in rewarder("large")(PROMPTS, ["a", "b"])] == [1e30, 1e30]
    with pytest.raises(
        ValueError, match=r"the reward of sample 0 \(row 40\), .* is 2e\+30, and must lie from -1e\+30 to"
    ):
        rewarder("large", weight=2.0)(PROMPTS, ["a", "b"])


def test_the_largest_rewards_teach_what_small_ones_do():
    """In float32 the square of 1e30 is infinite, and every advantage was 0."""
    groups, entropy = torch.tensor([0, 0, 0, 0]), torch.ones(4)
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    for scale in (1e30, -1e30):
        found = credit(rewards * scale, entropy, groups).advantages
        expected = credit(rewards * (1000 if scale > 0 else -1000), entropy, groups).advantages
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "last", "warns"), [("nothing", "b", True), ("late", "now", False)])
def test_a_function_that_only_returns_none_is_warned_of_once(rewarder, caplog, name, last, warns):
    judge = rewarder(name)
    with caplog.at_level(logging.WARNING):
        for completion in ("a", "b", last, "b", "b", "b", "b"):
            judge(PROMPTS, ["a", completion])
    said = [record.getMessage() for record in caplog.records]
    expected = f"'useless_rewards:{name}' has returned None for each of its first 6 completions, which counts as 0"
    assert [expected in text for text in said] == [True] * warns
