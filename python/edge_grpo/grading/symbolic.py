r"""Mathematics: parsed by math-verify's parser, compared by sympy. Runs only in workers of ``answers``.

Nothing here has a limit of time or memory: the process has. Taking an answer's text apart (lists, units, words) is
``equivalence``; here a text is one expression, relation, set or matrix.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, normalize_latex
from math_verify import verify
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

# A number that is written as a decimal fraction may be rounded: this is the relative error that it may have, which
# 0.333333 has as 1/3. Numbers that both are exact have to be equal.
ROUNDING = 1e-6

_NORMALIZATION = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, units=False, boxed="none")
_CONVERSION = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
# What the parser would skip, add up, or read as a product of letters: 16:1, 1.2.3, 12 34, "5 is wrong", 1101_2.
_NO_MATHEMATICS = re.compile(
    r":|\d\.\d+\.|\d\s+\d|(?<![A-Za-z\\])[A-Za-z]{4,}|\\text\s*\{[^{}]*\s[^{}]*\}|(?<![A-Za-z}])\d+\s*_"
)
_NO_WORDS = re.compile(r"_\{(?:[^{}]|\{[^{}]*\})*\}|\\(?:operatorname|begin|end)\s*\{[^{}]*\}")
_DECIMAL = re.compile(r"([+-]?\d+(?:\.\d+)?)(?:\s*\\times\s*10\^\{([+-]?\d{1,4})\})?")
_FRACTION = re.compile(r"([+-]?)(?:\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}|\s*(\d+)\s*/\s*(\d+))")
# Names that the parser does not know: E_{0}, where it takes E for the base of the exponential, and L_{\odot}.
_NAMES = [
    (re.compile(r"(?<![A-Za-z\\])E(?=_)"), r"\\text{E}"),
    (re.compile(r"_\{\s*\\(?:text\s*\{)?\s*([A-Za-z]+)\s*\}?\s*\}"), r"_{\1}"),
]
# Agreement at points proves nothing of functions that are constant nearly everywhere.
_STEPS = (sympy.floor, sympy.ceiling, sympy.sign, sympy.Mod, sympy.Piecewise, sympy.Heaviside, sympy.frac)
_POINTS = [  # values of the first symbol, the second, ...; of either sign, and none that an answer would hold
    [sympy.Rational(sign * (137 * k + 61 * point + 29), 83 + 17 * point) for k, sign in enumerate(signs)]
    for point, signs in enumerate([[1] * 12, [-1, 1] * 6, [1, 1, -1] * 4, [-1] * 12, [1] * 12])
]
_DIGITS = 60
_SAME = 1e-50  # what two values of equal expressions may differ by, relative to the larger one
_TINY = sympy.Float("1e-90")
_LARGEST_EXACT = sympy.Float("1e20000")  # beyond, numbers that agree in 100 digits count as equal


def warm_up() -> None:
    """Build the grammar, which the first parse does otherwise."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it has no limits of its own
    equal(r"\frac{1}{2}", "0.5", 0.0)


@lru_cache(4096)
def parsed(text: str) -> Any | None:
    """What the text is in sympy, decimals as exact fractions; None if it is not mathematics."""
    plain = _NO_WORDS.sub("", text)
    if _NO_MATHEMATICS.search(plain) or not _is_balanced(text):
        return None
    if (number := _number(text)) is not None:
        return number
    for pattern, replacement in _NAMES:
        text = pattern.sub(replacement, text)
    try:
        found = latex2sympy(
            normalize_latex(text, _NORMALIZATION),
            is_real=True,
            convert_degrees=False,
            normalization_config=None,
            conversion_config=_CONVERSION,
        )
        return _canonical(found) if isinstance(found, (sympy.Basic, sympy.MatrixBase)) else None
    except MemoryError:
        raise
    except Exception:  # the parser raises nearly anything, RecursionError included, on what a model may write
        return None


def is_decimal(text: str) -> bool:
    """Whether a number in the text is written as a decimal fraction, so that it may be rounded."""
    return any(match[1].strip("0") for match in re.finditer(r"\d\.(\d+)", text))


def equal(gold: str, read: str, tolerance: float) -> bool | None:
    """Whether two mathematical texts are equal; None where one of them is not mathematics or nobody can tell.

    Numbers are equal within ``tolerance``, and within ``ROUNDING`` where one is a decimal fraction, both relative to
    the larger one. Letters differ by case only where the gold answer uses both cases.
    """
    first, second = parsed(gold), parsed(read)
    if first is None or second is None:
        return None
    allowed = max(tolerance, ROUNDING if is_decimal(gold) or is_decimal(read) else 0.0)
    try:
        return _equal(*_same_case(first, second), allowed)
    except MemoryError:
        raise
    except Exception:  # as the parser
        return None


def rounds_to(decimal: str, value: str) -> bool:
    """Whether a decimal fraction is ``value`` rounded or cut to its digits."""
    match = re.fullmatch(r"[+-]?\d+\.(\d+)", decimal)
    exact = parsed(value) if match else None
    if match is None or exact is None or not exact.is_number:
        return False
    return bool(abs(sympy.Rational(decimal) - exact.evalf(_DIGITS)) < sympy.Rational(1, 10 ** len(match[1])))


