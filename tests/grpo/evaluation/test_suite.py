"""Suites: chunks and their seeds, resuming, grading again."""

from __future__ import annotations

import dataclasses
import json
from contextlib import closing
from pathlib import Path

import pytest
from two_sets import MODEL, PROMPTS, PROTOCOL, SeededEngine, begin, finish, prompts_of

from edge_grpo.data.templates import TEMPLATES
from edge_grpo.evaluation import suite
from edge_grpo.evaluation.result import Result
from edge_grpo.evaluation.suite import data_fingerprint
from edge_grpo.grading.answers import Grader
from edge_grpo.types import Example, Prompt


def test_chunks_have_seeds_of_their_own(grader):
    engine = SeededEngine()
    assert finish(begin(), engine, grader) == ["one", "one", "one", "two"]
    assert [size for size, _ in engine.calls] == [6, 6, 2, 4]  # two generations of 3, 3, 1 and 2 problems
    assert len({seed for _, seed in engine.calls}) == 4


def test_answers_are_looked_for_where_the_protocol_says(grader):
    result = begin(answer="line")
    finish(result, SeededEngine(), grader)
    assert result.sets["one"].evaluation.outcomes["unparseable"] == 14  # the engine writes boxes


def test_an_interrupted_evaluation_goes_on_to_the_same_result(grader, tmp_path):
    path = tmp_path / "result.json"
    whole = begin()
    finish(whole, SeededEngine(), grader)
    first = begin()
    with pytest.raises(KeyboardInterrupt):
        finish(first, SeededEngine(fail_at=2), grader, path)
    saved = Result.load(path)
    assert not saved.is_complete
    assert len(saved.sets["one"].evaluation.results) == 6
    assert "micro" not in json.loads(path.read_text())  # nothing that could be taken for a result
    second, engine = begin(), SeededEngine()
    suite.resume(second, saved, path)
    assert finish(second, engine, grader, path) == ["one", "two"]
    assert second == whole
    assert Result.load(path) == whole
    assert finish(second, SeededEngine(fail_at=0), grader) == []  # a finished one asks nothing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.7}, r"temperature: 0\.7 now, 0\.6 in the file"),
        ({"generations": 3}, "generations: 3 now, 2 in the file"),
        ({"seed": 5}, "seed: 5 now, 4 in the file"),
        ({"chunk": 4}, "chunk: 4 now, 3 in the file"),
        ({"answer": "hash"}, "answer: 'hash' now, 'box' in the file"),
        ({"reasoning": "ignore"}, "reasoning: 'ignore' now, 'auto' in the file"),
        ({"tolerance": 0.1}, r"tolerance: 0\.1 now, 0\.0 in the file"),
        ({"template": TEMPLATES["r1"].to_dict()}, "template: 'r1' now, 'qwen_math' in the file"),
    ],
)
def test_another_evaluation_is_not_resumed(change, message, tmp_path):
    with pytest.raises(
        ValueError, match=f"x.json holds another evaluation and cannot be resumed by this one:\n  {message}"
    ):
        suite.resume(begin(**change), begin(), Path("x.json"))


def test_other_weights_or_data_are_not_resumed():
    other = begin()
    other.model = MODEL | {"weights": "other"}
    with pytest.raises(ValueError, match="weights: 'abc' now, 'other' in the file"):
        suite.resume(begin(), other, Path("x.json"))
    other = begin()
    other.sets["two"].fingerprint = "0"
    with pytest.raises(ValueError, match="data of two: "):
        suite.resume(begin(), other, Path("x.json"))
    other = begin()
    other.versions["torch"] = "1.0"
    with pytest.raises(ValueError, match=r"version of torch: '.*' now, '1\.0' in the file"):
        suite.resume(begin(), other, Path("x.json"))
    moved = begin()
    moved.model = MODEL | {"name": "the same weights elsewhere"}
    suite.resume(begin(), moved, Path("x.json"))


def test_a_problem_without_an_answer_is_an_error_before_anything_is_asked():
    prompts = {"one": [*prompts_of(2), Prompt(Example(8, "?"), "?", (1,))]}
    with pytest.raises(ValueError, match=r"1 of 3 examples have no answer to compare with \(the first is row 8"):
        suite.begin(MODEL, PROTOCOL, prompts, {"one": "a.json"}, {"one": []})


def test_the_fingerprint_knows_rows_problems_and_all_accepted_answers():
    def of(*examples: Example) -> str:
        return data_fingerprint(examples)

    example = Example(0, "p", "1")
    others = [
        Example(1, "p", "1"),
        Example(0, "q", "1"),
        Example(0, "p", "2"),
        Example(0, "p", "1", accepted_answers=("1", "2")),
    ]
    assert of(example) == of(Example(0, "p", "1", "a solution", {"difficulty": 3.0}))
    assert len({of(example), of(), of(example, example), *map(of, others)}) == 7


def test_answers_are_graded_again(grader):
    result = begin()
    finish(result, SeededEngine(), grader)
    examples = {name: [prompt.example for prompt in own] for name, own in PROMPTS.items()}
    assert suite.grade_again(result, examples, grader) == result
    # A result whose outcomes a worse grader decided.
    part = result.sets["one"].evaluation
    bad = tuple(dataclasses.replace(r, outcomes=("wrong", "wrong"), wrong_votes=()) for r in part.results)
    worse = dataclasses.replace(result.sets["one"], evaluation=dataclasses.replace(part, results=bad))
    stale = dataclasses.replace(result, sets=result.sets | {"one": worse}, grader={"math-verify": "0.1"})
    assert suite.grade_again(stale, examples, grader) == result
    with closing(Grader(tolerance=0.5)) as lenient:
        again = suite.grade_again(result, examples, lenient)
    assert again.protocol == dataclasses.replace(result.protocol, tolerance=0.5)
    assert again.sets["one"].evaluation.accuracy == 1.0  # the wrong answers are one more than the right ones
    with pytest.raises(ValueError, match=r"one: a\.json must hold the problems and answers that were asked"):
        suite.grade_again(result, examples | {"one": examples["two"]}, grader)
