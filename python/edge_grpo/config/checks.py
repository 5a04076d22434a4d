"""What a value must be, and the message for one that is not: types by annotation, ranges, the nearest name.

Nothing here knows a key: those and their rules are in ``keys``, files and overrides in ``reading``.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin


def refuse(problems: Iterable[str]) -> None:
    """Raise one ValueError that names every problem, if there is any."""
    if text := "\n".join(problems):
        raise ValueError(text)


def did_you_mean(name: object, choices: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the end of a complaint about ``name``: the nearest of ``choices``, or nothing."""
    close = difflib.get_close_matches(str(name), list(choices), 1, cutoff)
    return f"; did you mean {close[0]}?" if close else ""


# ---- Ranges --------------------------------------------------------------------------------------------------------


def whole(least: int, **values: object) -> list[str]:
    """Return the complaints about values that are not integers of at least ``least``."""
    return [
        f"{name} must be a whole number of at least {least}; got {value!r}"
        for name, value in values.items()
        if isinstance(value, bool) or not isinstance(value, int) or value < least
    ]


def real(bound: str, **values: object) -> list[str]:
    """Return the complaints about values that are not numbers within ``bound``: one of those listed here."""
    inside = {
        "finite": math.isfinite,
        "> 0": lambda x: x > 0,
        ">= 0": lambda x: x >= 0,
        ">= 1": lambda x: x >= 1,
        "(0, 1e6]": lambda x: 0 < x <= 1e6,  # seconds: a timeout cannot be infinite
        "(0, 1e37]": lambda x: 0 < x <= 1e37,  # AdamW's first step divides the rate by 1 - 0.9, in float32
        "[-1e30, 1e30]": lambda x: -1e30 <= x <= 1e30,  # rewards: sums of them, times a weight, in float32
    }[bound]
    kind = "a finite number" if bound == "finite" else f"a number {'in ' if bound[0] in '([' else ''}{bound}"
    return [
        f"{name} must be {kind}; got {value!r}"
        for name, value in values.items()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not inside(value)  # NaN is in no range
    ]


# ---- Types ---------------------------------------------------------------------------------------------------------


def members(annotation: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union; of any other annotation itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def choices_of(annotation: Any) -> list[str]:
    """Return the texts that the annotation allows, none where it allows others."""
    return [text for member in members(annotation) if get_origin(member) is Literal for text in get_args(member)]


def matches(value: Any, annotation: Any) -> bool:
    """Return whether ``value`` is of the type; an int is a float, a bool is neither."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(matches(value, member) for member in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(matches(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(
            matches(k, arguments[0]) and matches(v, arguments[1]) for k, v in value.items()
        )
    if annotation in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if annotation is float else annotation)


def mismatch(key: str, value: Any, annotation: Any) -> str:
    """Return the complaint about a value of another type."""
    complaint = f"{key} must be {_describe(annotation)}; got {value!r}"
    if choices := choices_of(annotation):
        return complaint + did_you_mean(value, choices)
    is_unquoted = str in members(annotation) and isinstance(value, (bool, int, float))
    return complaint + ("; put it in quotes" if is_unquoted else "")


def _describe(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(member) for member in arguments)
    if origin is Literal:
        return "one of " + ", ".join(arguments)
    if origin is tuple:
        return f"a list, each item {_describe(arguments[0])}"
    if origin is dict:
        return f"a mapping from {_describe(arguments[0])} to {_describe(arguments[1])}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))
