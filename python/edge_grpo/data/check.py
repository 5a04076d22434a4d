"""Whether a dataset is fit to train on: what its rows lack, and which of its solutions the grader rejects.

Training uses ``rejected_solutions``; ``examine`` looks for everything else too, for ``edge-grpo check``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, get_args

from edge_grpo.config import TrainConfig
from edge_grpo.data.prompts import render_prompts
from edge_grpo.grading.answers import Grader, accepted_answers, is_literal
from edge_grpo.grading.normalize import normalize
from edge_grpo.policy.encoding import TextEncoder
from edge_grpo.text import AnswerStyle, bare_answer, fill, find_answer, percent, write_answer
from edge_grpo.types import Example, Outcome

if TYPE_CHECKING:
    from rich.console import RenderableType
    from transformers import PreTrainedTokenizerBase

Kind = Literal[
    "empty problem",
    "repeated problem",
    "no answer",
    "unreadable answer",
    "misread answer",
    "sentence answer",
    "multi-line answer",
    "rejected solution",
    "control token",
    "long prompt",
    "long solution",
]
# What training does with such a row.
_CONSEQUENCES: dict[Kind, str] = {
    "empty problem": "refused",
    "repeated problem": "seen more often",
    "no answer": "not judged",
    "unreadable answer": "only equal text counts",
    "misread answer": "refused",
    "sentence answer": "refused",
    "multi-line answer": "only equal text counts",
    "rejected solution": "not injected",
    "control token": "read as text",
    "long prompt": "left out",
    "long solution": "not injected whole",
}
_SENTENCE_WORDS, _PHRASE_WORDS = 8, 4  # of a sentence; of its longest part between commas, unlike a list's
_MATH = re.compile(r"\$[^$]*\$|\\\(.*?\\\)|\\[A-Za-z]+", re.DOTALL)
# A readable answer that no dataset has.
_OTHER = r"\frac{1}{7919}"
_BINS = 12
_BAR = 40


@dataclass(frozen=True)
class Finding:
    """One row's defect. ``row`` is its number in the dataset, from 0."""

    kind: Kind
    row: int
    detail: str


