r"""Answers: what counts as right, how long that may take, and that nothing a model writes can stop the run."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_grpo.grading.answers import MAX_ANSWER_LENGTH, Grader
from edge_grpo.text import last_box
from edge_grpo.types import Outcome


@pytest.fixture
def texts_alone(monkeypatch) -> Grader:
    """A grader whose processes cannot be started: what it decides, it decides by the texts."""
    grader = Grader()
    monkeypatch.setattr(grader._pool, "map", None)
    return grader


def judge(grader: Grader, accepted: Sequence[str], answer: str | None) -> Outcome:
    [outcome] = grader([(accepted, answer)])
    return outcome


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("204", "204"),
        ("025", "25"),
        ("-7", "-07"),
        ("0", "-0"),
        ("9" * 5000, "9" * 5000),  # more digits than Python converts to an integer
        ("$12\\sqrt{3}$", r"12 \sqrt{3}"),
        (r"\frac{14}{3}", r"\dfrac{14}{3}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \frac{\pi}{2})"),
        (r"3\mid n", r"3 \mid n"),
        ("9.6\n", "9.6"),
        ("10,000", "10{,}000"),
        (r"10\,000", "10000"),
        ("True", "true"),
        (r"\text{Evelyn}", "Evelyn"),
        ("0 1 1\n1 0 0", "0 1 1\n1 0 0"),
        ("5.", "5"),
        (r"\boxed{5}", "5"),
    ],
)
def test_same_answers_are_settled_texts_alone(texts_alone, gold, answer):
    assert judge(texts_alone, [gold], answer) == "correct"


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("5", "6"),
        ("12", "1"),
        ("7", "-7"),
        ("0 1 0", "0 0 0"),  # as products both would be 0
        ("1 1\n0 1", "1 1\n1 0"),
        ("eaten", "neate"),  # as products of letters both would be the same
        ("Logan is a fool, Sofia is a sage", "Logan is a sage, Sofia is a fool"),
    ],
)
def test_other_integers_words_and_rows_are_wrong_texts_alone(texts_alone, gold, answer):
    assert judge(texts_alone, [gold], answer) == "wrong"


@pytest.mark.parametrize(
    ("gold", "answer", "outcome"),
    [
        (r"\frac{14}{3}", "14/3", "correct"),
        ("142", "142.0", "correct"),
        ("$69$,$84$", "84, 69", "correct"),
        ("$\\boxed{a=170}$", "170", "correct"),
        ("4.4e7", "44000000", "correct"),
        ("90^\\circ", "90", "correct"),
        ("n - 1", "-1 + n", "correct"),
        ("5", "x = 5", "correct"),
        ("7", r"7 \text{ cm}", "correct"),
        (r"12\sqrt{3}", "12", "wrong"),
        ("(1,2)", "(2,1)", "wrong"),
        ("5", "five", "wrong"),
        ("(-1,1)(3,3)(19,-1)(53, -17)", "-17", "wrong"),  # a part of the answer is not the answer
        ("0.333", "1/3", "wrong"),
        ("5", r"784 \Rightarrow \textbf{(E)}", "wrong"),
        ("784", r"784 \Rightarrow \textbf{(E)}", "correct"),
        ("5", r"784 \Rightarrow", "unparseable"),
    ],
)
def test_math_verify_decides_the_rest(grader, gold, answer, outcome):
    assert judge(grader, [gold], answer) == outcome


@pytest.mark.parametrize("answer", [None, "", "  ", "$$", r"\left.\right."])
def test_no_answer_is_unparseable(texts_alone, answer):
    assert judge(texts_alone, ["5"], answer) == "unparseable"


def test_any_of_several_accepted_answers_is_right(texts_alone, grader):
    assert [judge(texts_alone, ["0.01", "0.02"], answer) for answer in ("0.02", "0.01", "")] == [
        "correct",
        "correct",
        "unparseable",
    ]
    several = ["(1,2)", r"\frac{1}{2}", "red wine"]
    found = grader([(several, answer) for answer in ("0.5", "(1, 2.0)", "0.25", r"\text{Red wine}", "&&")])
    assert found == ["correct", "correct", "wrong", "correct", "wrong"]  # "&&" is readable as words, and wrong as such


def test_a_huge_answer_is_not_parsed(texts_alone):
    assert judge(texts_alone, ["x"], "(" * (MAX_ANSWER_LENGTH + 1)) == "unparseable"
    assert judge(texts_alone, ["x" * 2000], "x" * 2000) == "correct"  # unless it is what is wanted


def test_each_comparison_is_made_once(grader, monkeypatch):
    asked: list[tuple[str, str]] = []
    original = grader._pool.map
    monkeypatch.setattr(grader._pool, "map", lambda calls: asked.extend(calls) or original(calls))
    pairs = [(["17.5"], "35/2"), (["17.5"], r"\frac{35}{2}"), (["17.5"], "35/2"), (["17.5", "x"], "$35/2$")]
    assert grader(pairs) == ["correct"] * 4
    assert grader(pairs) == ["correct"] * 4
    assert asked == [("17.5", "35/2"), ("17.5", r"\frac{35}{2}"), ("x", "35/2")]


# ---- What cannot be compared in time -------------------------------------------------------------------------------

MEGABYTE = 1 << 20
OVERRUN = {
    "tower of powers": "9^{9^{9^{9^{9}}}}",
    "factorial": r"\lfloor 100000000! / 7 \rfloor",
    "factorials": "(((10!)!)!)!",
    "memory": r"\lfloor 2^{2^{37}} / 3 \rfloor",
    "product": r"\prod_{n=1}^{10^{9}} n",
    "nested parentheses": "(" * 400,
    "nested fractions": r"\frac{1}{" * 90 + "2" + "}" * 90,
}
# Compared by their size, without being written out.
LARGE = {
    "factorial": "100000000!",
    "power": "2^{2^{37}}",
    "binomial": r"\binom{10^{10}}{5\cdot 10^{9}}",
}
UNREADABLE = {
    "nested roots": r"\sqrt{" * 140 + "2" + "}" * 140,
    "a megabyte of braces": "{" * (MEGABYTE // 2) + "}" * (MEGABYTE // 2),
    "a megabyte of sums": r"\frac{1}{2}+" * (MEGABYTE // 12) + "1",
    "a megabyte of boxes": r"\boxed{" * (MEGABYTE // 8) + "}" * (MEGABYTE // 8),
    "a megabyte of blanks": "x" + " " * MEGABYTE + "&",
    "nothing but control characters": "\0\1\2",
    "half a surrogate pair": "\ud800",
}


def test_what_explodes_times_out_and_the_rest_is_judged():
    """Half a second each; "memory" asks for 16 GB. On a busy machine even the rest may take that long."""
    grader = Grader(timeout=0.5)
    sane = {r"\frac{1}{2}": "correct", "0.25": "wrong", "1/2+0": "correct"}
    answers = [answer for text in OVERRUN.values() for answer in (text, *sane)]
    outcomes = dict(zip(answers, grader([(["0.5"], answer) for answer in answers]), strict=True))
    grader.close()
    assert {name: outcomes[text] for name, text in OVERRUN.items()} == dict.fromkeys(OVERRUN, "timed_out")
    assert all(outcomes[answer] in (expected, "timed_out") for answer, expected in sane.items())


@pytest.mark.parametrize("text", LARGE.values(), ids=LARGE)
def test_what_is_large_is_compared_by_its_size(grader, text):
    assert judge(grader, ["0.5"], text) == "wrong"


@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE)
def test_what_is_no_mathematics_is_unparseable_and_holds_nobody_up(grader, text):
    completion = f"So it is \\boxed{{{text}}}."
    assert judge(grader, ["17"], last_box(completion)) == "unparseable"


def test_outcomes_do_not_depend_on_processes_or_order():
    golds = [r"\frac{1}{2}", "(1,2)", r"\sqrt{8}", "x^2-1", r"\{1,2\}", "90^\\circ"]
    answers = ["0.5", "(1, 2)", r"2\sqrt{2}", "(x-1)(x+1)", r"\{2,1\}", "90", "&"]
    pairs = [([gold], answer) for gold in golds for answer in answers]
    expected: list[Outcome] = []
    for workers, seed in ((1, 0), (2, 1), (3, 2)):
        order = random.Random(seed).sample(range(len(pairs)), len(pairs)) if seed else list(range(len(pairs)))
        grader = Grader(workers=workers, timeout=60)
        found = dict(zip(order, grader([pairs[index] for index in order]), strict=True))
        grader.close()
        outcomes = [found[index] for index in range(len(pairs))]
        expected = expected or outcomes
        assert outcomes == expected
    assert len(set(expected)) == 3  # all outcomes but timed_out are among them


def test_judging_works_off_the_main_thread(grader):
    """math-verify's own time limit is a signal, which other threads cannot have."""
    found: list[Outcome] = []
    thread = threading.Thread(target=lambda: found.append(judge(grader, [r"\frac{34}{4}"], "8.5")))
    thread.start()
    thread.join()
    assert found == ["correct"]


alphabet = st.sampled_from("0123456789xyn+-*/^_=,.(){}[]\\$%!&| \nabcfrtqsi")


@settings(deadline=None, max_examples=10)
@given(st.lists(st.text(alphabet, max_size=25), min_size=5, max_size=10))
def test_judging_never_raises(grader, answers):
    outcomes = grader([([r"\frac{1}{2}"], answer) for answer in answers])
    assert set(outcomes) <= {"correct", "wrong", "unparseable", "timed_out"}


@settings(deadline=None, max_examples=100)
@given(st.integers(), st.integers())
def test_integers_are_equal_exactly_when_they_are(gold, answer):
    grader = Grader()
    assert judge(grader, [str(gold)], str(answer)) == ("correct" if gold == answer else "wrong")
    assert judge(grader, [str(gold)], f"\\boxed{{{gold:+d}}}") == "correct"


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (2, 2), (64, 2)])
def test_two_processes_compare_unless_there_is_one_core(monkeypatch, cores, workers):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    assert Grader()._pool.size == workers
    assert Grader(workers=5)._pool.size == 5
