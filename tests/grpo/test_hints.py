"""Corrections by a hint: the first part of the reference solution, which the policy continues."""

from __future__ import annotations

import math

import pytest
from corrections import (
    CONTINUED,
    EOS,
    INJECTED,
    SAMPLING,
    SOLUTION,
    ScriptedEngine,
    corrector,
    decode,
    encode,
    kinds,
    make_corrector,
    prompt,
    sampled,
    wrong,
)

from edge_grpo.collect import find_rejected_solutions
from edge_grpo.config import CorrectionConfig, RewardConfig, TrainConfig
from edge_grpo.data.doubts import doubts
from edge_grpo.grading.rewards import Rewarder

HALF = {"hint_min": 0.5, "hint_max": 0.5}


def test_a_hint_replaces_the_response_and_the_policy_goes_on():
    engine = ScriptedEngine(r"e \boxed{5}.")
    row = prompt(solution=r"2 and 3 make \boxed{5}")  # 22 tokens
    correct = corrector("hint", engine, **HALF)
    [after] = correct([row], [sampled("6")], [wrong()], seed=0)
    assert after.token_ids == (*encode(r"2 and 3 make \boxed{5}."[:11] + r"e \boxed{5}."), EOS)
    assert after.provenance == (*[INJECTED] * 11, *[CONTINUED] * 13)
    assert all(map(math.isnan, after.logprobs[:11]))
    assert after.logprobs[11:13] == (-0.5, -0.6)
    assert (after.finish_reason, after.correction) == ("stop", "hint")
    assert not any(after.superseded)
    [(prompts, sampling, _)] = engine.calls
    assert prompts == [tuple(encode("2+3?\n2 and 3 mak"))]
    assert sampling.max_tokens == correct.latest.max_tokens == 20  # all of max_length: there is no reflection


def test_a_continuation_that_is_cut_off_is_truncated():
    row = prompt(solution="s" * 22)
    [after] = corrector("hint", ScriptedEngine("e " * 20), **HALF)([row], [sampled("6")], [wrong()], seed=0)
    assert after.finish_reason == "length"
    assert len(after.token_ids) == 11 + 20


def test_shares_are_drawn_evenly_and_by_seed_and_key_alone():
    n, length = 400, 40
    rows = [prompt(solution="s" * length)] * n

    def lengths(seed: int) -> list[int]:
        plan = make_corrector("hint", hint_min=0.25, hint_max=0.75).plan(
            rows, [sampled("6")] * n, [wrong()] * n, [0] * n, seed=seed, keys=range(n)
        )
        return [len(one.start.token_ids) for one in plan.continuations]

    first = lengths(0)
    assert (min(first), max(first)) == (10, 30)
    # five standard deviations of the mean of n draws that are even over 20 tokens
    assert sum(first) / n == pytest.approx(20, abs=5 * 20 / math.sqrt(12 * n))
    assert lengths(0) == first
    assert lengths(1) != first
    half = make_corrector("hint").plan(
        rows[200:], [sampled("6")] * 200, [wrong()] * 200, [1] * 200, seed=0, keys=range(200, n)
    )
    assert [len(one.start.token_ids) for one in half.continuations] == first[200:]  # what another process would draw


@pytest.mark.parametrize(
    ("solution", "length"),
    [
        ("s" * 200, SAMPLING.max_tokens),  # 100 tokens would be more than a first attempt may have
        ("ss", 1),  # something is left to do
        ("s", 1),  # and something is given
    ],
)
def test_the_length_of_a_hint_has_bounds(solution, length):
    plan = make_corrector("hint", hint_min=0.9, hint_max=0.9).plan(
        [prompt(solution=solution)], [sampled("6")], [wrong()], [0], seed=0
    )
    assert [len(one.start.token_ids) for one in plan.continuations] == [length]
    assert not plan.fallbacks


def test_reflections_and_hints_are_continued_in_one_call():
    engine = ScriptedEngine("5")
    mixed = corrector(engine=engine, reflect=0.5, hint=0.5)
    n = 40
    after = mixed([prompt()] * n, [sampled("6")] * n, [wrong()] * n, seed=0)
    found = kinds(after)
    assert set(found) == {"reflect", "hint"}
    assert len(engine.calls) == 1
    assert engine.calls[0][1].max_tokens == 20 - len(" No!")
    for one in after:
        start = "6 No!" if one.correction == "reflect" else SOLUTION[:1]
        assert decode(one.token_ids).startswith(start)
        assert sum(one.superseded) == (one.correction == "reflect")  # "6"


def test_rows_without_a_usable_solution_get_no_hint():
    before = sampled("6")
    correct = corrector("hint")
    assert correct([prompt(solution=None)], [before], [wrong()], seed=0)[0] is before
    correct.corrector.rejected_solutions = {0}
    assert correct([prompt()], [before], [wrong()], seed=0)[0] is before


def test_a_hint_is_part_of_the_reasoning():
    correct = make_corrector("hint", reasoning="auto", **HALF)
    plan = correct.plan([prompt(text="2+3?<think>")], [sampled("6")], [wrong()], [0], seed=0)
    assert "</think>" not in decode(plan.continuations[0].start.token_ids)


def test_a_run_needs_solutions_and_checks_them_for_hints(tiny_tokenizer):
    config = TrainConfig(correction=CorrectionConfig(mix={"hint": 1.0}))
    rows = [prompt(solution=None)] * 2
    with pytest.raises(ValueError, match=r"asks for solutions, and 2 of 2 .* or set correction\.mix\.hint=0"):
        doubts(config, rows, [], tiny_tokenizer)
    wrong_solution = [prompt(answer="4"), prompt()]  # a hint of it would lead to another answer
    rewarder = Rewarder(RewardConfig())
    assert find_rejected_solutions(config, wrong_solution, rewarder, quiet=True) == {0}
    rewarder.close()


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.5), (0.5, 1.0), (0.6, 0.4), (math.nan, 0.5)])
def test_shares_lie_between_nothing_and_everything(low, high):
    with pytest.raises(ValueError, match="hint_min and hint_max must be shares between 0 and 1"):
        CorrectionConfig(hint_min=low, hint_max=high)
