r"""Pure functions on strings: filling a template, finding the answer in a completion, numbers for display.

Whether an answer is right is ``edge_grpo.grading.answers``; nothing here knows a tokenizer.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Sequence
from typing import Literal

# How a completion gives its answer: in a \boxed{}, as GSM8K does (#### 5), on a line "Answer: 5", or in <answer> tags.
AnswerStyle = Literal["box", "hash", "line", "tag"]
Reasoning = Literal["auto", "ignore", "require_end"]
Span = tuple[int, int]  # a place in a text: where it starts, and where it stops

# A box around a number or a capital letter may do without braces: \boxed 5.
_BOXES_AND_BRACES = re.compile(
    r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\(?:boxed|fbox)\s*(?P<bare>-?\d(?:[\d.,/]*\d)?|[A-Z](?![A-Za-z]))|\\.|(?P<brace>[{}])",
    re.DOTALL,
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?P<brace>\{)?")
_MARKED_ANSWERS = {
    "hash": re.compile(r"####[ \t]*(?P<answer>[^\n]*)"),
    "line": re.compile(r"(?i:\banswer)(?:\*\*|__)?[ \t]*:(?:\*\*|__)?[ \t]*(?P<answer>[^\n]*)"),
    "tag": re.compile(r"<answer>(?:(?P<answer>(?:(?!<answer>).)*?)</answer>)?", re.DOTALL),
}
_REASONING_STARTS, _REASONING_ENDS = "<think>", "</think>"
_HOLE = "\ue000\ue001"  # private characters, which no template has
_MATH_DELIMITERS = re.compile(r"(?P<escaped>\\\\|\\\$)|\$|\\[()\[\]]")


def fill(template: str, name: str, value: str) -> str:
    r"""The template with ``value`` in place of ``{name}``; braces within ``value`` stay as they are.

    A template whose only field is ``{name}`` follows ``str.format``, so ``{{`` and ``}}`` stand for braces. Any other
    is taken literally but for ``{name}``: ``"\boxed{}. {problem}"`` may be written as LaTeX wants it.
    """
    try:
        fields = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    except ValueError:  # a lone brace
        fields = set()
    return template.format(**{name: value}) if fields == {name} else template.replace(f"{{{name}}}", value)


def fill_with_spans(template: str, name: str, value: str) -> tuple[str, list[Span]]:
    """What ``fill`` returns, and where ``value`` stands in it; all of it where the template changes the value."""
    text = fill(template, name, value)
    first, *rest = fill(template, name, _HOLE).split(_HOLE)
    filled, spans = first, []
    for literal in rest:
        spans.append((len(filled), len(filled) + len(value)))
        filled += value + literal
    return text, spans if filled == text else [(0, len(text))]


def encode_after_text(encode: Callable[[str], Sequence[int]], text: str) -> list[int]:
    """The tokens of ``text`` after other text, or alone if the tokenizer would merge the two into one token.

    Some tokenizers put a blank before whatever they encode.
    """
    before = "a" if text[:1].isspace() else "\n"
    start, both = list(encode(before)), list(encode(before + text))
    return both[len(start) :] if both[: len(start)] == start else list(encode(text))


def boxes(text: str) -> list[tuple[int, int | None]]:
    r"""Where the content of every ``\boxed{...}`` starts and stops, by opening; None for one that is never closed.

    ``\boxed 5`` is a box too, and so is ``\fbox{...}`` where there is no other. Braces are matched as LaTeX does:
    ``\{`` and ``\}`` do not count. One pass, whatever the nesting.
    """
    spans: list[tuple[int, int | None]] = []
    is_frame: list[bool] = []
    open_braces: list[int | None] = []  # which box each opened
    for match in _BOXES_AND_BRACES.finditer(text):
        if match["box"] or match["bare"]:
            is_frame.append(match[0].startswith(r"\fbox"))
        if match["box"]:
            open_braces.append(len(spans))
            spans.append((match.end(), None))
        elif match["bare"]:
            spans.append(match.span("bare"))
        elif match["brace"] == "{":
            open_braces.append(None)
        elif match["brace"] == "}" and open_braces:
            box = open_braces.pop()
            if box is not None:
                spans[box] = (spans[box][0], match.start())
    return spans if all(is_frame) else [span for span, frame in zip(spans, is_frame, strict=True) if not frame]


def last_box(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}``; None where there is none or the last one is never closed."""
    start, stop = next(reversed(boxes(text)), (0, None))
    return None if stop is None else text[start:stop]


def find_answers(text: str, style: AnswerStyle = "box") -> list[str | None]:
    """Every answer that a text gives in that style, in order; None for one that is begun and not ended.

    What a mark or a tag announces may itself stand in a box.
    """
    if style == "box":
        return [None if stop is None else text[start:stop] for start, stop in boxes(text)]
    return [
        found if found is None or not boxes(found) else last_box(found)
        for match in _MARKED_ANSWERS[style].finditer(text)
        for found in [match["answer"]]
    ]


def find_answer(text: str, style: AnswerStyle = "box") -> str | None:
    """The last answer that a text gives in that style; None where there is none or the last one is not ended."""
    if style == "box":
        return last_box(text)
    found = find_answers(text, style)
    return found[-1] if found else None


def write_answer(answer: str, style: AnswerStyle) -> str:
    r"""The shortest text that gives an answer in that style: ``\boxed{5}``, ``#### 5``, ``Answer: 5``, ``<answer>``."""
    return {"box": "\\boxed{%s}", "hash": "#### %s", "line": "Answer: %s", "tag": "<answer>%s</answer>"}[style] % answer


def is_reasoning(completion: str, *, prompt: str = "", reasoning: Reasoning = "auto") -> bool:
    """Whether a completion stops within its reasoning, so that nothing in it is an answer yet.

    auto         it is within a think block that it, or the end of the prompt, has opened
    require_end  that, or there is no ``</think>`` at all (TRL's ``reasoning_accuracy_reward``)
    ignore       never
    """
    if reasoning == "ignore":
        return False
    end = completion.rfind(_REASONING_ENDS)
    if end < 0 and (reasoning == "require_end" or prompt.rstrip().endswith(_REASONING_STARTS)):
        return True
    return completion.rfind(_REASONING_STARTS) > end


def after_reasoning(completion: str, *, prompt: str = "", reasoning: Reasoning = "auto") -> str:
    """What a completion says after its reasoning: nothing while it ``is_reasoning``."""
    if is_reasoning(completion, prompt=prompt, reasoning=reasoning):
        return ""
    return completion if reasoning == "ignore" else completion.rpartition(_REASONING_ENDS)[2]


def bare_answer(text: str) -> str:
    r"""An answer without what surrounds it: blanks, math delimiters (``$``, ``\(``, ``\[``), a box around all of it."""
    text = _MATH_DELIMITERS.sub(lambda match: match["escaped"] or "", text).strip()
    start, stop = 0, len(text)
    for inner_start, inner_stop in boxes(text):
        opening = _BOX.match(text, start)
        if opening is None or (opening.end(), stop - bool(opening["brace"])) != (inner_start, inner_stop):
            break  # there is text beside the box
        start, stop = inner_start, stop - bool(opening["brace"])
        while start < stop and text[start].isspace():
            start += 1
        while start < stop and text[stop - 1].isspace():
            stop -= 1
    return text[start:stop]


def percent(share: float) -> str:
    """A share for display: 0.125 is ``12.5%``, NaN is ``-``."""
    return "-" if math.isnan(share) else f"{100 * share:.1f}%"


def clock(seconds: float) -> str:
    """A duration for display: ``15 s``, ``1 min 15 s``, ``2 h 03 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
