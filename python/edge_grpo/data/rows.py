r"""From a row of a dataset to an ``Example``: which columns it means, conversations, and answers as they are published.

Reading rows is ``files``; naming a dataset, ``sources``.
"""

from __future__ import annotations

import difflib
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from edge_grpo.text import AnswerStyle, last_box, write_answer
from edge_grpo.types import Example

# Other usual names of these columns: they are suggested in a message and never used unasked.
_USUAL_NAMES = {
    "problem": ("question", "prompt", "query", "input", "instruction"),
    "answer": ("final_answer", "ground_truth", "target", "expected_answer", "label"),
    "solution": ("reference_solution", "rationale", "explanation", "generated_solution"),
}
# Where TRL and verl keep the conversation, and verl the answer. Nothing else has values of these types there.
_CONVERSATION, _GROUND_TRUTH = "prompt", "reward_model.ground_truth"
# GSM8K's: the rationale, and on the last line the answer. What its calculator did stands in << >>.
_MARKED = re.compile(r"(?P<rationale>.*?)(?:^|\n)[ \t]*####[ \t]*(?P<answer>[^\n]*?\S)\s*", re.DOTALL)
_CALCULATIONS = re.compile(r"<<[^<>\n]*>>")


class RowReader:
    """Makes examples of the rows of one dataset, ``spec``.

    ``columns`` maps problem, answer and solution to column names; a name with dots leads into a column of objects. The
    column of a role that is not mapped has the role's name. Without such columns, a ``prompt`` of messages is the
    problem, and ``reward_model.ground_truth`` the answer. Raises ValueError for columns that are not there.
    """

    def __init__(
        self, spec: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], style: AnswerStyle
    ) -> None:
        self.spec = spec
        self.style = style
        self.names = _resolve_columns(spec, rows, columns)

    def read(self, index: int, row: Mapping[str, Any]) -> Example:
        """Return row number ``index`` as an example; ValueError or TypeError for a value that cannot be one."""
        values = {role: _cell(row, name) for role, name in self.names.items()}
        messages = None
        if is_conversation(values["problem"]):
            messages = self._messages(index, values["problem"])
            problem = messages[-1]["content"]
        else:
            problem = self._text(index, "problem", values["problem"]) or ""
        own = [name for role, name in self.names.items() if name == role or (role == "problem" and messages)]
        extra = {key: item for key, item in row.items() if key not in own}
        accepted = self._answers(index, values.get("answer"))
        solution = self._solution(index, values.get("solution"))
        if accepted and (match := _MARKED.fullmatch(accepted[0])):
            solution = solution or self._with_answer(match)
        accepted = tuple(dict.fromkeys(_after_mark(answer) for answer in accepted))
        if "answer" not in self.names and solution is not None and (boxed := last_box(solution)):
            accepted = (boxed,)
        answer = accepted[0] if accepted else None
        return Example(index, problem, answer, solution, extra, accepted if len(accepted) > 1 else (), messages)

    def _answers(self, index: int, value: Any) -> tuple[str, ...]:
        """The answers that are accepted; of a list each."""
        if not isinstance(value, (list, tuple)):
            text = self._text(index, "answer", value)
            return () if text is None else (text,)
        texts = (self._text(index, "answer", item) for item in value)
        return tuple(dict.fromkeys(text.strip() for text in texts if text is not None))

    def _solution(self, index: int, value: Any) -> str | None:
        """The reference solution; of a list the first. One that ends in ``#### 4`` ends in the style of the run."""
        texts = [
            self._text(index, "solution", item) for item in (value if isinstance(value, (list, tuple)) else [value])
        ]
        text = next((text for text in texts if text is not None), None)
        match = None if text is None else _MARKED.fullmatch(text)
        return text if match is None else self._with_answer(match) or text

    def _with_answer(self, marked: re.Match[str]) -> str | None:
        """A rationale with its answer where the run looks for answers; None where there is no rationale."""
        rationale = _CALCULATIONS.sub("", marked["rationale"]).strip()
        return f"{rationale}\n{write_answer(marked['answer'], self.style)}" if rationale else None

    def _messages(self, index: int, value: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, str], ...]:
        messages = tuple(
            {"role": str(message["role"]), "content": self._content(index, message["content"])} for message in value
        )
        if messages[-1]["role"] != "user":
            raise ValueError(
                f"{self.spec}, row {index}: the conversation must end with a message of the user, which the model "
                f"is to answer; its last role is {messages[-1]['role']!r}"
            )
        return messages

    def _content(self, index: int, content: Any) -> str:
        """A message's text; its parts may be a list of objects with a type, of which only text is known."""
        if isinstance(content, (list, tuple)):
            others = [part for part in content if not isinstance(part, Mapping) or part.get("type") != "text"]
            if others:
                raise ValueError(
                    f"{self.spec}, row {index}: a message must hold text alone; got a part {str(others[0])[:80]!r}"
                )
            content = "".join(str(part.get("text") or "") for part in content)
        return self._text(index, "problem", content) or ""

    def _text(self, index: int, role: str, value: Any) -> str | None:
        """A cell as text; None for null, NaN and blanks."""
        if value is None or isinstance(value, str):
            return self._checked(index, role, value) if value and value.strip() else None
        if isinstance(value, bool):
            return str(value)
        if isinstance(value, numbers.Integral):
            return str(int(value))
        if isinstance(value, (numbers.Real, Decimal)):
            return plain_number(value)
        wanted = {"answer": "text, a number, or a list of those", "problem": "text, a number, or a list of messages"}
        raise TypeError(
            f"{self.spec}, row {index}: the {role} must be {wanted.get(role, 'text, a number, or a list of texts')}; "
            f"got {type(value).__name__} {str(value)[:80]!r}"
        )

    def _checked(self, index: int, role: str, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{self.spec}, row {index}: the {role} holds {text[error.start]!a} at place {error.start}, which is "
                "half of a character (a lone surrogate); repair or remove the row"
            ) from None
        return text