def union_of(relations: Sequence[str]) -> Any | None:
    """The set of numbers for which one of the relations holds; None where that is no set."""
    try:
        return sympy.Union(*(_as_set(parsed(relation)) for relation in relations))
    except MemoryError:
        raise
    except Exception:
        return None


def same_sets(gold: Any, read: Any) -> bool:
    """Whether two sets or relations have the same elements."""
    first, second = _as_set(gold), _as_set(read)
    if isinstance(first, sympy.Interval) and isinstance(second, sympy.Interval):
        ends = (first.left_open, first.right_open) == (second.left_open, second.right_open)
        return ends and all(_equal(*pair, 0.0) for pair in ((first.start, second.start), (first.end, second.end)))
    return bool(first == second or first.symmetric_difference(second).is_empty)


# ---- Reading -------------------------------------------------------------------------------------------------------


def _number(text: str) -> sympy.Rational | None:
    """The value of a plain number, which takes the parser milliseconds."""
    if match := _DECIMAL.fullmatch(text):
        return sympy.Rational(match[1]) * sympy.Integer(10) ** int(match[2] or 0)
    match = _FRACTION.fullmatch(text)
    over, under = (match[2] or match[4], match[3] or match[5]) if match else ("", "0")
    return sympy.Rational(int(f"{match[1]}{over}"), int(under)) if match and int(under) else None


def _canonical(expression: Any) -> Any:
    """Decimals as fractions, i as the imaginary unit, and functions and derivatives as symbols of their own."""
    opaque = expression.atoms(AppliedUndef, sympy.Derivative) if hasattr(expression, "atoms") else set()
    changes = {part: sympy.Symbol(str(part), real=True) for part in opaque}
    changes |= {number: sympy.Rational(str(number)) for number in expression.atoms(sympy.Float)}
    bound = {symbol for part in expression.atoms(sympy.Sum, sympy.Product) for symbol in part.bound_symbols}
    for symbol in expression.atoms(sympy.Symbol) - bound:
        if symbol.name in ("i", "I"):
            changes[symbol] = sympy.I if symbol.name == "i" else symbol
        elif (name := re.sub(r"[{}\s]", "", symbol.name)) != symbol.name or not symbol.is_real:
            changes[symbol] = sympy.Symbol(name, real=True)
    return expression.xreplace(changes) if changes else expression


def _same_case(gold: Any, read: Any) -> tuple[Any, Any]:
    names = [symbol.name for symbol in gold.atoms(sympy.Symbol)]
    if len({name.lower() for name in names}) != len(names):
        return gold, read

    def lowered(expression: Any) -> Any:
        changes = {
            symbol: sympy.Symbol(symbol.name.lower(), real=True)
            for symbol in expression.atoms(sympy.Symbol)
            if symbol.name != symbol.name.lower() and symbol.name[0].isalpha() and not symbol.name[1:2].isalpha()
        }
        return expression.xreplace(changes) if changes else expression

    return lowered(gold), lowered(read)


def _is_balanced(text: str) -> bool:
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", text.replace("\\\\", "")):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
    return depth == 0


# ---- Comparing -----------------------------------------------------------------------------------------------------


def _equal(gold: Any, read: Any, tolerance: float) -> bool:
    if isinstance(gold, sympy.MatrixBase) or isinstance(read, sympy.MatrixBase):
        same_shape = getattr(gold, "shape", None) == getattr(read, "shape", ())
        return same_shape and all(_equal(*pair, tolerance) for pair in zip(gold, read, strict=True))
    if gold == read:
        return gold not in (sympy.nan, sympy.zoo)
    relational = (Relational, sympy.And)
    if isinstance(gold, sympy.Set) or isinstance(read, sympy.Set):
        return same_sets(gold, read)
    if isinstance(gold, relational) and isinstance(read, relational):
        return _equal_relations(gold, read, tolerance)
    if not (isinstance(gold, sympy.Expr) and isinstance(read, sympy.Expr)):
        return False
    return _equal_expressions(gold, read, tolerance)


def _equal_expressions(gold: sympy.Expr, read: sympy.Expr, tolerance: float) -> bool:
    if gold.is_Rational and read.is_Rational:
        return gold == read or _is_near(gold, read, tolerance)
    if gold.is_infinite or read.is_infinite:
        return gold.doit() == read.doit()
    symbols = sorted(gold.free_symbols | read.free_symbols, key=str)
    if not symbols:
        return _equal_numbers(gold, read, tolerance)
    verdicts = _verdicts(gold, read, symbols)
    if not all(verdicts):
        ratios = _term_ratios(gold, read) if tolerance else []
        return bool(ratios) and all(_is_near(ratio, sympy.Integer(1), tolerance) for ratio in ratios)
    if len(verdicts) >= 2 and not (gold.has(*_STEPS) or read.has(*_STEPS)):
        return True
    return _is_zero(gold - read)


