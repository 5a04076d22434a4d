"""Answer sheets: wrong answers, misjudged rows, and the sheets of the paper's sets where there is a copy."""

from __future__ import annotations

import pytest
from paths import SHARED_DATA

from edge_grpo.data.sources import load_examples, suite_sets
from edge_grpo.data.templates import TEMPLATES
from edge_grpo.evaluation.sheets import check_sheets, gold_answer, wrong_answer
from edge_grpo.types import Example

SUITE = SHARED_DATA / "evaluation_suite"
TEMPLATE = TEMPLATES["qwen_math"]


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
        # Symbols that sympy's LaTeX does not know, and pairs of names.
        ("minerva", 272, (27, 264, 266, 270)),
        ("olympiad_bench", 675, (34, 73, 96)),
    ],
)
def test_a_perfect_and_a_wrong_sheet_on_the_papers_sets(grader, name, size, text_only):
    examples = load_examples(suite_sets(str(SUITE))[name], {})
    check = check_sheets(examples, TEMPLATE, grader)
    assert check.gold["correct"] == len(examples) == size
    assert check.wrong["correct"] == 0
    assert check.is_sound
    assert check.unanswered == ()
    assert check.text_only == text_only
