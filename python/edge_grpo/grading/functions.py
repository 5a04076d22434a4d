"""The user's reward functions: importing one, calling it, checking what it returns.

Runs in the workers of ``edge_grpo.grading.rewards``, where it is decided what becomes of a failure.
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Columns = Mapping[str, Sequence[Any]]
# One entry per completion: a number, None, or how what is neither looks; or a sentence about a broken contract.
Reply = list[float | str | None] | str
LARGEST = 1e30  # of a reward: what becomes of it is float32


def load(path: str) -> Callable[[Columns], Reply]:
    """What calls the function ``package.module:function``; ValueError or TypeError if there is none."""
    function = _import(path)
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some callables written in C have no signature
        parameters = inspect.signature(lambda **columns: None).parameters.values()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    names = [parameter.name for parameter in parameters]
    required = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]

    def call(columns: Columns) -> Reply:
        missing = [name for name in required if name not in columns]
        if missing:
            return f"requires {', '.join(missing)}; there are {', '.join(sorted(columns))}"
        chosen = columns if takes_all else {name: columns[name] for name in names if name in columns}
        return _checked(function(**chosen), len(columns["completions"]))

    return call


def _checked(values: Any, count: int) -> Reply:
    if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__len__"):
        return f"must return a list with a number per completion; got {type(values).__name__}"
    if len(values) != count:
        return f"must return a number per completion; got {len(values)} for {count}"
    reply: list[float | str | None] = []
    for value in values:
        try:
            number = None if value is None else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        reply.append(number if number is None or abs(number) <= LARGEST else repr(value)[:200])
    return reply


def _import(path: str) -> Callable[..., Any]:
    module_name, _, attribute = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # console scripts do not search the working directory; last, so that it shadows nothing
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"reward function {path!r}: importing {module_name!r} failed with {type(error).__name__}: {error}; give a "
            "module that is installed or lies in the working directory"
        ) from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            names = [key for key in dir(found) if not key.startswith("_") and callable(getattr(found, key))]
            raise ValueError(f"reward function {path!r}: there is no {name!r}; there are {', '.join(names) or 'none'}")
        found = getattr(found, name)
    if not callable(found):
        raise TypeError(f"reward function {path!r} must be callable; got {type(found).__name__}")
    function: Callable[..., Any] = found
    return function
