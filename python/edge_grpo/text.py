r"""Pure functions on strings: filling one placeholder into a template, and finding the \boxed{} answers of a text.

Whether an answer is right is ``edge_grpo.grading.answers``; nothing here knows tokens.
"""

from __future__ import annotations

import re
import string

# A box around a number or a capital letter may do without braces: \boxed 5.
_BOXES_AND_BRACES = re.compile(
    r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\(?:boxed|fbox)\s*(?P<bare>-?\d(?:[\d.,/]*\d)?|[A-Z](?![A-Za-z]))|\\.|(?P<brace>[{}])",
    re.DOTALL,
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?P<brace>\{)?")
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


def boxes(text: str) -> list[tuple[int, int | None]]:
    r"""Where the content of every ``\boxed{...}`` starts and stops, by opening; None for one that is never closed.

    ``\fbox{...}`` is a box too, and so is ``\boxed 5``. Braces are matched as LaTeX does: ``\{`` and ``\}`` do not
    count. One pass, whatever the nesting.
    """
    spans: list[tuple[int, int | None]] = []
    open_braces: list[int | None] = []  # which box each opened
    for match in _BOXES_AND_BRACES.finditer(text):
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
    return spans


def last_box(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}``; None where there is none or the last one is never closed."""
    start, stop = next(reversed(boxes(text)), (0, None))
    return None if stop is None else text[start:stop]


def bare_answer(text: str) -> str:
    r"""An answer without what surrounds it: blanks, math delimiters (``$``, ``\(``, ``\[``), a box around all of it."""
    text = _MATH_DELIMITERS.sub(lambda match: match["escaped"] or "", text).strip()
    start, stop = 0, len(text)
    for inner_start, inner_stop in boxes(text):
        opening = _BOX.match(text, start)
        if opening is None or (opening.end(), stop - bool(opening["brace"])) != (inner_start, inner_stop):
            break  # something stands beside the box
        start, stop = inner_start, stop - bool(opening["brace"])
        while start < stop and text[start].isspace():
            start += 1
        while start < stop and text[stop - 1].isspace():
            stop -= 1
    return text[start:stop]