def is_conversation(value: Any) -> bool:
    """Return whether a cell is a list of messages, each with a role and a content."""
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(item, Mapping) and "role" in item and "content" in item for item in value)
    )


def plain_number(value: Any) -> str | None:
    """Return a real number without an exponent and superfluous zeros: 142.0 is "142"; None for NaN."""
    number = value if isinstance(value, Decimal) else Decimal(repr(float(value)))  # 0.1, not its binary expansion
    if number.is_nan():
        return None
    if number.is_infinite():
        return "\\infty" if number > 0 else "-\\infty"
    text = format(number, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return a suggestion that ends a sentence."""
    close = difflib.get_close_matches(name, choices, n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def _after_mark(answer: str) -> str:
    match = _MARKED.fullmatch(answer)
    return match["answer"] if match else answer


def _cell(row: Mapping[str, Any], name: str) -> Any:
    """A row's value; ``a.b`` is the value of ``b`` in the object that column ``a`` holds."""
    if name in row or "." not in name:
        return row.get(name)
    head, _, rest = name.partition(".")
    inner = row.get(head)
    return _cell(inner, rest) if isinstance(inner, Mapping) else None


def _resolve_columns(spec: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> dict[str, str]:
    """The dataset's column for each of problem, answer and solution that it has."""
    known = getattr(rows, "column_names", None) or list(dict.fromkeys(key for row in rows for key in row))
    unknown = [role for role in columns if role not in _USUAL_NAMES]
    if unknown:
        raise ValueError(f"data.columns maps problem, answer and solution; got {', '.join(map(repr, unknown))}")

    def is_there(name: str) -> bool:
        if name in known or "." not in name:
            return name in known
        return name.partition(".")[0] in known and any(_cell(row, name) is not None for row in rows)

    names = {}
    for role, usual in _USUAL_NAMES.items():
        name = columns.get(role, role)
        if (
            role == "problem"
            and role not in columns
            and role not in known
            and is_conversation(rows[0].get(_CONVERSATION))
        ):
            names[role] = _CONVERSATION
        elif role == "answer" and role not in columns and role not in known and is_there(_GROUND_TRUTH):
            names[role] = _GROUND_TRUTH
        elif role not in columns and role in columns.values():
            continue  # it has another role
        elif is_there(name):
            names[role] = name
        elif role in columns or role == "problem":
            likely = [other for other in (role, *usual) if other in known]
            hint = f"; did you mean {likely[0]!r}?" if likely else did_you_mean(name, known)
            raise ValueError(
                f"{spec} has no column {name!r} for the {role}{hint} There are {', '.join(known)}; name it with "
                f"data.columns.{role}=COLUMN"
            )
    return names
