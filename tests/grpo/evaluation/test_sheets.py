"""Answer sheets: wrong answers, misjudged rows, and the sheets of the paper's sets where there is a copy."""

from __future__ import annotations

import pytest
from paths import SHARED_DATA

from edge_grpo.data.sources import load_examples, suite_sets
from edge_grpo.data.templates import TEMPLATES
from edge_grpo.evaluation.sheets import check_sheets, gold_answer, near_answer, wrong_answer
from edge_grpo.types import Example

SUITE = SHARED_DATA / "evaluation_suite"
TEMPLATE = TEMPLATES["qwen_math"]


def example(index: int, *accepted: str) -> Example:
    return Example(index, "?", accepted[0] if accepted else None, accepted_answers=accepted)


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
