r"""Whether two answers are equal. Runs only in workers of ``answers``.

One pipeline: an answer is ``normalize``d, then taken apart by its form (``forms``, ``units``) until a part is a single
value, and that is mathematics (``symbolic``). Nothing here has a limit of time or memory: the process has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge_grpo.grading import forms, symbolic
from edge_grpo.grading.forms import Group
from edge_grpo.grading.units import Unit, bare_letter_quantity, quantity
from edge_grpo.types import Outcome

# How deep lists, equations and units may be nested in each other.
_MAX_DEPTH = 12


def load(tolerance: float = 0.0) -> Callable[[str, str], Outcome]:
    """The comparison with that relative tolerance for numbers, warmed up."""
    symbolic.warm_up()
    return Comparison(tolerance).judge


@dataclass(frozen=True)
class Comparison:
    """The outcome of an answer that was ``read`` where ``gold`` is right.

    Each form of answer has a method, tried in the order of ``outcome``; None says that it is of another form.
    """

    tolerance: float = 0.0

    def judge(self, gold: str, read: str) -> Outcome:
        """The outcome for two ``normalize``d answers, whatever is raised on the way."""
        try:
            return self.outcome(gold, read)
        except MemoryError:
            raise
        except Exception:  # sympy raises nearly anything, RecursionError included, on what a model may write
            return "unparseable"

    def outcome(self, gold: str, read: str, depth: int = 0) -> Outcome:
        """The outcome for two answers or parts of answers, ``depth`` steps into the whole ones."""
        if forms.without_blanks(gold) == forms.without_blanks(read):
            return "correct"
        if depth > _MAX_DEPTH or not read:
            return "unparseable"
        for compare in (
            self._options,
            self._words,
            self._numerals,
            self._groups,
            self._quantities,
            self._ratios,
            self._equations,
        ):
            if (found := compare(gold, read, depth + 1)) is not None:
                return found
        return self._mathematics(gold, read)

    # ---- Texts -----------------------------------------------------------------------------------------------------

    def _options(self, gold: str, read: str, depth: int) -> Outcome | None:
        """``(A) 5`` accepts its letter and its value; a letter alone accepts itself, with whatever value."""
        right, given = forms.option(gold), forms.option(read)
        if right is None:
            if given is None:
                return None
            own = forms.letter(gold)
            if own is not None:
                return "correct" if given[0] == own else "wrong"
            return self.outcome(gold, given[1], depth) if given[1] else None
        chosen = given[0] if given else forms.letter(read)
        if chosen is None:
            return self.outcome(right[1], read, depth) if right[1] else None
        if chosen != right[0]:
            return "wrong"
        both = given is not None and right[1] and given[1]
        return self.outcome(right[1], given[1], depth) if given and both else "correct"

    def _words(self, gold: str, read: str, depth: int) -> Outcome | None:
        """Words equal words only, but for two or three letters where the other answer is a product of letters."""
        right, given = forms.words(gold), forms.words(read)
        if right is not None and given is not None:
            return "correct" if forms.same_words(right, given) else "wrong"
        if right is not None:
            return None if forms.may_be_product(gold) or forms.group(gold) else "wrong"
        return None if given is None or forms.may_be_product(read) or forms.group(read) else "wrong"

    def _numerals(self, gold: str, read: str, depth: int) -> Outcome | None:
        """A gold answer that names its base wants the digits in that base; the answer may leave the base out."""
        right, given = forms.numeral(gold), forms.numeral(read)
        if right is None and given is None:
            return None
        if right and given:
            return "correct" if right == given else "wrong"
        (digits, _), other = (right, read) if right else (given or ("", 0), gold)
        return "correct" if other.lstrip("0") == digits else self._not_equal(gold, read)

    def _ratios(self, gold: str, read: str, depth: int) -> Outcome | None:
        """``2:3`` is ``4:6`` and, as a quotient, ``\\frac{2}{3}``."""
        right, given = forms.split(gold, (":",)), forms.split(read, (":",))
        if max(len(right), len(given)) < 2 or min(len(right), len(given)) < 1:
            return None
        if len(right) == len(given):
            pairs = [((right[0], right[k]), (given[0], given[k])) for k in range(1, len(right))]
            return self._all([self.outcome(_quotient(*one), _quotient(*other), depth) for one, other in pairs])
        if {len(right), len(given)} != {1, 2}:
            return self._not_equal(gold, read)
        first, second = (_quotient(*side) if len(side) == 2 else side[0] for side in (right, given))
        return self.outcome(first, second, depth)

    # ---- Several answers in one ------------------------------------------------------------------------------------

    def _groups(self, gold: str, read: str, depth: int) -> Outcome | None:
        plain_gold, plain_read = forms.without_membership(gold), forms.without_membership(read)
        right, given = forms.group(plain_gold), forms.group(plain_read)
        if right is None and given is not None and given.kind == "list":
            right = forms.thousands_as_list(gold)
        if given is None and right is not None and right.kind == "list":
            given = forms.thousands_as_list(read)
        if right is None or given is None:
            return self._group_and_value(right, given, plain_gold, plain_read, depth)
        kinds = (right.kind, given.kind)
        if "union" in kinds or kinds in (("interval", "list"), ("list", "interval")):
            return self._sets(plain_gold, plain_read, right, given, depth)
        if kinds == ("set", "set"):
            return self._same_elements(right.items, given.items, depth)
        if "interval" in kinds or "matrix" in kinds:
            if kinds[0] != kinds[1] or right.ends != given.ends:
                return "wrong"
            return self._in_order(right.items, given.items, depth)
        if right.kind == "tuple":
            return self._in_order(right.items, given.items, depth) if given.kind != "set" else "wrong"
        return self._in_any_order(right.items, given.items, depth)

    def _group_and_value(
        self, right: Group | None, given: Group | None, gold: str, read: str, depth: int
    ) -> Outcome | None:
        """A group on one side only: a set of one element is its element, and an interval may be written with x."""
        only = right or given
        if only is None:
            return None
        if only.kind == "set" and len(only.items) == 1:
            return self.outcome(only.items[0] if right else gold, only.items[0] if given else read, depth)
        if (right and only.kind in ("list", "tuple")) and len(sides := forms.members(read)) > 1:
            return self.outcome(gold, sides[-1], depth)  # (x, y) = (1, 2)
        if (given and only.kind in ("list", "tuple")) and len(sides := forms.members(gold)) > 1:
            return self.outcome(sides[-1], read, depth) if forms.names_value(sides[0]) else "wrong"
        return self._not_equal(gold, read) if only.kind == "list" else None

    def _sets(self, gold: str, read: str, right: Group, given: Group, depth: int) -> Outcome:
        """Unions of intervals, part by part, else as the sets that they are; "x < 1 or x > 3" is one too."""
        if right.kind == given.kind == "union":
            parts = self._same_elements(right.items, given.items, depth)
            if parts == "correct":
                return parts
        sides = [
            symbolic.union_of(group.items) if group.kind == "list" else symbolic.parsed(text)
            for text, group in ((gold, right), (read, given))
        ]
        if sides[0] is None or sides[1] is None:
            return "unparseable" if sides[1] is None and sides[0] is not None else "wrong"
        return "correct" if symbolic.same_sets(*sides) else "wrong"

    def _in_order(self, right: Sequence[str], given: Sequence[str], depth: int) -> Outcome:
        if len(right) != len(given):
            return "wrong"
        return self._all([self.outcome(*pair, depth) for pair in zip(right, given, strict=True)])

    def _in_any_order(self, right: Sequence[str], given: Sequence[str], depth: int) -> Outcome:
        """As often here as there: 3,3,5 is not 3,5."""
        left = list(given)
        if len(right) != len(given):
            return "wrong"
        for gold in right:
            outcomes: list[Outcome] = []
            for read in left:
                outcomes.append(self.outcome(gold, read, depth))
                if outcomes[-1] == "correct":
                    left.remove(read)
                    break
            else:
                return "unparseable" if left and set(outcomes) == {"unparseable"} else "wrong"
        return "correct"

    def _same_elements(self, right: Sequence[str], given: Sequence[str], depth: int) -> Outcome:
        """As sets, where repetition does not count."""
        for one, others in ((right, given), (given, right)):
            for item in one:
                pairs = ((item, other) if one is right else (other, item) for other in others)
                if not any(self.outcome(*pair, depth) == "correct" for pair in pairs):
                    return "wrong"
        return "correct"

    @staticmethod
    def _all(outcomes: Sequence[Outcome]) -> Outcome:
        ranks: tuple[Outcome, ...] = ("wrong", "unparseable")
        return next((outcome for outcome in ranks if outcome in outcomes), "correct")

    # ---- Equations and quantities ----------------------------------------------------------------------------------

    def _equations(self, gold: str, read: str, depth: int) -> Outcome | None:
        """``x = 5`` is 5, and ``2 + 3 = 5`` is; ``4 = 5`` is no number. Names on both sides have to be the same."""
        right, given = forms.members(gold), forms.members(read)
        if len(right) == len(given) == 1 or not right or not given:
            return None
        if len(right) == 1:
            return self._equation_for_value(gold, given, depth)
        if len(given) == 1:
            names = forms.names_value(right[0])
            return self.outcome(right[-1], read, depth) if names else self._not_equal(gold, read)
        ends = [(right[0], right[-1]), (given[0], given[-1])]
        for first, second in (ends[1], ends[1][::-1]):
            if self.outcome(ends[0][0], first, depth) == self.outcome(ends[0][1], second, depth) == "correct":
                return "correct"
        if any(forms.words(side) is not None for side in (*right, *given)) or len(right) > 2 or len(given) > 2:
            return "wrong"
        return None

    def _equation_for_value(self, gold: str, sides: Sequence[str], depth: int) -> Outcome:
        """The sides that are values: all must be the gold answer, a rounded one as far as it is written."""
        values = [side for side in sides[1:] if not forms.is_name(side)]
        if not forms.has_letters(sides[0]) or not values:
            values = [sides[0], *values]
        outcomes = [self.outcome(gold, value, depth) for value in values]
        if "correct" not in outcomes:
            return outcomes[-1]
        others = [value for value, found in zip(values, outcomes, strict=True) if found != "correct"]
        return "correct" if all(symbolic.rounds_to(value, gold) for value in others) else "wrong"

    def _quantities(self, gold: str, read: str, depth: int) -> Outcome | None:
        right, given = quantity(gold), quantity(read)
        if given is None and (right is not None or not re.search("[A-Za-z]", gold)):
            given = bare_letter_quantity(read)
        if right is None and given is None:
            return None
        if right and given:
            return self._converted(right, given, depth)
        number, unit = right or given or ("", Unit())
        other = read if right else gold
        pair = (number, other) if right else (other, number)
        found = self.outcome(*pair, depth)
        if found != "correct" and unit.is_only("percent"):
            found = self.outcome(*_with(pair, number, rf"\frac{{{number}}}{{100}}"), depth)
        if found != "correct" and unit.is_only("degree") and r"\pi" in other:
            found = self.outcome(*_with(pair, number, rf"({number}) \cdot \frac{{\pi}}{{180}}"), depth)
        return found

    def _converted(self, right: tuple[str, Unit], given: tuple[str, Unit], depth: int) -> Outcome:
        """Whether quantities are equal; of different nouns, or of quantities that might convert, nobody can tell."""
        (gold, wanted), (read, got) = right, given
        if wanted.noun or got.noun:
            same = self.outcome(gold, read, depth)
            return same if wanted == got or same != "correct" else "unparseable"
        if wanted.powers == got.powers:
            over, under = (got.factor / wanted.factor).as_integer_ratio()
            return self.outcome(gold, rf"({read}) \cdot \frac{{{over}}}{{{under}}}" if over != under else read, depth)
        return "wrong" if self.outcome(gold, read, depth) == "correct" else "unparseable"

    def _mathematics(self, gold: str, read: str) -> Outcome:
        if symbolic.parsed(read) is None or symbolic.parsed(gold) is None:
            return self._not_equal(gold, read)
        found = symbolic.equal(gold, read, self.tolerance)
        return "unparseable" if found is None else "correct" if found else "wrong"

    def _not_equal(self, gold: str, read: str) -> Outcome:
        """What an answer of another form is: unparseable where it is no mathematics and the gold answer is."""
        return "wrong" if _is_readable(read) or not _is_readable(gold) else "unparseable"


def _is_readable(text: str) -> bool:
    """Whether an answer is mathematics, each part of it."""
    if forms.numeral(text) or symbolic.parsed(text) is not None:
        return True
    parts = forms.group(text)
    items = parts.items if parts else forms.split(text, (":",))
    if len(items) == 1:
        found = quantity(text)
        items = (found[0],) if found else forms.members(text)
    return bool(items) and items != (text,) and all(map(_is_readable, items))


def _quotient(first: str, second: str) -> str:
    return rf"\frac{{{first}}}{{{second}}}"


def _with(pair: tuple[str, str], old: str, new: str) -> tuple[str, str]:
    return (new, pair[1]) if pair[0] == old else (pair[0], new)
