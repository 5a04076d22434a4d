"""The user's reward functions: importing one, calling it as TRL or verl does, checking what it returns.

Runs in the workers of ``edge_grpo.grading.rewards``, where it is decided what becomes of a failure.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_grpo.grading.reply import LARGEST, Reply, plain

Columns = Mapping[str, Sequence[Any]]
# verl's arguments for one completion, and those of its functions for a batch.
_VERL = ("data_source", "solution_str", "ground_truth", "extra_info")
_VERL_BATCH = ("data_sources", "solution_strs", "ground_truths", "extra_infos")


def load(path: str) -> Callable[[Columns, Any], Reply | str]:
    """What calls the function ``package.module:function``; ValueError or TypeError if there is none.

    It takes the columns, with one entry per completion, and the state of training. A function with the parameters of
    verl's ``compute_score`` (``solution_str``, ``ground_truth``) is called for each completion, one with their plurals
    for all; any other as TRL calls it. Returns a sentence where the function breaks its contract.
    """
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
    loop = asyncio.new_event_loop()  # one for all calls: a session that a function keeps belongs to its loop

    def finished(result: Any) -> Any:
        return loop.run_until_complete(_wait_for(result)) if inspect.isawaitable(result) else result

    def call(columns: Columns, state: Any = None) -> Reply | str:
        reply = Reply()
        given: dict[str, Any] = dict(columns)
        is_verl = set(_VERL[1:3]) <= set(names)
        if is_verl or set(_VERL_BATCH[1:3]) <= set(names):
            # These alone, as verl does: a column that is named like an option is not meant for it.
            given = dict(zip(_VERL if is_verl else _VERL_BATCH, _verl_columns(columns), strict=True))
        else:
            given |= {"trainer_state": state, "log_metric": reply.log_metric, "log_extra": reply.log_extra}
        missing = [name for name in required if name not in given]
        if missing:
            return f"requires {', '.join(missing)}; there are {', '.join(sorted(given))}"
        chosen = given if takes_all else {name: given[name] for name in names if name in given}
        count = len(columns["completions"])
        if is_verl:
            rows = [{name: values[index] for name, values in chosen.items()} for index in range(count)]
            values: Any = [finished(function(**row)) for row in rows]
        else:
            values = finished(function(**chosen))
        if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__len__"):
            return f"must return a list with a number per completion; got {type(values).__name__}"
        if len(values) != count:
            return f"must return a number per completion; got {len(values)} for {count}"
        for index, value in enumerate(values):
            reply.values.append(_number(_score(value, index, count, reply)))
        uneven = [name for name, column in reply.extra.items() if len(column) != count]
        return f"must log a value per completion with log_extra; {uneven[0]!r} has others" if uneven else reply

    return call


async def _wait_for(result: Any) -> Any:
    return await result


def _verl_columns(columns: Columns) -> list[Sequence[Any]]:
    """What verl's functions take: sources, texts, ground truths and further information, one per completion."""
    count = len(columns["completions"])
    nothing = [None] * count
    texts = [one if isinstance(one, str) else one[0]["content"] for one in columns["completions"]]
    models, answers = columns.get("reward_model", nothing), columns.get("ground_truth", columns.get("answer", nothing))
    truths = [
        model["ground_truth"] if isinstance(model, Mapping) and "ground_truth" in model else answer
        for model, answer in zip(models, answers, strict=True)
    ]
    infos = [info if isinstance(info, Mapping) else {} for info in columns.get("extra_info", nothing)]
    return [columns.get("data_source", nothing), texts, truths, infos]


def _score(value: Any, index: int, count: int, reply: Reply) -> Any:
    """The number in a function's value; verl's functions may give a mapping, whose other entries are logged."""
    if not isinstance(value, Mapping):
        return value
    for name, item in value.items():
        if name != "score":
            reply.extra.setdefault(str(name), [None] * count)[index] = plain(item)
    return value.get("score", value)


def _number(value: Any) -> float | str | None:
    try:
        number = None if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    return number if number is None or abs(number) <= LARGEST else repr(value)[:200]


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
