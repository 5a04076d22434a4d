r"""Pure functions on strings: filling one placeholder into a template, and finding the \boxed{} answers of a text.

Whether an answer is right is ``edge_grpo.rewards``; nothing here knows tokens.
"""

from __future__ import annotations

import re
import string

_BOXES_AND_BRACES = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|(?P<brace>[{}])", re.DOTALL)
_BOX = re.compile(r"\\boxed\s*\{")
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


def boxes(text: str) -> list[str | None]:
    r"""The content of every ``\boxed{...}`` in the order of their openings; None for one that is never closed.

    Braces are matched as LaTeX does: ``\{`` and ``\}`` do not count. One pass, whatever the nesting.
    """
    contents: list[str | None] = []
    open_braces: list[tuple[int | None, int]] = []  # which box it opened, and where its content starts
    for match in _BOXES_AND_BRACES.finditer(text):
        if match["box"]:
            open_braces.append((len(contents), match.end()))
            contents.append(None)
        elif match["brace"] == "{":
            open_braces.append((None, match.end()))
        elif match["brace"] == "}" and open_braces:
            box, start = open_braces.pop()
            if box is not None:
                contents[box] = text[start : match.start()]
    return contents


def last_box(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}``; None where there is none or the last one is never closed."""
    return next(reversed(boxes(text)), None)


def bare_answer(text: str) -> str:
    r"""An answer without what surrounds it: blanks, math delimiters (``$``, ``\(``, ``\[``), a box around all of it."""
    text = _MATH_DELIMITERS.sub(lambda match: match["escaped"] or "", text).strip()
    while (opening := _BOX.match(text)) and (content := boxes(text)[0]) is not None:
        if opening.end() + len(content) + 1 != len(text):
            break  # something follows the box
        text = content.strip()
    return text
