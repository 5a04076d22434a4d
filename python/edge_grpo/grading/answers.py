r"""Whether an answer is right: what the texts alone decide, and the workers that ask math-verify about the rest.

Finding the answer in a completion is ``edge_grpo.text``. math-verify itself, ``edge_grpo.grading.equivalence``, runs in
processes that can be killed, because what a model may write can keep it busy for ever.
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence

from edge_grpo.grading.forms import is_number_row, may_be_product, same_words, without_blanks, words
from edge_grpo.grading.normalize import MAX_ANSWER_LENGTH, normalize
from edge_grpo.grading.workers import Failure, WorkerPool
from edge_grpo.types import Example, Outcome

# What math-verify gets by with, sympy included, is a tenth of it.
_MEMORY_BYTES = 1 << 30
_CACHE_SIZE = 1 << 16
_Comparison = tuple[str, str]  # the accepted answer and the one that was read, both normalized

_INTEGER = re.compile(r"[+-]?\d+")


class Grader:
    r"""Judges answers, each comparison within ``timeout`` seconds and in one of ``workers`` processes.

    The outcome of an answer is

        correct      it equals one of the accepted answers
        wrong        it equals none
        unparseable  it cannot be read (while an accepted answer can): none is given, a blank one, text that
                     is not mathematics, more than ``MAX_ANSWER_LENGTH`` characters; or there is no accepted answer
        timed_out    comparing took more than its share of time or memory, or crashed, so that nobody knows

    Equal after ``normalize``, integers, words and rows of numbers are decided at once; processes start when first
    needed, by default two of them, or one on a single core. Outcomes do not depend on the number of processes, on the
    order, or on what else is judged. Any thread may call.
    """

    def __init__(self, *, workers: int | None = None, timeout: float = 5.0, tolerance: float = 0.0) -> None:
        self.tolerance = tolerance
        self._pool = WorkerPool(
            "edge_grpo.grading.equivalence:load",
            (tolerance,),
            timeout=timeout,
            size=min(2, len(os.sched_getaffinity(0))) if workers is None else workers,
            memory_limit=_MEMORY_BYTES,
        )
        self._known: OrderedDict[_Comparison, Outcome] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, pairs: Sequence[tuple[Sequence[str], str | None]]) -> list[Outcome]:
        """Return one outcome per pair of accepted answers and the answer that a completion gives (None: it gives none).

        Never raises because of what an answer holds; RuntimeError when no process can be started.
        """
        entries = [[self._settle(gold, answer) for gold in accepted] for accepted, answer in pairs]
        # Where one accepted answer matches to the letter the others do not matter.
        entries = [["correct"] if "correct" in entry else entry for entry in entries]
        with self._lock:
            found = self._compare([item for entry in entries for item in entry if isinstance(item, tuple)])
        return [_best([found[item] if isinstance(item, tuple) else item for item in entry]) for entry in entries]

    def close(self) -> None:
        self._pool.close()

    def _settle(self, gold: str, answer: str | None) -> Outcome | _Comparison:
        """The outcome where the texts decide, else what is to be compared."""
        right, read = normalize(gold), normalize(answer) if answer is not None else ""
        if not read:
            return "unparseable"
        if without_blanks(read) == without_blanks(right):
            return "correct"
        if _INTEGER.fullmatch(read) and _INTEGER.fullmatch(right):
            if _canonical_integer(read) == _canonical_integer(right):
                return "correct"
            if not self.tolerance:
                return "wrong"
        right_words, read_words = words(right), words(read)
        if right_words is not None and read_words is not None:
            return "correct" if same_words(right_words, read_words) else "wrong"
        if is_literal(gold):
            return "wrong"
        return (right, read) if len(read) <= MAX_ANSWER_LENGTH else "unparseable"

    def _compare(self, comparisons: Sequence[_Comparison]) -> dict[_Comparison, Outcome]:
        """What math-verify says of each comparison; the same ones are made once, now and in later calls."""
        unknown = [key for key in dict.fromkeys(comparisons) if key not in self._known]
        for key, result in zip(unknown, self._pool.map(unknown) if unknown else [], strict=True):
            self._known[key] = "timed_out" if isinstance(result, Failure) else result
        found = {key: self._known[key] for key in comparisons}
        for key in found:
            self._known.move_to_end(key)
        while len(self._known) > _CACHE_SIZE:
            self._known.popitem(last=False)
        return found


def accepted_answers(example: Example) -> tuple[str, ...]:
    """Every answer that counts as right: the row's ``accepted_answers`` where it has several, else its answer."""
    if example.accepted_answers:
        return example.accepted_answers
    return () if example.answer is None else (example.answer,)


def is_literal(gold: str) -> bool:
    """Whether only the same text, but for case, is equal to an accepted answer: lines, words, or a row of numbers."""
    text = normalize(gold)
    return "\n" in gold.strip() or is_number_row(text) or (words(text) is not None and not may_be_product(text))


def _best(outcomes: Sequence[Outcome]) -> Outcome:
    """Of the outcomes with each accepted answer the one that counts."""
    ranks: tuple[Outcome, ...] = ("correct", "timed_out", "wrong")
    return next((outcome for outcome in ranks if outcome in outcomes), "unparseable")


def _canonical_integer(text: str) -> tuple[bool, str]:
    """Sign and digits, compared as text because Python refuses to convert integers of thousands of digits."""
    digits = text.lstrip("+-").lstrip("0")
    return text.startswith("-") and bool(digits), digits
