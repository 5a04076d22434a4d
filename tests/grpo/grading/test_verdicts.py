r"""Verdicts on numbers, spellings and algebra, as rows of gold, given, right.

``right`` is True for "correct", False for "wrong", and None where the grader has to say that it does not know
("unparseable"). What an answer's form decides is in ``test_verdicts_on_forms``.
"""

from __future__ import annotations

import pytest

Row = tuple[str, str, bool | None]
OUTCOMES = {True: "correct", False: "wrong", None: "unparseable"}

# Relative tolerance, 1e-6 where one side is a decimal fraction; nothing is near zero but zero.
NUMBERS: list[Row] = [
    ("1.6e-19", "0.0", False),
    ("1.6e-19", "0", False),
    ("1.6e-19", "0.0000001", False),
    ("1.6e-19", "9e-20", False),
    ("1.6e-19", r"1.6 \times 10^{-19}", True),
    ("1.6e-19", r"16 \times 10^{-20}", True),
    ("1.6e-19", r"1.601 \times 10^{-19}", False),
    ("0", "1e-30", False),
    ("0", "0.0", True),
    ("0.0", "0", True),
    ("0", r"\sin(\pi)", True),
    ("0", r"\sqrt{2}\sqrt{3}-\sqrt{6}", True),
    ("0", r"\frac{1}{2^{400}}", False),
    ("0.0000012", "0.0000014", False),
    ("0.0000012", r"\frac{12}{10^7}", True),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}", False),
    (r"\frac{1}{2^{99}}", "2^{-99}", True),
    (r"\frac{1}{2^{99}}", r"\frac{2}{2^{100}}", True),
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}", False),
    (r"\frac{1}{2004!}", r"\frac{2005}{2005!}", True),
    (r"\frac{100!}{2^{50}}", r"\frac{100!}{2^{51}}", False),
    (r"2^{1009}", r"2^{1010}", False),
    (r"2^{1009}", r"2 \cdot 2^{1008}", True),
    (r"2^{1009}", r"2^{1009}+1", False),
    ("10^{200}+1", "10^{200}", False),
    ("1/3", "0.333333", True),
    ("1/3", "0.33333", False),
    ("1/3", "0.333", False),
    ("2/3", "0.666667", True),
    ("1/7", "0.142857", True),
    (r"\pi", "3.141593", True),
    (r"\pi", "3.14159", True),
    (r"\pi", "3.1416", False),
    (r"\pi", "3.14", False),
    (r"\sqrt{2}", "1.414214", True),
    (r"\sqrt{2}", "1.41", False),
    ("0.1", "0.10", True),
    ("0.1+0.2", "0.3", True),
    ("1000000.5", "1000001.5", True),  # within the tolerance
    ("12345678", "12345679.0", False),  # integers are exact
    ("12345678", "12345678.0", True),
    ("123456789012345678", "123456789012345679", False),
    (r"\frac{1}{3}x", "0.333333x", True),
    (r"\frac{1}{3}x", "0.33x", False),
    ("1 + 1e-9 x", "1 + 2e-9 x", False),
    ("1 + 0.333333x", r"1 + \frac{x}{3}", True),
    (r"y = 0.333333x + 1", r"3y = x + 3", True),
    (r"1.6 \times 10^{-19} x", r"9 \times 10^{-20} x", False),
    (r"y = 1.6 \times 10^{-19} x", r"y = 9 \times 10^{-20} x", False),
    ("(1/3, 2)", "(0.333333, 2)", True),
    ("(1e-20, 2)", "(2e-20, 2)", False),
    (r"\{1e-20, 2\}", r"\{2e-20, 2\}", False),
    ("[0, 1e-9]", "[0, 2e-9]", False),
    (r"\begin{pmatrix} 1e-9 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2e-9 \\ 2 \end{pmatrix}", False),
    (r"1.39 \times 10^9", "1390000000", True),
    (r"1.39 \times 10^9", "1391390000", False),
    ("4.4e7", "44000000", True),
    ("-1/3", "-0.333333", True),
    ("-1/3", "0.333333", False),
    (r"e^{-20}", r"e^{-21}", False),
    (r"\ln 2", "0.693147", True),
    (r"\binom{10}{5}", "252", True),
    ("1/2", "2/4", True),
    ("-1/2", "1/-2", True),
]

