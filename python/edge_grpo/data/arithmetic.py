"""The built-in task: integer arithmetic in graded levels, with step-by-step reference solutions.

``generate`` makes the examples. Naming and loading datasets is ``sources``, rendering them ``prompts``, judging an
answer ``edge_grpo.grading``.

    1   one addition or subtraction up to 30         What is 13 + 8?
    2   one operation, two digits, times tables      Calculate 45 - 78.
    3   three numbers, multiplication binds first    Work out 41 - 6 * 7.
    4   three numbers and parentheses                Find the value of (12 + 9) * 4.
    5   four numbers, two or more of all these       What is 87 - 3 * (14 + 9)?
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Literal, get_args

from edge_grpo.types import Example

Split = Literal["train", "test"]
Operator = Literal["+", "-", "*"]

PHRASES = ("What is {}?", "Calculate {}.", "Work out {}.", "Find the value of {}.")
_TEST_SHARE = 5  # one in this many sets of numbers is held out


@dataclass(frozen=True)
class Operation:
    operator: Operator
    left: Expression
    right: Expression

    def __str__(self) -> str:
        left, right = _bracketed(self.left), _bracketed(self.right)
        if self.operator == "*":
            left = f"({left})" if _is_sum(self.left) else left
            right = f"({right})" if isinstance(self.right, Operation) else right
        elif self.operator == "-":
            right = f"({right})" if _is_sum(self.right) else right
        # A negative number that opens an expression needs no parentheses.
        if isinstance(self.left, int):
            left = str(self.left)
        return f"{left} {self.operator} {right}"


Expression = int | Operation


def _bracketed(expression: Expression) -> str:
    return f"({expression})" if isinstance(expression, int) and expression < 0 else str(expression)


def _is_sum(expression: Expression) -> bool:
    return isinstance(expression, Operation) and expression.operator != "*"


def _apply(operator: Operator, left: int, right: int) -> int:
    return left + right if operator == "+" else left - right if operator == "-" else left * right


def _reduce(expression: Operation) -> tuple[Operation, Expression]:
    """The first operation to do (the leftmost with two plain numbers), and the expression that remains."""
    left, right = expression.left, expression.right
    if isinstance(left, Operation):
        done, left = _reduce(left)
    elif isinstance(right, Operation):
        done, right = _reduce(right)
    else:
        return expression, _apply(expression.operator, left, right)
    return done, Operation(expression.operator, left, right)


def solve(expression: Operation) -> tuple[int, str]:
    """The value of an expression, and its derivation one operation at a time, ending in ``\\boxed{value}``."""
    lines: list[str] = []
    rest: Expression = expression
    while isinstance(rest, Operation):
        step, rest = _reduce(rest)
        assert isinstance(step.left, int)
        assert isinstance(step.right, int)
        result = _apply(step.operator, step.left, step.right)
        leaves = f", which leaves {rest}" if isinstance(rest, Operation) else ""
        lines.append(f"{'Then' if lines else 'First'} {step} = {result}{leaves}.")
    return rest, "\n".join([*lines, f"The answer is \\boxed{{{rest}}}."])


# An operand's number, or an operation on two forms.
_Form = int | tuple["_Form", Operator, "_Form"]


@dataclass(frozen=True)
class _Kind:
    """All problems of one form: operators around numbered operands, and the range of each operand."""

    form: _Form
    ranges: tuple[range, ...]

    def __len__(self) -> int:
        return prod(map(len, self.ranges))

    def numbers(self, index: int) -> tuple[int, ...]:
        """The operands of problem number ``index``, in mixed radix."""
        operands = []
        for values in self.ranges:
            index, digit = divmod(index, len(values))
            operands.append(values[digit])
        return tuple(operands)


def _build(form: _Form, numbers: Sequence[int]) -> Expression:
    if isinstance(form, int):
        return numbers[form]
    left, operator, right = form
    return Operation(operator, _build(left, numbers), _build(right, numbers))


def _operators(form: _Form) -> list[Operator]:
    return [] if isinstance(form, int) else [*_operators(form[0]), form[1], *_operators(form[2])]


_DIGIT, _SMALL, _TWO_DIGITS = range(2, 10), range(2, 21), range(10, 100)

_LEVELS: Mapping[int, tuple[_Kind, ...]] = MappingProxyType(
    {
        1: (
            _Kind((0, "+", 1), (range(1, 21), range(1, 21))),
            _Kind((0, "-", 1), (range(11, 31), range(1, 11))),
        ),
        2: (
            _Kind((0, "+", 1), (_TWO_DIGITS, _TWO_DIGITS)),
            _Kind((0, "-", 1), (_TWO_DIGITS, _TWO_DIGITS)),
            _Kind((0, "*", 1), (range(2, 13), range(2, 13))),
        ),
        3: (
            _Kind(((0, "+", 1), "-", 2), (_TWO_DIGITS,) * 3),
            _Kind(((0, "-", 1), "+", 2), (_TWO_DIGITS,) * 3),
            _Kind((0, "+", (1, "*", 2)), (_TWO_DIGITS, _DIGIT, _DIGIT)),
            _Kind((0, "-", (1, "*", 2)), (_TWO_DIGITS, _DIGIT, _DIGIT)),
            _Kind(((0, "*", 1), "+", 2), (_DIGIT, _DIGIT, _TWO_DIGITS)),
        ),
        4: (
            _Kind(((0, "+", 1), "*", 2), (_SMALL, _SMALL, _DIGIT)),
            _Kind(((0, "-", 1), "*", 2), (_SMALL, _SMALL, _DIGIT)),
            _Kind((0, "*", (1, "+", 2)), (_DIGIT, _SMALL, _SMALL)),
            _Kind((0, "-", (1, "+", 2)), (_TWO_DIGITS,) * 3),
            _Kind((0, "-", (1, "-", 2)), (_TWO_DIGITS,) * 3),
        ),
        5: (
            _Kind(((0, "*", 1), "+", (2, "*", 3)), (_DIGIT,) * 4),
            _Kind((0, "-", (1, "*", (2, "+", 3))), (_TWO_DIGITS, _DIGIT, _SMALL, _SMALL)),
            _Kind((((0, "+", 1), "*", 2), "-", 3), (_SMALL, _SMALL, _DIGIT, _TWO_DIGITS)),
            _Kind(((0, "*", (1, "-", 2)), "+", 3), (_DIGIT, _SMALL, _SMALL, _TWO_DIGITS)),
            _Kind(((0, "+", 1), "*", (2, "-", 3)), (_SMALL, _SMALL, _DIGIT, _DIGIT)),
        ),
    }
)
LEVELS: tuple[int, ...] = tuple(_LEVELS)


def _split_of(operators: Sequence[Operator], numbers: Sequence[int]) -> Split:
    """The split of every problem with these operators and numbers, in whatever order: 3 + 4 sits with 4 + 3."""
    key = " ".join([*sorted(operators), *map(str, sorted(numbers))])
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % _TEST_SHARE == 0 else "train"


def _shuffled(count: int, rng: random.Random) -> Iterator[int]:
    """Every number below ``count`` once, in random order (Fisher-Yates); memory grows with the numbers drawn."""
    moved: dict[int, int] = {}
    for position in range(count):
        chosen = rng.randrange(position, count)
        yield moved.get(chosen, chosen)
        moved[chosen] = moved.pop(position, position)


def _problems(kind: _Kind, split: Split, rng: random.Random) -> Iterator[Operation]:
    """An endless stream of problems of one kind; all come once before any comes again."""
    operators = _operators(kind.form)
    while True:
        for index in _shuffled(len(kind), rng):
            numbers = kind.numbers(index)
            if _split_of(operators, numbers) == split:
                expression = _build(kind.form, numbers)
                assert isinstance(expression, Operation)
                yield expression


def generate(levels: Sequence[int], split: str, seed: int, size: int) -> list[Example]:
    """Return ``size`` examples that alternate over ``levels``, so that every prefix is balanced.

    The same arguments give the same examples on any machine, and a larger ``size`` begins with those of a smaller one.
    "train" and "test" are disjoint for all seeds and sizes: a hash of a problem's operators and numbers, whatever their
    order, decides its split. Within a level its kinds of problem alternate, and none comes twice before all of its kind
    have come; a size beyond the number of problems repeats them evenly (level 1 is the smallest: 490 to train on and
    110 held out).

    ``extra["level"]`` is the example's level. Raises ValueError for a level or split that does not exist, a level
    named twice, no level, or a negative size.
    """
    levels = tuple(levels)
    unknown = [level for level in levels if level not in _LEVELS]
    if unknown or not levels or len(set(levels)) != len(levels):
        raise ValueError(f"levels must be one or more different numbers out of {LEVELS}; got {levels}")
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {', '.join(map(repr, get_args(Split)))}; got {split!r}")
    if size < 0:
        raise ValueError(f"size must be at least 0; got {size}")

    def stream(level: int) -> Iterator[tuple[str, Operation]]:
        kinds = _LEVELS[level]
        rngs = [random.Random(f"{seed}/{level}/{number}") for number in range(len(kinds))]
        streams = [_problems(kind, split, rng) for kind, rng in zip(kinds, rngs, strict=True)]  # type: ignore[arg-type]
        while True:
            for problems, rng in zip(streams, rngs, strict=True):
                expression = next(problems)
                yield rng.choice(PHRASES).format(expression), expression

    streams = {level: stream(level) for level in levels}
    examples = []
    for index in range(size):
        level = levels[index % len(levels)]
        problem, expression = next(streams[level])
        answer, solution = solve(expression)
        examples.append(Example(index, problem, str(answer), solution, {"level": level}))
    return examples
