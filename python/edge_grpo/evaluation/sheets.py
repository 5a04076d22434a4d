"""Answer sheets: whether a grader accepts a data set's own answers and rejects wrong ones. No model is asked.

How answers are compared is ``edge_grpo.grading.answers``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, get_args

from edge_grpo.grading.answers import Grader, accepted_answers
from edge_grpo.text import bare_answer, last_box
from edge_grpo.types import Example, Outcome

if TYPE_CHECKING:
    from edge_grpo.data.templates import Template


@dataclass(frozen=True)
class SheetCheck:
    """How a grader judges a perfect answer sheet of a set and several wrong ones; tuples hold rows.

    The wrong sheets: ``wrong`` has other answers, ``zeros`` and ``ones`` have the same number throughout, ``near`` has
    the gold answers increased by one in a thousand. ``text_only`` are the rows whose answer the grader does not read as
    mathematics: it accepts only equal text and rejects the same answer written differently. ``unanswered`` rows have no
    answer and are on no sheet.
    """

    gold: Mapping[Outcome, int]
    wrong: Mapping[Outcome, int]
    zeros: Mapping[Outcome, int]
    ones: Mapping[Outcome, int]
    near: Mapping[Outcome, int]
    rejected: tuple[int, ...]  # gold answers that are not correct
    accepted: tuple[int, ...]  # answers of a wrong sheet that are, although they are not the gold answer
    text_only: tuple[int, ...]
    unanswered: tuple[int, ...]

    @property
    def sheets(self) -> tuple[Mapping[Outcome, int], ...]:
        """The outcomes of each sheet, the perfect one first."""
        return self.gold, self.wrong, self.zeros, self.ones, self.near

    @property
    def is_sound(self) -> bool:
        return not self.rejected and not self.accepted


def check_sheets(examples: Sequence[Example], template: Template, grader: Grader) -> SheetCheck:
    """Return the verdicts on a perfect answer sheet and several wrong ones, with answers as ``template`` wants them."""
    answered = [example for example in examples if accepted_answers(example)]
    writers = (gold_answer, wrong_answer, lambda _: "0", lambda _: "1", near_answer)
    sheets: list[list[Outcome]] = []
    for write in writers:
        answers = [last_box(template.boxed(template.answer_with(write(example)))) for example in answered]
        sheets.append(grader([(accepted_answers(e), answer) for e, answer in zip(answered, answers, strict=True)]))
    accepted = {
        example.index
        for write, sheet in zip(writers[1:], sheets[1:], strict=True)
        for example, outcome in zip(answered, sheet, strict=True)
        if outcome == "correct" and write(example) not in map(_value, accepted_answers(example))
    }
    # An unreadable answer is "wrong" where the gold is text, and "unparseable" where it is mathematics.
    probes = [(example.index, answer) for example in answered for answer in accepted_answers(example)]
    readable = grader([((answer,), ")(") for _, answer in probes])
    read = {index for (index, _), outcome in zip(probes, readable, strict=True) if outcome != "wrong"}
    gold, wrong, zeros, ones, near = (
        {outcome: sheet.count(outcome) for outcome in get_args(Outcome)} for sheet in sheets
    )
    return SheetCheck(
        gold,
        wrong,
        zeros,
        ones,
        near,
        rejected=tuple(e.index for e, outcome in zip(answered, sheets[0], strict=True) if outcome != "correct"),
        accepted=tuple(example.index for example in answered if example.index in accepted),
        text_only=tuple(example.index for example in answered if example.index not in read),
        unanswered=tuple(example.index for example in examples if not accepted_answers(example)),
    )


def gold_answer(example: Example) -> str:
    """Return the first accepted answer, as the data set writes it."""
    return accepted_answers(example)[0]


def wrong_answer(example: Example) -> str:
    """Return a wrong answer: one more than the largest where whole numbers are accepted, else 987654321."""
    accepted = accepted_answers(example)
    if all(re.fullmatch(r"-?\d{1,18}", answer.strip()) for answer in accepted):
        return str(max(map(int, accepted)) + 1)
    return "987654321"


def near_answer(example: Example) -> str:
    """Return the first accepted answer increased by one in a thousand; 0.001 for zero."""
    value = _value(gold_answer(example))
    if re.fullmatch(r"[+-]?\d*\.?\d+", value):
        return str(Decimal(value) * Decimal("1.001")) if Decimal(value) else "0.001"
    return rf"1.001 \cdot ({bare_answer(gold_answer(example))})"


def _value(answer: str) -> str:
    """What an answer such as k = 1 says, as text that the grader has no part in."""
    return bare_answer(answer).rpartition("=")[2].strip()
