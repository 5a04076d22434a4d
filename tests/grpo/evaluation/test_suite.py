"""Suites: chunks and seeds, the result file, resuming, grading again, and answer sheets on synthetic and real sets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from bpe import make_tokenizer
from paths import SHARED_DATA

from edge_grpo.data.sources import load_examples, suite_sets
from edge_grpo.data.templates import TEMPLATES
from edge_grpo.evaluation import suite
from edge_grpo.evaluation.estimators import Estimate
from edge_grpo.evaluation.suite import (
    Protocol,
    Result,
    check_sheets,
    data_fingerprint,
    gold_answer,
    near_answer,
    wrong_answer,
)
from edge_grpo.grading.answers import Grader
from edge_grpo.types import Example, Prompt, Provenance, Response, Sampling

SUITE = SHARED_DATA / "evaluation_suite"
TEMPLATE = TEMPLATES["qwen_math"]
PROTOCOL = Protocol(
    template=TEMPLATE.to_dict(), generations=2, temperature=0.6, max_tokens=20, seed=4, engine="scripted", chunk=3
)
MODEL = {"name": "m", "weights": "abc", "precision": "float32"}
TOKENIZER = make_tokenizer()


class SeededEngine:
    """Answers the number in a prompt's only token, or, for odd draws of the seed and the place, one more."""

    def __init__(self, *, fail_at: int | None = None) -> None:
        self.calls: list[tuple[int, int]] = []
        self.fail_at = fail_at

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int) -> list[Response]:
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append((len(prompts), seed))
        assert sampling == Sampling(max_tokens=20, temperature=0.6)
        return [self._answer(ids[0] + (seed >> place) % 2) for place, ids in enumerate(prompts)]

    def _answer(self, number: int) -> Response:
        ids = tuple(TOKENIZER.encode(f"\\boxed{{{number}}}"))
        zeros = (0.0,) * len(ids)
        return Response(ids, zeros, zeros, (Provenance.SAMPLED,) * len(ids), "stop")

    def update_weights(self, model: object) -> None: ...

    def sleep(self) -> None: ...

    def close(self) -> None: ...


def prompts_of(count: int, first: int = 100) -> list[Prompt]:
    numbers = range(first, first + count)
    return [Prompt(Example(i, f"What is {n}?", str(n)), "?", (n,)) for i, n in enumerate(numbers)]


PROMPTS = {"one": prompts_of(7), "two": prompts_of(2, 200)}


def begin(**protocol: object) -> Result:
    own = dataclasses.replace(PROTOCOL, **protocol)
    return suite.begin(MODEL, own, PROMPTS, {"one": "a.json", "two": "b.json"}, {"one": [], "two": [9]})


@pytest.fixture
def finish(grader: Grader) -> Callable[..., list[str]]:
    """Return a function that runs a result to its end and returns the sets of the chunks that this took."""

    def finish(result: Result, engine: SeededEngine, path: Path | None = None) -> list[str]:
        chunks: list[str] = []

        def after(name: str) -> None:
            chunks.append(name)
            if path is not None:
                result.save(path)

        suite.run(result, PROMPTS, TEMPLATE, engine, TOKENIZER, grader, after_chunk=after)
        return chunks

    return finish


# ---- Running and the file


def test_chunks_have_seeds_of_their_own(finish):
    engine = SeededEngine()
    assert finish(begin(), engine) == ["one", "one", "one", "two"]
    assert [size for size, _ in engine.calls] == [6, 6, 2, 4]  # two generations of 3, 3, 1 and 2 problems
    assert len({seed for _, seed in engine.calls}) == 4


def test_a_result_survives_its_file(finish, tmp_path):
    path = tmp_path / "deep" / "result.json"
    result = begin()
    finish(result, SeededEngine(), path)
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


