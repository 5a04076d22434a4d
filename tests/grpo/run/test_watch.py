"""Rewards that stay the same for many steps are said once, and steps that are all skipped end the run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from edge_grpo.run.watch import SKIPPED_STEPS, STEPS, RewardWatch
from edge_grpo.types import Reward

WEIGHTS = {"accuracy": 1.0, "mine:f": 0.5, "mine:unused": 0.0}


def step(totals, part=1.0, *, skipped=False):
    """The samples of a step, as far as the watch looks at them."""
    failures = {"mine:f": "raised"} if skipped else {}
    parts = {"accuracy": 0.0, "format": 0.0, "mine:f": part, "mine:unused": 0.0}
    return [SimpleNamespace(reward=Reward(total, parts, "wrong", failures, skipped)) for total in totals]


def test_constant_rewards_are_said_after_ten_steps_and_once():
    watch = RewardWatch(WEIGHTS)
    said = {number: watch.see(number, step([0.5, 0.5], part=number)) for number in range(1, 3 * STEPS)}
    [sentence] = said.pop(STEPS)
    assert f"step {STEPS}: every response of the last {STEPS} steps earned 0.5: equal rewards teach nothing" in sentence
    assert not any(said.values())


@pytest.mark.parametrize("other", [[0.5, 0.25], [0.25, 0.25]])
def test_one_step_with_another_reward_begins_the_count_again(other):
    watch = RewardWatch(WEIGHTS)
    steps = [[0.5, 0.5]] * (STEPS - 1) + [other] + [[0.5, 0.5]] * (STEPS - 1)
    assert not any(watch.see(number, step(totals, part=number)) for number, totals in enumerate(steps))
    assert watch.see(99, step([0.5, 0.5], part=99))


def test_a_function_without_effect_is_named_though_the_sum_varies():
    watch = RewardWatch(WEIGHTS)
    said = [sentence for number in range(STEPS) for sentence in watch.see(number, step([number, 0.0]))]
    [sentence] = said
    assert sentence.startswith(
        f"step {STEPS - 1}: reward function mine:f gave 1 for every response of the last {STEPS} "
    )


def test_steps_that_are_all_skipped_end_the_run():
    watch = RewardWatch(WEIGHTS)
    for number in range(SKIPPED_STEPS - 1):
        assert watch.see(number, step([0.0], skipped=True)) == []
    watch.see(3, step([0.0]))  # one response that counts
    for number in range(SKIPPED_STEPS - 1):
        watch.see(number, step([0.0], skipped=True))
    with pytest.raises(
        RuntimeError, match=r"^mine:f failed on every response of 3 steps in a row, and .*on_error=skip"
    ):
        watch.see(9, step([0.0], skipped=True))
