"""The help about the configuration's keys: what is said beside each field, and its layout for a terminal.

The keys themselves, with these comments, are in ``keys`` and, for the loss, in ``edge_kernels.config``.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any, NamedTuple

from edge_grpo.config.checks import choices_of
from edge_grpo.config.keys import TrainConfig, options_of

# What most users set: ``edge-grpo train --help`` shows these, ``--help all`` every key.
COMMON = (
    *("method", "steps", "seed", "output", "save_every"),
    *("model.path", "model.precision"),
    *("data.train", "data.columns", "data.system_prompt", "data.max_prompt_length"),
    *("eval.data", "eval.every"),
    *("rollout.engine", "rollout.num_prompts", "rollout.num_generations", "rollout.temperature"),
    *("rollout.max_completion_length", "rollout.batch_size"),
    "reward.weights",
    *("correction.mix", "correction.max_length"),
    *("loss.loss_type", "loss.beta", "loss.injected"),
    *("optim.learning_rate", "optim.micro_batch_size"),
)
_INDENT = 34


class Entry(NamedTuple):
    """One configuration key as ``edge-grpo train --help`` shows it."""

    key: str
    choices: list[str]  # where only these texts can be set
    default: Any
    help: str


def describe(cls: Any = TrainConfig, prefix: str = "") -> Iterator[Entry]:
    """Yield every key that can be set, sections last, with the help written beside its field."""
    notes, defaults, options = _notes(cls), cls(), options_of(cls)
    for name, annotation in options.items():
        if not is_dataclass(annotation):
            yield Entry(f"{prefix}{name}", choices_of(annotation), getattr(defaults, name), notes.get(name, ""))
    for name, annotation in options.items():
        if is_dataclass(annotation):
            yield from describe(annotation, f"{prefix}{name}.")


def keys_help(width: int, *, every: bool) -> str:
    """Return the keys with their defaults and help, grouped by section, in lines of at most ``width``."""
    what = "every configuration key" if every else "the most used configuration keys (--help all shows every key)"
    lines = textwrap.wrap(
        f"{what}, for YAML files (nested by the dots) and for KEY=VALUE, each with its default:", width
    )
    section = ""
    said: dict[str, str] = {}
    for entry in describe():
        if not every and entry.key not in COMMON:
            continue
        if entry.key.rpartition(".")[0] != section:
            section = entry.key.rpartition(".")[0]
            lines.append("")
        lines += _lines(entry, said, width)
    return "\n".join(lines) + "\n"


def _lines(entry: Entry, said: dict[str, str], width: int) -> list[str]:
    """Return the lines of one key; help that was ``said`` of another key is not repeated."""
    left = f"  {entry.key}={_shown(entry.default)}"
    is_reference = entry.help.startswith("see ")
    first = entry.key if is_reference else said.setdefault(entry.help, entry.key)
    text = entry.help if first == entry.key else f"see {first}"
    if not all(choice in text for choice in entry.choices):
        text = f"{text} ({', '.join(entry.choices)})"
    right = textwrap.wrap(text, width - _INDENT, break_on_hyphens=False) or [""]
    lines = [left] if len(left) > _INDENT - 2 else [left.ljust(_INDENT) + right.pop(0)]
    return lines + [" " * _INDENT + line for line in right]


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, str):
        return json.dumps(value) if value != value.strip() else value
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {item}" for name, item in value.items()) + "}"
    return "[]" if value == () else str(value)


def _notes(cls: Any) -> dict[str, str]:
    """Return what is said about each field: the comment beside or above it, or its paragraph in the docstring.

    Such a paragraph begins "``name``  text" or "``name, other``  text"; a field without either is looked for in the
    text of the others.
    """
    source = textwrap.dedent(inspect.getsource(cls))
    comments = {
        token.start: token.string.lstrip("# ").rstrip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    beside = {line: text for (line, column), text in comments.items() if column > 4}
    above: dict[int, str] = {}
    for (line, column), text in comments.items():
        if column == 4:
            above[line + 1] = f"{above.get(line, '')} {text}".strip()  # goes on from the line before
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    fields = {n.target.id: n for n in body.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    notes: dict[str, str] = {}
    for paragraph in re.split(r"\n(?=``)|\n\n", ast.get_docstring(body) or ""):
        if match := re.match(r"((?:``[\w, ]+``(?:, )?)+)\s{2,}(.*)", paragraph, re.DOTALL):
            text = re.sub(r"\bNone\b", "null", " ".join(match[2].split()).replace("``", "").rstrip("."))
            notes |= dict.fromkeys(re.findall(r"\w+", match[1]), text)
    for name, node in fields.items():
        if comment := beside.get(node.end_lineno or 0) or above.get(node.lineno):
            notes[name] = comment
    for name in fields.keys() - notes.keys():
        if owner := next((other for other, text in notes.items() if re.search(rf"\b{name}\b", text)), None):
            notes[name] = f"see {owner}, which uses it"
    return notes