def _verdicts(gold: sympy.Expr, read: sympy.Expr, symbols: Sequence[Any]) -> list[bool]:
    """Whether two expressions agree, at each point where both have a value."""
    pairs = ((_value(gold, values), _value(read, values)) for values in _substitutions(symbols))
    return [_is_near(*pair, _SAME) for pair in pairs if None not in pair and any(pair)]


def _term_ratios(gold: sympy.Expr, read: sympy.Expr) -> list[Any]:
    """How many times as large each term is here as there, for rounded coefficients; empty where the terms differ."""
    first, second = (sympy.expand(side).as_coefficients_dict() for side in (gold, read))
    return [first[term] / second[term] for term in first] if first.keys() == second.keys() else []


def _substitutions(symbols: Sequence[Any]) -> list[dict[Any, Any]]:
    return [dict(zip(symbols, values * (1 + len(symbols) // len(values)), strict=False)) for values in _POINTS]


def _equal_numbers(gold: sympy.Expr, read: sympy.Expr, tolerance: float) -> bool:
    first, second = _value(gold, {}), _value(read, {})
    if first is None or second is None:
        return _is_zero(gold - read)
    if not _is_near(first, second, _SAME):
        if min(abs(first), abs(second)) > _TINY:
            return _is_near(first, second, tolerance)
        # What is zero evaluates to a tiny number: 1/2^400 is none, \sqrt{2}\sqrt{3}-\sqrt{6} is.
        return _is_zero(gold - read)
    if abs(first) < _LARGEST_EXACT and (exact := _exact_integers(gold, read)) is not None:
        return exact
    return _is_near(gold.evalf(2 * _DIGITS), read.evalf(2 * _DIGITS), _SAME**2) or _is_near(first, second, tolerance)


def _is_zero(expression: sympy.Expr) -> bool:
    return bool(sympy.simplify(expression.doit()).is_zero)


def _exact_integers(gold: sympy.Expr, read: sympy.Expr) -> bool | None:
    first, second = gold.doit(), read.doit()
    return bool(first == second) if first.is_Rational and second.is_Rational else None


def _value(expression: sympy.Expr, at: dict[Any, Any]) -> Any | None:
    found = expression.evalf(_DIGITS, subs=at) if at else expression.evalf(_DIGITS)
    return found if found.is_number and found.is_finite and not found.free_symbols else None


def _is_near(first: Any, second: Any, tolerance: float) -> bool:
    """Whether the numbers differ by at most ``tolerance`` of the larger one."""
    if first == second:
        return True
    allowed = sympy.Rational(repr(tolerance)) * (1 + sympy.Rational(1, 10**9))
    return tolerance > 0 and bool(abs(first - second) <= allowed * max(abs(first), abs(second)))


def _are_near(numbers: Sequence[Any], tolerance: float) -> bool:
    return all(_is_near(number, numbers[0], tolerance) for number in numbers[1:])


# ---- Relations and sets --------------------------------------------------------------------------------------------


def _equal_relations(gold: Any, read: Any, tolerance: float) -> bool:
    if isinstance(gold, sympy.And) or isinstance(read, sympy.And):
        return same_sets(gold, read)
    (operator, first), (other, second) = _difference(gold), _difference(read)
    if operator is not other:
        return False
    symbols = sorted(first.free_symbols | second.free_symbols, key=str)
    pairs = [(_value(first, at), _value(second, at)) for at in _substitutions(symbols)]
    ratios = [one / other for one, other in pairs if one is not None and other is not None and other != 0]
    if tolerance and not _are_near(ratios, _SAME):
        ratios, allowed = _term_ratios(first, second), tolerance
    else:
        allowed = _SAME
    if len(ratios) >= 2 and _are_near(ratios, allowed):
        is_ordered = operator in (sympy.StrictGreaterThan, sympy.GreaterThan)
        return bool(ratios[0].is_real and (ratios[0] > 0 if is_ordered else ratios[0] != 0))
    if operator is not sympy.Eq or not gold.free_symbols or gold.free_symbols != read.free_symbols:
        return False
    return bool(verify(gold, read, timeout_seconds=None, numeric_precision=100))


def _difference(relation: Relational) -> tuple[Callable[..., Any], sympy.Expr]:
    """A relation as its operator towards the greater side, and what is compared with zero."""
    if isinstance(relation, (sympy.StrictLessThan, sympy.LessThan)):
        strict = isinstance(relation, sympy.StrictLessThan)
        return sympy.StrictGreaterThan if strict else sympy.GreaterThan, relation.rhs - relation.lhs
    return type(relation), relation.lhs - relation.rhs


def _as_set(found: Any) -> sympy.Set:
    if isinstance(found, sympy.Set):
        return found.doit() if found.has(sympy.Union, sympy.Complement, sympy.Intersection) else found
    if isinstance(found, (Relational, sympy.And)):
        return found.as_set()
    return sympy.FiniteSet(*(found if isinstance(found, sympy.Tuple) else [found]))
