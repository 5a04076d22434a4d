"""Answer sheets: whether a grader accepts a data set's own answers and rejects wrong ones. No model is asked.

How answers are compared is ``edge_grpo.grading.answers``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from edge_grpo.grading.answers import Grader, accepted_answers
from edge_grpo.text import last_box
from edge_grpo.types import Example, Outcome

if TYPE_CHECKING:
    from edge_grpo.data.templates import Template


@dataclass(frozen=True)
class SheetCheck:
    """How a grader judges a perfect and a wrong answer sheet of a set; tuples hold rows.

    ``text_only`` are the rows whose answer the grader does not read as mathematics: it accepts only equal text and
    rejects the same answer written differently. ``unanswered`` rows have no answer and are on neither sheet.
    """

    gold: Mapping[Outcome, int]
    wrong: Mapping[Outcome, int]
    rejected: tuple[int, ...]  # gold answers that are not correct
    accepted: tuple[int, ...]  # wrong answers that are
    text_only: tuple[int, ...]
    unanswered: tuple[int, ...]

    @property
    def is_sound(self) -> bool:
        return not self.rejected and not self.accepted


def check_sheets(examples: Sequence[Example], template: Template, grader: Grader) -> SheetCheck:
    """Return the verdicts on a perfect and a wrong answer sheet, with answers as ``template`` asks for them."""
    answered = [example for example in examples if accepted_answers(example)]
    sheets: list[list[Outcome]] = []
    for write in (gold_answer, wrong_answer):
        answers = [last_box(template.boxed(template.answer_with(write(example)))) for example in answered]
        sheets.append(grader([(accepted_answers(e), answer) for e, answer in zip(answered, answers, strict=True)]))
    gold, wrong = sheets
    # An unreadable answer is "wrong" where the gold is text, and "unparseable" where it is mathematics.
    probes = [(example.index, answer) for example in answered for answer in accepted_answers(example)]
    readable = grader([((answer,), ")(") for _, answer in probes])
    read = {index for (index, _), outcome in zip(probes, readable, strict=True) if outcome != "wrong"}
    return SheetCheck(
        gold={outcome: gold.count(outcome) for outcome in get_args(Outcome)},
        wrong={outcome: wrong.count(outcome) for outcome in get_args(Outcome)},
        rejected=tuple(e.index for e, outcome in zip(answered, gold, strict=True) if outcome != "correct"),
        accepted=tuple(e.index for e, outcome in zip(answered, wrong, strict=True) if outcome == "correct"),
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
