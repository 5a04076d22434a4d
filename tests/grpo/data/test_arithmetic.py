"""The built-in task: every line of every solution is true, splits never meet, levels get harder."""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_grpo.data.arithmetic import LEVELS, PHRASES, generate
from edge_grpo.types import Example

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def value(text: str) -> int:
    """The value of an arithmetic expression by Python's own grammar, so that precedence is not ours to get wrong."""

    def visit(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return OPERATIONS[type(node.op)](visit(node.left), visit(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -visit(node.operand)
        assert isinstance(node, ast.Constant)
        assert isinstance(node.value, int)
        return node.value

    return visit(ast.parse(text, mode="eval").body)


def expression_of(example: Example) -> str:
    for phrase in PHRASES:
        before, after = phrase.split("{}")
        if example.problem.startswith(before) and example.problem.endswith(after):
            return example.problem[len(before) : -len(after)]
    raise AssertionError(f"no known phrase in {example.problem!r}")


def numbers_of(text: str) -> tuple[str, ...]:
    return tuple(sorted(re.findall(r"\d+", text), key=int))


def identity(example: Example) -> tuple[tuple[str, ...], str]:
    """What must not be shared by train and test: the numbers and the operators, their order aside."""
    expression = expression_of(example)
    return numbers_of(expression), "".join(sorted(re.findall(r"[-+*]", expression)))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("level", LEVELS)
def test_every_step_of_a_solution_is_true(level: int, split: str) -> None:
    step = re.compile(r"(First|Then) (-?\d+ [-+*] (?:\d+|\(-\d+\))) = (-?\d+)(?:, which leaves (.+))?\.")
    for example in generate([level], split, seed=7, size=300):
        assert example.answer is not None
        assert example.solution is not None
        expected = value(expression_of(example))
        assert int(example.answer) == expected
        *steps, last = example.solution.split("\n")
        assert last == f"The answer is \\boxed{{{expected}}}."
        parsed = [step.fullmatch(line) for line in steps]
        assert all(parsed), example.solution
        for number, match in enumerate(parsed):
            assert match is not None
            word, done, result, leaves = match.groups()
            assert word == ("Then" if number else "First")
            assert value(done) == int(result)
            if number + 1 < len(parsed):
                assert value(leaves) == expected
            else:
                assert leaves is None
                assert int(result) == expected


def test_problems_at_hand() -> None:
    by_problem = {expression_of(example): example for example in generate([3, 4, 5], "train", seed=0, size=3000)}
    negative = next(text for text in by_problem if re.fullmatch(r"\d+ \* \(\d+ - \d+\) \+ \d+", text) and "-" in text)
    assert value(negative) == int(by_problem[negative].answer or "")
    # A negative number inside an expression stands in parentheses, at its start it stands bare.
    solutions = "\n".join(example.solution or "" for example in by_problem.values())
    assert re.search(r" \* \(-\d+\) = ", solutions)
    assert re.search(r"(First|Then) -\d+ \* ", solutions)
    assert not re.search(r"[-+*] -\d", solutions)


@settings(max_examples=25, deadline=None)
@given(seeds=st.tuples(st.integers(), st.integers()), level=st.sampled_from(LEVELS), size=st.integers(0, 400))
def test_train_and_test_never_meet(seeds: tuple[int, int], level: int, size: int) -> None:
    train = {identity(example) for example in generate([level], "train", seeds[0], size)}
    test = {identity(example) for example in generate([level], "test", seeds[1], size)}
    assert not train & test


def test_whole_splits_of_the_small_levels_never_meet() -> None:
    # 4,000 examples go through all of level 1 several times over.
    train = generate([1], "train", 0, 4000)
    test = generate([1], "test", 1, 4000)
    assert not {identity(example) for example in train} & {identity(example) for example in test}
    distinct = {expression_of(example) for example in [*train, *test]}
    assert len(distinct) == 20 * 20 + 20 * 10  # every problem of the level lands in one of the splits


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(), levels=st.lists(st.sampled_from(LEVELS), min_size=1, unique=True), size=st.integers(0, 60))
def test_deterministic_balanced_and_a_prefix_of_longer_lists(seed: int, levels: list[int], size: int) -> None:
    examples = generate(levels, "train", seed, size)
    assert examples == generate(levels, "train", seed, size + 17)[:size]
    assert [example.index for example in examples] == list(range(size))
    counts = Counter(example.extra["level"] for example in examples)
    assert all(abs(counts[level] - size / len(levels)) < 1 for level in levels)


def test_the_same_examples_on_every_machine() -> None:
    # Written down once: a change here changes everybody's data, held-out sets included.
    problems = [example.problem for example in generate(LEVELS, "test", 0, 5)]
    assert problems == [
        "Work out 14 + 8.",
        "Work out 26 + 39.",
        "Calculate 87 + 29 - 84.",
        "Work out (5 + 8) * 5.",
        "What is 9 * 2 + 5 * 2?",
    ]


def test_other_seeds_give_other_examples() -> None:
    first, second = (generate([5], "train", seed, 200) for seed in (0, 1))
    assert len({e.problem for e in first} & {e.problem for e in second}) < 20


def test_problems_repeat_only_when_a_level_is_used_up() -> None:
    for level in LEVELS[2:]:
        examples = generate([level], "train", 0, 1000)
        assert len({expression_of(example) for example in examples}) == 1000
    # The 200 subtractions of level 1: each held-out one comes equally often, give or take one.
    subtractions = [expression_of(example) for example in generate([1], "test", 0, 500)][1::2]
    counts = Counter(subtractions).values()
    assert max(counts) > 1
    assert max(counts) - min(counts) <= 1


def test_levels_are_graded() -> None:
    operations, lengths = [], []
    for level in LEVELS:
        examples = generate([level], "train", 0, 500)
        operations.append(mean(len(re.findall(r" [-+*] ", expression_of(example))) for example in examples))
        lengths.append(mean(len(example.solution or "") for example in examples))
    assert operations == [1, 1, 2, 2, 3]
    assert lengths == sorted(lengths)
    assert any("(" in example.problem for example in generate([4], "train", 0, 10))
    assert not any("(" in example.problem for example in generate([1, 2, 3], "train", 0, 300))


@pytest.mark.parametrize(
    ("levels", "split", "size", "message"),
    [
        ([], "train", 1, "levels must be"),
        ([0], "train", 1, "levels must be"),
        ([1, 1], "train", 1, "levels must be"),
        ([1], "validation", 1, "split must be one of 'train', 'test'; got 'validation'"),
        ([1], "train", -1, "size must be at least 0; got -1"),
    ],
)
def test_bad_arguments(levels: list[int], split: str, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(levels, split, 0, size)
