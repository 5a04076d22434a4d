"""Comparing two results: differences, intervals and p-values by hand, and pairs that are none."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_grpo.data.templates import TEMPLATES
from edge_grpo.evaluation.compare import compare
from edge_grpo.evaluation.evaluate import Evaluation, ExampleResult
from edge_grpo.evaluation.result import Protocol, Result, SetResult


def make(sets: Mapping[str, Sequence[int]], *, k: int = 1, weights: str = "w", **protocol: object) -> Result:
    """A result with so many of k correct for each problem; all wrong answers differ."""
    settings = {"template": TEMPLATES["chat"].to_dict(), "temperature": 0.1, "max_tokens": 9, "seed": 0, "engine": "e"}
    parts = {}
    for name, counts in sets.items():
        results = tuple(
            ExampleResult(
                i,
                ("correct",) * count + ("wrong",) * (k - count),
                (5,) * k,
                (False,) * k,
                ("1",) * count + ("2",) * (k - count),
                (1,) * (k - count) if 0 < count < k else (),
            )
            for i, count in enumerate(counts)
        )
        parts[name] = SetResult(name, f"{name} of {len(counts)}", len(counts), [], Evaluation(k, results))
    model = {"name": weights, "weights": weights, "precision": "float32"}
    return Result(model, Protocol(generations=k, **(settings | protocol)), parts, {}, {"math-verify": "1"})


def test_differences_worked_by_hand():
    before = make({"s": [0, 0, 0, 0, 0, 0, 1, 1], "t": [0, 1]}, weights="a")
    after = make({"s": [1, 1, 1, 1, 1, 0, 0, 1], "t": [1, 1]}, weights="b")
    found = compare(before, after)
    row = found.sets["s"]
    assert (row.problems, row.first, row.second) == (8, 2 / 8, 6 / 8)
    assert row.difference.value == pytest.approx(0.5)
    assert (row.better, row.worse) == (5, 1)
    assert row.p_value == pytest.approx(14 / 64)  # McNemar's exact test of 5 against 1
    assert row.difference.low < 0.5 < row.difference.high
    assert (found.micro.problems, found.micro.better, found.micro.worse) == (10, 6, 1)
    assert found.micro.difference.value == pytest.approx(5 / 10)
    assert (found.micro.first, found.micro.second) == (pytest.approx(0.3), pytest.approx(0.8))
    assert found.micro.p_value == pytest.approx(2 * (1 + 7) / 128)
    assert found.macro.difference.value == pytest.approx((4 / 8 + 1 / 2) / 2)
    assert (found.macro.first, found.macro.second) == (pytest.approx((2 / 8 + 1 / 2) / 2), pytest.approx(7 / 8))
    assert math.isnan(found.macro.p_value)
    assert found.others == {}
    assert found.notes == []
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["macro"]["p_value"] is None


def test_several_responses_a_problem_are_compared_by_their_shares():
    found = compare(make({"s": [0, 2, 4]}, k=4, weights="a"), make({"s": [3, 3, 4]}, k=4, weights="b"))
    row = found.sets["s"]
    assert row.difference.value == pytest.approx(4 / 12)
    assert row.p_value == pytest.approx(2 / 4)  # of (3, 1) with any signs, those that reach 4
    assert list(found.others) == ["pass@2", "pass@4", "maj@2", "maj@4"]
    assert found.others["pass@4"].value == pytest.approx(1 / 3)


def test_pairing_narrows_the_interval():
    """Two models that solve the same hard problems: the difference is far better known than either accuracy."""
    first = [0, 1] * 50
    second = [*first[:90], *[1] * 10]  # 5 more
    paired = compare(make({"s": first}, weights="a"), make({"s": second}, weights="b")).sets["s"].difference
    assert paired.low > 0
    low, high = make({"s": second}).estimates()[1]["accuracy"][1:]
    assert paired.high - paired.low < (high - low) / 2


def test_different_numbers_of_responses_are_brought_to_one_unit():
    found = compare(make({"s": [1, 0]}, k=2, weights="a"), make({"s": [2, 3]}, k=3, weights="b"))
    assert found.sets["s"].difference.value == pytest.approx((1 / 6 + 1) / 2)
    assert found.sets["s"].better == 2
    assert found.sets["s"].p_value == pytest.approx(2 / 4)
    assert list(found.others) == ["pass@2", "maj@2"]
    assert found.notes == ["generations differs: 2 and 3"]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=9))
def test_swapping_the_two_changes_the_sign_alone(pairs):
    first, second = (make({"s": [pair[i] for pair in pairs]}, k=2, weights=str(i)) for i in (0, 1))
    there, back = compare(first, second).sets["s"], compare(second, first).sets["s"]
    assert there.difference.value == pytest.approx(-back.difference.value)
    assert there.difference.low == pytest.approx(-back.difference.high)
    assert (there.better, there.worse, there.p_value) == (back.worse, back.better, back.p_value)


def test_a_result_does_not_differ_from_itself():
    result = make({"s": [0, 1] * 15})
    found = compare(result, result)
    assert found.sets["s"].p_value == 1
    assert found.sets["s"].difference.value == 0
    # 30 problems on which nothing differed do not prove that nothing ever would.
    assert found.sets["s"].difference.high == pytest.approx(0.1157, abs=1e-4)
    assert found.notes == ["both results are from the same weights"]


def test_what_else_differs_becomes_a_note():
    first, second = make({"s": [1]}, weights="a"), make({"s": [1]}, weights="b", max_tokens=99, seed=3, tolerance=0.01)
    first.versions, second.versions = {"torch": "1", "vllm": "3"}, {"torch": "2", "python": "3"}
    second.grader = {"math-verify": "2"}
    notes = compare(first, second).notes
    assert notes[:3] == ["max_tokens differs: 9 and 99", "tolerance differs: 0.0 and 0.01", "torch differs: 1 and 2"]
    assert "graded by different versions" in notes[3]
    assert len(notes) == 4


def unfinished() -> Result:
    result = make({"s": [1, 1]})
    result.sets["s"].problems = 3
    return result


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (make({"t": [1, 1]}), "over the same sets; got s and t"),
        (make({"s": [1, 1], "t": [1]}), "over the same sets; got s and s, t"),
        (make({"s": [1, 1, 1]}), "same problems and answers; they differ in s: 2 problems of s and 3 of s"),
        (make({"s": [1, 1]}, template=TEMPLATES["r1"].to_dict()), r"same template; got chat \(.*\) and r1 \("),
        (unfinished(), "the second result is not finished; finish it with edge-grpo eval"),
    ],
)
def test_what_cannot_be_paired_is_refused(second, message):
    with pytest.raises(ValueError, match=message):
        compare(make({"s": [1, 1]}), second)