@dataclass(frozen=True)
class Preflight:
    """What was found. Lengths are in tokens, one per example, None without a tokenizer."""

    columns: Mapping[str, int]  # rows with a value, by column
    num_rows: int
    findings: tuple[Finding, ...]
    prompt_lengths: tuple[int, ...] | None = None
    solution_lengths: tuple[int, ...] | None = None

    @property
    def counts(self) -> dict[Kind, int]:
        found = Counter(finding.kind for finding in self.findings)
        return {kind: found[kind] for kind in get_args(Kind)}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return {
            "rows": self.num_rows,
            "columns": dict(self.columns),
            "counts": dict(self.counts),
            "prompt_tokens": _summary(self.prompt_lengths),
            "solution_tokens": _summary(self.solution_lengths),
            "findings": [{"kind": f.kind, "row": f.row, "detail": f.detail} for f in self.findings],
        }

    def render(self) -> RenderableType:
        """Return what the terminal shows: columns, findings by kind, and how long prompts are."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        columns = ", ".join(f"{name} {count:,}" for name, count in self.columns.items())
        table = Table("found", "rows", "share", "first rows", "in training", box=None, pad_edge=False)
        table.columns[1].justify = table.columns[2].justify = "right"
        for kind, count in self.counts.items():
            if kind.startswith(("long", "control")) and self.prompt_lengths is None:
                continue
            rows = [str(finding.row) for finding in self.findings if finding.kind == kind]
            first = ", ".join(rows[:4]) + (", ..." if len(rows) > 4 else "")
            share = percent(count / max(self.num_rows, 1))
            table.add_row(kind, f"{count:,}", share, first, _CONSEQUENCES[kind], style="" if count else "dim")
        parts: list[RenderableType] = [Text(f"{self.num_rows:,} rows; of these with {columns}"), "", table]
        for name, lengths in (("prompts", self.prompt_lengths), ("solutions", self.solution_lengths)):
            if lengths:
                parts += ["", _histogram(name, lengths)]
        return Group(*parts)


def rejected_solutions(examples: Sequence[Example], grader: Grader, style: AnswerStyle = "box") -> dict[int, Outcome]:
    """Return the outcomes of the reference solutions that the grader does not call correct, by position.

    A solution is judged as a response of the model is, by its last answer in that style. Where the row has no answer,
    its solution is not rejected.
    """
    judged = [
        (position, accepted_answers(example), find_answer(example.solution, style))
        for position, example in enumerate(examples)
        if example.solution is not None and example.answer is not None
    ]
    outcomes = grader([(accepted, answer) for _, accepted, answer in judged])
    return {position: outcome for (position, *_), outcome in zip(judged, outcomes, strict=True) if outcome != "correct"}


def unboxable_answers(examples: Sequence[Example], config: TrainConfig) -> dict[int, str]:
    """Return, by position, what is wrong with the answers that no model will give: sentences, and misread ones.

    Where a row accepts several answers, one that can be given is enough.
    """
    found = {}
    for position, example in enumerate(examples):
        faults = [_fault(answer, config) for answer in accepted_answers(example)]
        refused = [fault[1] for fault in faults if fault is not None and _CONSEQUENCES[fault[0]] == "refused"]
        if refused and len(refused) == len(faults):
            found[position] = refused[0]
    return found


def examine(
    examples: Sequence[Example], grader: Grader, config: TrainConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> Preflight:
    """Return the defects of the examples; lengths and control tokens are checked only with a ``tokenizer``."""
    columns: Counter[str] = Counter({"problem": 0})
    findings: list[Finding] = []
    first: dict[str, Example] = {}
    for example in examples:
        values = {"problem": example.problem, "answer": example.answer, "solution": example.solution, **example.extra}
        columns.update(name for name, value in values.items() if value is not None and value != "")
        problem = " ".join(example.problem.split())
        earlier = first.setdefault(problem, example)
        if not problem:
            findings.append(Finding("empty problem", example.index, ""))
        elif earlier is not example:
            same = "the same answer" if accepted_answers(earlier) == accepted_answers(example) else "another answer"
            findings.append(Finding("repeated problem", example.index, f"also in row {earlier.index}, with {same}"))
        if example.answer is None:
            findings.append(Finding("no answer", example.index, ""))
    findings += _unreadable_answers(examples, grader)
    findings += [
        Finding(fault[0], example.index, fault[1])
        for example in examples
        for answer in accepted_answers(example)
        if (fault := _fault(answer, config)) is not None
    ]
    style = config.reward.answer
    for position, outcome in rejected_solutions(examples, grader, style).items():
        example = examples[position]
        found = find_answer(example.solution or "", style)
        place = "its box holds" if style == "box" else "it answers"
        detail = f"{outcome}: {place} {_short(found)}, the answer is {_short(' or '.join(accepted_answers(example)))}"
        findings.append(Finding("rejected solution", example.index, detail))
    if tokenizer is None:
        return Preflight(columns, len(examples), tuple(findings))

    unlimited = replace(config.data, max_prompt_length=10**9)
    filled = [example for example in examples if example.problem]
    prompts = render_prompts(filled, tokenizer, unlimited)[0] if filled else []
    solutions = [example for example in examples if example.solution is not None]
    encoder = TextEncoder(tokenizer)
    findings += _control_tokens(examples, encoder)
    encoded = [encoder(text, [(0, len(text))]) for text in (example.solution or "" for example in solutions)]
    solution_lengths = [len(ids) + 1 for ids in encoded]  # with the end of sequence
    limit = config.data.max_prompt_length
    findings += [
        Finding("long prompt", prompt.example.index, f"{len(prompt.token_ids)} tokens of {limit}")
        for prompt in prompts
        if len(prompt.token_ids) > limit
    ]
    limit = config.rollout.max_completion_length + config.correction.max_length
    findings += [
        Finding("long solution", example.index, f"{length} tokens of {limit}")
        for example, length in zip(solutions, solution_lengths, strict=True)
        if length > limit
    ]
    lengths = tuple(len(prompt.token_ids) for prompt in prompts)
    return Preflight(columns, len(examples), tuple(findings), lengths, tuple(solution_lengths))


def _unreadable_answers(examples: Sequence[Example], grader: Grader) -> list[Finding]:
    """Accepted answers that are neither compared as text nor readable as mathematics."""
    answers = [(e, answer) for e in examples for answer in accepted_answers(e) if not is_literal(answer)]
    outcomes = grader([((_OTHER,), answer) for _, answer in answers])
    return [
        Finding("unreadable answer", example.index, f"{outcome}: {_short(answer)}")
        for (example, answer), outcome in zip(answers, outcomes, strict=True)
        if outcome in ("unparseable", "timed_out")
    ]


def _fault(answer: str, config: TrainConfig) -> tuple[Kind, str] | None:
    """What keeps a model from giving an accepted answer: it is a sentence, does not read back, or has several lines."""
    phrases = [len(re.findall(r"[^\W\d_]{2,}", phrase)) for phrase in re.split(r"[,;\n]", _MATH.sub(" ", answer))]
    if sum(phrases) >= _SENTENCE_WORDS and max(phrases) >= _PHRASE_WORDS:
        return "sentence answer", f"{sum(phrases)} words: {_short(answer)}"
    if config.use_gec and config.correction_config.answer:
        written = fill(config.correction.answer_text, "answer", bare_answer(answer))
    else:
        written = write_answer(bare_answer(answer), config.reward.answer)
    found = find_answer(written, config.reward.answer)
    if found is None or normalize(found) != normalize(answer):  # an open brace, or lines where an answer is one line
        return "misread answer", f"{_short(answer)} reads as {_short(found)}"
    lines = answer.strip().splitlines()
    return ("multi-line answer", f"{len(lines)} lines: {_short(answer)}") if len(lines) > 1 else None


def _control_tokens(examples: Sequence[Example], encoder: TextEncoder) -> list[Finding]:
    """The names of control tokens that stand in the data, which a tokenizer would read as these tokens."""
    findings = []
    for example in examples:
        texts = {"problem": example.problem, "answer": example.answer, "solution": example.solution}
        for number, message in enumerate((example.messages or ())[:-1]):
            texts[f"message {number}"] = message["content"]
        found = [
            f"{names} in the {place}" for place, text in texts.items() if text and (names := encoder.named_in(text))
        ]
        if found:
            findings.append(Finding("control token", example.index, "; ".join(found)))
    return findings


def _short(text: str | None, limit: int = 80) -> str:
    if text is None:
        return "nothing"
    return repr(text if len(text) <= limit else f"{text[:limit]}...")


def _bins(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Equal ranges of lengths, each as its first, its last, and the number of lengths in it."""
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // _BINS))
    found = Counter((length - low) // width for length in lengths)
    return [(low + n * width, low + (n + 1) * width - 1, found[n]) for n in range((high - low) // width + 1)]


def _summary(lengths: Sequence[int] | None) -> dict[str, Any] | None:
    if not lengths:
        return None
    bins = [{"from": first, "to": last, "count": count} for first, last, count in _bins(lengths)]
    return {"min": min(lengths), "median": median(lengths), "max": max(lengths), "histogram": bins}


def _histogram(name: str, lengths: Sequence[int]) -> RenderableType:
    from rich.table import Table

    bins = _bins(lengths)
    most = max(count for *_, count in bins)
    title = f"tokens of {name}: median {median(lengths):g}, at most {max(lengths):,}"
    table = Table(title=title, title_justify="left", title_style="", box=None, show_header=False, pad_edge=False)
    table.add_column(justify="right")
    table.add_column(justify="right")
    for first, last, count in bins:
        table.add_row(f"{first:,} to {last:,}", f"{count:,}", "█" * -(-_BAR * count // most))
    return table