def test_an_interrupted_evaluation_goes_on_to_the_same_result(finish, tmp_path):
    path = tmp_path / "result.json"
    whole = begin()
    finish(whole, SeededEngine())
    first = begin()
    with pytest.raises(KeyboardInterrupt):
        finish(first, SeededEngine(fail_at=2), path)
    saved = Result.load(path)
    assert not saved.is_complete
    assert len(saved.sets["one"].evaluation.results) == 6
    assert "micro" not in json.loads(path.read_text())  # nothing that could be taken for a result
    second, engine = begin(), SeededEngine()
    suite.resume(second, saved, path)
    assert finish(second, engine, path) == ["one", "two"]
    assert second == whole
    assert Result.load(path) == whole
    assert finish(second, SeededEngine(fail_at=0)) == []  # a finished one asks nothing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.7}, r"temperature: 0\.7 now, 0\.6 in the file"),
        ({"generations": 3}, "generations: 3 now, 2 in the file"),
        ({"seed": 5}, "seed: 5 now, 4 in the file"),
        ({"chunk": 4}, "chunk: 4 now, 3 in the file"),
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


def test_a_chunk_holds_at_least_one_problem():
    with pytest.raises(ValueError, match="chunk must be at least 1; got 0"):
        begin(chunk=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not an evaluation result of edge-grpo eval"),
        ("[]", "is not an evaluation result of edge-grpo eval"),
        ('{"examples": 3}', "is not an evaluation result of edge-grpo eval"),
        ('{"kind": "edge-grpo evaluation", "format": 99}', "of format 1; got 'edge-grpo evaluation' of format 99"),
        ('{"kind": "edge-grpo evaluation", "format": 1}', "is damaged: KeyError: 'protocol'"),
    ],
)
def test_files_of_another_kind_are_refused(text, message, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Result.load(path)
    with pytest.raises(FileNotFoundError, match="no evaluation result"):
        Result.load(tmp_path / "none.json")


def test_the_fingerprint_knows_rows_problems_and_all_accepted_answers():
    def of(*examples: Example) -> str:
        return data_fingerprint(examples)

    example = Example(0, "p", "1")
    others = [
        Example(1, "p", "1"),
        Example(0, "q", "1"),
        Example(0, "p", "2"),
        Example(0, "p", "1", extra={"accepted_answers": ("1", "2")}),
    ]
    assert of(example) == of(Example(0, "p", "1", "a solution", {"difficulty": 3.0}))
    assert len({of(example), of(), of(example, example), *map(of, others)}) == 7


def test_answers_are_graded_again(grader, finish, tmp_path):
    result = begin()
    finish(result, SeededEngine())
    examples = {name: [prompt.example for prompt in own] for name, own in PROMPTS.items()}
    assert suite.grade_again(result, examples, grader) == result
    # A result whose outcomes a worse grader decided.
    part = result.sets["one"].evaluation
    bad = tuple(dataclasses.replace(r, outcomes=("wrong", "wrong"), wrong_votes=()) for r in part.results)
    worse = dataclasses.replace(result.sets["one"], evaluation=dataclasses.replace(part, results=bad))
    stale = dataclasses.replace(result, sets=result.sets | {"one": worse}, grader={"math-verify": "0.1"})
    assert suite.grade_again(stale, examples, grader) == result
    with pytest.raises(ValueError, match=r"one: a\.json must hold the problems and answers that were asked"):
        suite.grade_again(result, examples | {"one": examples["two"]}, grader)


def test_estimates_of_a_whole_result(finish):
    result = begin()
    finish(result, SeededEngine())
    per_set, micro, macro = result.estimates()
    one, two = (part.evaluation.accuracy for part in result.sets.values())
    assert micro["accuracy"].value == pytest.approx((7 * one + 2 * two) / 9)
    assert macro["accuracy"].value == pytest.approx((one + two) / 2)
    assert all(isinstance(estimate, Estimate) for estimate in per_set["one"].values())


# ---- Sets


def test_the_sets_of_a_suite(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([{"problem": "p", "answer": "1"}])
    saved = str(tmp_path / "saved")
    DatasetDict({"b": rows, "a": rows}).save_to_disk(saved)
    assert suite_sets(saved) == {"b": f"{saved}@b", "a": f"{saved}@a"}
    assert len(load_examples(suite_sets(saved)["a"], {})) == 1
    files = tmp_path / "files"
    files.mkdir()
    (files / "amc.jsonl").write_text('{"problem": "p", "answer": "1"}')
    (files / "notes.txt").write_text("")
    assert suite_sets(str(files)) == {"amc": str(files / "amc.jsonl")}
    rows.save_to_disk(str(tmp_path / "single"))
    (tmp_path / "empty").mkdir()
    for name in ("single", "empty"):
        with pytest.raises(ValueError, match="holds no evaluation sets"):
            suite_sets(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="no folder"):
        suite_sets(str(tmp_path / "none"))


# ---- Answer sheets


def example(index: int, *accepted: str) -> Example:
    return Example(index, "?", accepted[0] if accepted else None, extra={"accepted_answers": accepted})


def test_wrong_answers_are_near_where_they_can_be():
    assert [wrong_answer(example(0, *a)) for a in (("025",), ("-3",), ("1", "4"), ("x",), ("1", "x"))] == [
        "26",
        "-2",
        "5",
        "987654321",
        "987654321",
    ]
    assert gold_answer(example(0, "1", "4")) == "1"


def test_a_sound_grader_and_what_it_reads_as_text(grader):
    rows = [example(0, "7"), example(1, r"\frac{1}{2}"), example(2, r"\text{even}"), example(3), example(4, "x=", "3")]
    for template in TEMPLATES.values():
        check = check_sheets(rows, template, grader)
        assert check.is_sound
        assert check.gold == {"correct": 4, "wrong": 0, "unparseable": 0, "timed_out": 0}
        assert check.wrong["correct"] == 0
        assert (check.text_only, check.unanswered) == ((2,), (3,))


def test_near_answers_are_one_in_a_thousand_off():
    golds = ("204", "1.5", "0", "x=5", r"$\frac{1}{2}$", "1e-9")
    near = ["204.204", "1.5015", "0.001", "5.005", r"1.001 \cdot (\frac{1}{2})", r"1.001 \cdot (1e-9)"]
    assert [near_answer(example(0, gold)) for gold in golds] == near


def test_a_grader_that_takes_small_numbers_for_zero_is_found_out(grader):
    def rounding(pairs):
        outcomes = zip(pairs, grader(pairs), strict=True)
        return ["correct" if accepted == ("1e-9",) else outcome for (accepted, _), outcome in outcomes]

    rows = [example(0, "0"), example(1, "1"), example(2, "k=1"), example(3, "1e-9")]
    assert check_sheets(rows, TEMPLATE, grader).accepted == ()
    check = check_sheets(rows, TEMPLATE, rounding)
    assert (check.accepted, check.zeros["correct"], check.ones["correct"], check.near["correct"]) == ((3,), 2, 3, 1)


def test_misjudged_rows_are_named(grader):
    def misjudging(pairs):
        """Rejects 7 where it is right and accepts 9 where 8 is."""
        flipped = {(("7",), "7"): "wrong", (("8",), "9"): "correct"}
        return [flipped.get(pair, outcome) for pair, outcome in zip(pairs, grader(pairs), strict=True)]

    check = check_sheets([example(0, "7"), example(1, "8")], TEMPLATE, misjudging)
    assert (check.rejected, check.accepted) == ((0,), (1,))
    assert not check.is_sound


@pytest.mark.skipif(not SUITE.is_dir(), reason="no copy of the evaluation suite in ../shared/data")
@pytest.mark.parametrize(
    ("name", "size", "text_only"),
    [
        ("aime", 30, ()),
        ("amc", 83, ()),
        # Words, which are compared as such: Evelyn, east, even, ellipse, Navin.
        ("math", 500, (4, 97, 120, 358, 398)),
        # A derivative by a symbol that sympy's LaTeX does not know, and equations of names of several letters.
        ("minerva", 272, (27, 242, 249, 251)),
        # A sentence, and a variable before an interval.
        ("olympiad_bench", 675, (73, 96)),
    ],
)
def test_a_perfect_and_a_wrong_sheet_on_the_papers_sets(grader, name, size, text_only):
    examples = load_examples(suite_sets(str(SUITE))[name], {})
    check = check_sheets(examples, TEMPLATE, grader)
    assert check.gold["correct"] == len(examples) == size
    assert check.wrong["correct"] == check.near["correct"] == 0
    assert check.is_sound
    assert check.unanswered == ()
    assert check.text_only == text_only
