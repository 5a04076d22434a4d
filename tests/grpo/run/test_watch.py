"""What a run says, once, of rewards that stay the same and of corrections that make them so; and when it ends."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from edge_grpo.config import CorrectionConfig
from edge_grpo.run import watch as watch_module
from edge_grpo.run.watch import SKIPPED_STEPS, STEPS, CorrectionWatch, RewardWatch
from edge_grpo.trainer import train
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


# ---- Correction that makes groups all right --------------------------------------------------------------------------


def corrected(*groups):
    """The samples of a step, one text a group: of each response, "r" right, "w" wrong, "c" corrected, "s" skipped."""
    samples = []
    for group, marks in enumerate(groups):
        for mark in marks:
            before, after = (
                Reward(0.0, {}, "correct" if right else "wrong", skipped=mark == "s")
                for right in (mark == "r", mark in "rc")
            )
            samples.append(SimpleNamespace(group=group, first_reward=before, reward=after))
    return samples


def test_corrections_that_make_most_groups_all_right_are_said_once():
    watch = CorrectionWatch(CorrectionConfig())
    said = {number: watch.see(number, corrected("ccc", "rcs", "rrr")) for number in range(1, 3 * STEPS)}
    [sentence] = said.pop(STEPS)
    assert sentence.startswith(
        f"step {STEPS}: correction made every response right in 20 of 30 groups of the last {STEPS} steps "
        "(correction.scope=all): equal rewards teach nothing; correction.scope=collapsed corrects only"
    )
    assert not any(said.values())


@pytest.mark.parametrize(
    "groups",
    [
        ("ccc", "rrr"),  # half of them: not most
        ("rrr", "rrr"),  # they were right before
        ("ccw", "rcw"),  # something is left to compare with
        ("sss",),
    ],
)
def test_other_corrections_are_not_said(groups):
    watch = CorrectionWatch(CorrectionConfig())
    assert not any(watch.see(number, corrected(*groups)) for number in range(3 * STEPS))


def test_only_the_last_steps_count_and_the_scope_is_named():
    watch = CorrectionWatch(CorrectionConfig(scope="collapsed"))
    for number in range(5 * STEPS):
        assert not watch.see(number, corrected("rrw"))
    said = [sentence for number in range(STEPS) for sentence in watch.see(number, corrected("ccc"))]
    [sentence] = said
    assert sentence.startswith("step 5: correction made every response right in 6 of 10 groups")
    assert sentence.endswith("correction.scope=one corrects one response of each group that has none right")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:.*use_reentrant.*")
def test_a_run_says_it_while_it_trains(config, monkeypatch, capsys):
    """Solutions in the place of every wrong response, or of one in each group that has none right."""
    monkeypatch.setattr(watch_module, "STEPS", 2)
    for scope in ("all", "one"):
        correction = CorrectionConfig(mix={"solution": 1.0}, scope=scope)
        train(replace(config, seed=3, correction=correction, output=f"{config.output}-{scope}"))
        said = [line for line in capsys.readouterr().err.splitlines() if "correction made every response right" in line]
        assert len(said) == (scope == "all")