SPELLINGS: list[Row] = [
    ("90", "90°", True),
    (r"\sqrt{2}", "√2", True),
    (r"\sqrt{12}", "√12", True),
    (r"\sqrt{x+1}", "√(x+1)", True),
    (r"\infty", "∞", True),
    (r"\infty", r"\infin", True),
    (r"1, 2, \ldots, 9", r"1,2,\dots,9", True),
    (r"\frac{1}{2}", "½", True),
    ("1.5", "1½", True),
    ("x^2", "x²", True),
    ("x^{-1}", "x⁻¹", True),
    ("x_1", "x₁", True),
    ("-5", "–5", True),
    ("-5", "－5", True),
    ("-5", "−5", True),
    ("-5", "5", False),
    ("123", "１２３", True),
    ("73", "73\u200b", True),
    ("73", "73\u00a0", True),
    ("73", "**73**", True),
    ("73", "`73`", True),
    ("10", "=10", True),
    ("10", "10\\ ", True),
    ("10", "10.", True),
    ("10", "$10$", True),
    ("10", r"\(10\)", True),
    ("10", r"\boxed 10", True),
    ("10", r"\fbox{10}", True),
    ("10", r"\boxed{10}", True),
    ("1.75", "1 3/4", True),
    ("1.75", r"1\frac{3}{4}", True),
    ("-1.75", "-1 3/4", True),
    (r"137 \frac{1}{2}", "137.5", True),
    ("6", "2(3)", True),
    (r"2\pi", "2pi", True),
    (r"2\pi", "2π", True),
    (r"2\pi", "2*pi", True),
    (r"\frac{\pi}{2}", "pi/2", True),
    (r"\frac{\sqrt{2}}{2}", "sqrt(2)/2", True),
    (r"\sin x", "sin(x)", True),
    (r"\frac{1}{3}", r"0.\overline{3}", True),
    (r"\frac{1}{6}", r"0.1\overline{6}", True),
    (r"\frac{1}{6}", r"0.1\overline{7}", False),
    (r"\frac{1}{7}", r"0.\overline{142857}", True),
    (r"\frac{1}{3}", "0.333...", True),
    (r"\frac{1}{3}", "0.(3)", True),
    ("1234", "1 234", True),
    ("1234", "1,234", True),
    ("1234", r"1\,234", True),
    ("1234", "1235", False),
    (r"\frac{14}{3}", r"\dfrac{14}3", True),
    (r"\frac{3}{4}", r"\frac34", True),
    (r"11\sqrt2", r"11 \sqrt{2}", True),
    (".0000672", "0.0000672", True),
    ("3 x 10^8", "3x10^8", True),
    (r"3 \times 10^{8}", "3×10⁸", True),
    (r"3 \times 10^{8}", "3e8", True),
    (r"3 \times 10^{8}", "3E+8", True),
    ("x^2", "x**2", True),
    ("5", "{5}", True),
    ("5", r"\text{5}", True),
    ("+2", "2", True),
    ("5", "1.2.3", None),
    ("5", "", None),
]

ALGEBRA: list[Row] = [
    ("x^2-1", "(x-1)(x+1)", True),
    ("x^2-1", "x^2+1", False),
    ("n(n-1)", "n^2-n", True),
    (r"\frac{n(n+1)}{2}", r"\frac{n^2+n}{2}", True),
    ("|x|", "x", False),
    (r"\lfloor x \rfloor", "x", False),
    (r"\lfloor\frac{2 n}{3}\rfloor+1", r"1 + \lfloor 2n/3 \rfloor", True),
    (r"\sin^2 x + \cos^2 x", "1", True),
    ("3R^2", "3r^2", True),  # one letter cannot mean another
    (r"\frac{mM}{m+M}", r"\frac{m}{2}", False),
    (r"\frac{mM}{m+M}", r"\frac{Mm}{M+m}", True),
    ("-8-8\\sqrt{3}i", "-8-8i\\sqrt{3}", True),
    ("i^2", "-1", True),
    ("6 - 5i", "6 + 5i", False),
    (r"\binom{2n}{n}", r"\frac{(2n)!}{n! n!}", True),
    ("(n + 1)! - (n - 1)!", "(n-1)!(n^2+n-1)", True),
    (r"\frac{e^{t}}{3} + c e^{-2t}", r"\frac{e^t + 3ce^{-2t}}{3}", True),
    ("(1 - 3e^{-2t}) u(t)", "u(t) - 3e^{-2t}u(t)", True),
    ("(1 - 3e^{-2t}) u(t)", "(1 - 3e^{-2t}) u(s)", False),
    ("I(0)e^{-t}", "I(1)e^{-t}", False),
    ("2021 \\cdot 505 \\cdot 337", "343943885", True),
    (r"\frac{1}{2", r"\frac{1}{2}", False),  # a gold answer that is broken is text
]

ROWS = NUMBERS + SPELLINGS + ALGEBRA


@pytest.mark.parametrize(("gold", "given", "right"), ROWS)
def test_the_verdict_is_right_or_says_that_it_does_not_know(grader, gold, given, right):
    assert grader([((gold,), given)]) == [OUTCOMES[right]]


def test_a_gold_answer_is_right_itself(grader):
    golds = [gold for gold, _, _ in ROWS]
    assert grader([((gold,), f" ${gold}$ ") for gold in golds]) == ["correct"] * len(golds)
