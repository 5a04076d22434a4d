r"""Templates, the \boxed{} answers of a text, figures as people read them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_grpo.text import (
    after_reasoning,
    bare_answer,
    boxes,
    clock,
    fill,
    find_answer,
    is_reasoning,
    last_box,
    percent,
)


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        ("{problem}", "1+1"),
        ("Q: {problem}\nA:", "Q: 1+1\nA:"),
        (r"{problem} Put the answer within \boxed{{}}.", r"1+1 Put the answer within \boxed{}."),  # str.format's braces
        (r"{problem} Put the answer within \boxed{}.", r"1+1 Put the answer within \boxed{}."),  # LaTeX's
        (r"\boxed{{{problem}}}", r"\boxed{1+1}"),
        ("} {problem}", "} 1+1"),  # no format string at all
        ("{problem} {other}", "1+1 {other}"),
    ],
)
def test_fill_takes_format_strings_and_plain_latex(template, filled):
    assert fill(template, "problem", "1+1") == filled


@given(st.text())
def test_fill_leaves_the_value_alone(value):
    assert fill("<{problem}>", "problem", value) == f"<{value}>"
    assert fill("<{problem}> {}", "problem", value) == f"<{value}> {{}}"


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        ("no answer", []),
        (r"\boxed{5}", ["5"]),
        (r"\boxed {5}", ["5"]),
        (r"first \boxed{1}, then \boxed{\frac{1}{2}}.", ["1", r"\frac{1}{2}"]),
        (r"\boxed{\{1, 2\}}", [r"\{1, 2\}"]),  # escaped braces are part of the answer
        (r"\boxed{\boxed{5}}", [r"\boxed{5}", "5"]),
        (r"\boxed{5} and \boxed{6", ["5", None]),  # cut off
        (r"} \boxed{5}", ["5"]),
        (r"{ \boxed{5}", ["5"]),
        (r"\boxed{}", [""]),
        (r"\boxed", []),
        (r"\fbox{5}", ["5"]),
        (r"\fbox{5} or \fbox{6}", ["5", "6"]),
        (r"\boxed{5} \fbox{A}", ["5"]),
        (r"\boxed 5", ["5"]),
        (r"\boxed5.", ["5"]),
        (r"so \boxed 12.5, or \boxed B.", ["12.5", "B"]),
        (r"\boxed -3", ["-3"]),
        (r"I will put it in a \boxed environment", []),
        (r"\boxed An", []),
        (r"\boxedtext{5}", []),
        (r"\\boxed{5}", []),  # a line break and the word
    ],
)
def test_boxes_are_matched_as_latex_does(text, contents):
    assert [None if stop is None else text[start:stop] for start, stop in boxes(text)] == contents
    assert last_box(text) == (contents[-1] if contents else None)


@given(st.text(alphabet="ab{}\\$ ", max_size=30), st.text(alphabet="xy {}", max_size=10))
def test_a_balanced_answer_is_found_after_any_text(before, after):
    """Whatever came before, short of a backslash that escapes the box."""
    before = before.rstrip("\\")
    assert last_box(f"{before}\\boxed{{\\frac{{1}}{{2}}}}{after}") == r"\frac{1}{2}"


def test_deep_nesting_takes_one_pass():
    """A matcher that starts anew at each box, or copies each content, would take minutes or gigabytes."""
    depth = 100_000
    assert len(boxes(r"\boxed{" * depth)) == depth
    assert last_box(r"\boxed{" * depth + "5" + "}" * depth) == "5"
    assert bare_answer(r"\boxed{" * depth + " 5 " + " }" * depth) == "5"


@pytest.mark.parametrize(
    ("answer", "bare"),
    [
        (" 8\n", "8"),
        ("$12\\sqrt{3}$", r"12\sqrt{3}"),
        ("$69$,$84$", "69,84"),
        (r"\(x\)", "x"),
        (r"\[ x \]", "x"),
        (r"$\boxed{a=170}$", "a=170"),
        (r"\boxed{\boxed{$7$}}", "7"),
        (r"\boxed{1} or \boxed{2}", r"\boxed{1} or \boxed{2}"),
        (r"\boxed{ \boxed {1} }", "1"),
        (r"\boxed{\boxed{1}+\boxed{2}}", r"\boxed{1}+\boxed{2}"),
        (r"\boxed{5", r"\boxed{5"),
        (r"\fbox{5}", "5"),
        (r"$\boxed 5$", "5"),
        (r"\boxed 5 + 1", r"\boxed 5 + 1"),
        (r"\$5", r"\$5"),
        (r"\{1\}", r"\{1\}"),
        (r"a \\[2pt] b", r"a \\[2pt] b"),  # a line break with its height
    ],
)
def test_bare_answer_takes_off_what_surrounds(answer, bare):
    assert bare_answer(answer) == bare


@pytest.mark.parametrize(
    ("style", "text", "answer"),
    [
        ("box", r"\boxed{4} or \boxed{5}", "5"),
        ("box", "#### 5", None),
        ("hash", "3 + 2 = 5\n#### 5", "5"),
        ("hash", "#### 4\nno:\n####5\n", "5"),
        ("hash", r"#### \boxed{5}", "5"),
        ("hash", r"\boxed{5}", None),
        ("hash", "#### ", ""),
        ("line", "So.\nAnswer: 5", "5"),
        ("line", "**Answer:** 5\nThat is all.", "5"),
        ("line", "the final answer: 4\nAnswer : 5", "5"),
        ("line", r"Answer: $\boxed{5}$", "5"),
        ("line", "No answer here", None),
        ("tag", "<answer>4</answer> <answer> 5 </answer>", " 5 "),
        ("tag", r"<answer>It is \boxed{5}.</answer>", "5"),
        ("tag", "<answer>5</answer> or <answer>6", None),  # cut off
        ("tag", "<answer>\n5\n</answer>", "\n5\n"),
        ("tag", r"\boxed{5}", None),
    ],
)
def test_the_last_answer_is_found_in_each_style(style, text, answer):
    assert find_answer(text, style) == answer


OPENED = "<|assistant|><think>\n"


@pytest.mark.parametrize(
    ("completion", "prompt", "counts"),
    [
        # counts: for auto, require_end, ignore
        (r"<think>so \boxed{5}? let me re-check", "", (False, False, True)),
        (r"<think>so</think>\boxed{5}", "", (True, True, True)),
        (r"<think>so \boxed{5}</think> Done.", "", (False, False, True)),
        (r"<think>a</think><think>\boxed{5}", "", (False, False, True)),
        (r"\boxed{5}", "", (True, False, True)),
        (r"so \boxed{5}? let me", OPENED, (False, False, True)),
        (r"so</think> \boxed{5}", OPENED, (True, True, True)),
        (r"\boxed{5}", "<think>\n\n</think>\n\n", (True, False, True)),  # reasoning turned off
        (r"\boxed{5}", "Think in <think> </think>. 2+3?", (True, False, True)),
    ],
)
def test_no_answer_counts_before_the_reasoning_has_ended(completion, prompt, counts):
    for reasoning, expected in zip(("auto", "require_end", "ignore"), counts, strict=True):
        conclusion = after_reasoning(completion, prompt=prompt, reasoning=reasoning)
        assert (last_box(conclusion) == "5") is expected, reasoning
        if is_reasoning(completion, prompt=prompt, reasoning=reasoning):
            assert conclusion == ""


def test_figures_as_people_read_them():
    assert [percent(share) for share in (0.125, 0.0, 1.0, math.nan)] == ["12.5%", "0.0%", "100.0%", "-"]
    seconds = (0.4, 59.6, 75, 3599.7, 7384)
    assert [clock(value) for value in seconds] == ["0 s", "1 min 0 s", "1 min 15 s", "1 h 00 min", "2 h 03 min"]
