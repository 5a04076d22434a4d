"""The result file: written whole, read again, refused where it is something else; the estimates of a result."""

from __future__ import annotations

import json

import pytest
from two_sets import SeededEngine, begin, finish

from edge_grpo.evaluation.estimators import Estimate
from edge_grpo.evaluation.result import Result


def test_a_result_survives_its_file(grader, tmp_path):
    path = tmp_path / "deep" / "result.json"
    result = begin()
    finish(result, SeededEngine(), grader, path)
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]  # no half-written one beside it
    again = Result.load(path)
    assert again == result
    assert again.estimates() == result.estimates()
    written = json.loads(path.read_text())
    part = result.sets["one"].evaluation
    assert written["complete"] is True
    assert written["sets"]["one"]["accuracy"]["value"] == part.accuracy
    assert written["sets"]["two"]["left_out"] == [9]
    assert written["sets"]["one"]["outcomes"]["correct"] == part.outcomes["correct"]
    assert written["sets"]["one"]["lengths"]["mean"] == part.mean_length
    assert written["micro"]["pass@2"].keys() == {"value", "low", "high"}
    assert {"torch", "transformers", "python"} <= written["versions"].keys()
    assert {"math-verify", "sympy"} <= written["grader"].keys()
    assert (written["protocol"]["seed"], written["model"]["weights"]) == (4, "abc")
    # A problem a line, so that files can be read and compared as text.
    assert sum(line.startswith('        {"index": ') for line in path.read_text().splitlines()) == 9


def test_a_chunk_holds_at_least_one_problem():
    with pytest.raises(ValueError, match="chunk must be at least 1; got 0"):
        begin(chunk=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not an evaluation result of edge-grpo eval"),
        ("[]", "is not an evaluation result of edge-grpo eval"),
        ('{"examples": 3}', "is not an evaluation result of edge-grpo eval"),
        ('{"kind": "edge-grpo evaluation", "format": 99}', "of format 2; got 'edge-grpo evaluation' of format 99"),
        ('{"kind": "edge-grpo evaluation", "format": 2}', "is damaged: KeyError: 'protocol'"),
    ],
)
def test_files_of_another_kind_are_refused(text, message, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Result.load(path)
    with pytest.raises(FileNotFoundError, match="no evaluation result"):
        Result.load(tmp_path / "none.json")


def test_estimates_of_a_whole_result(grader):
    result = begin()
    finish(result, SeededEngine(), grader)
    per_set, micro, macro = result.estimates()
    one, two = (part.evaluation.accuracy for part in result.sets.values())
    assert micro["accuracy"].value == pytest.approx((7 * one + 2 * two) / 9)
    assert macro["accuracy"].value == pytest.approx((one + two) / 2)
    assert all(isinstance(estimate, Estimate) for estimate in per_set["one"].values())
