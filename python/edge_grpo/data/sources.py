"""Where examples come from: ``load_examples`` reads every kind of source, ``suite_sets`` finds the sets of a suite.

What a model reads of them is ``prompts``, the built-in task ``arithmetic``; order, epochs and groups are the trainer's.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
import numbers
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from edge_grpo.data.arithmetic import LEVELS
from edge_grpo.data.arithmetic import generate as generate_arithmetic
from edge_grpo.types import Example

_log = logging.getLogger(__name__)

GENERATED_SIZE = 2000  # examples of a generated task when no limit is given
_SUFFIXES = (".json", ".jsonl", ".parquet")
_NOTATION = (
    "arithmetic[:LEVELS], reasoning_gym:TASK, a .json, .jsonl or .parquet file, a folder written by save_to_disk, or a "
    "hub id OWNER/NAME[:CONFIG], each with an optional @SPLIT"
)
# Other usual names of these columns: they are suggested in a message and never used unasked.
_USUAL_NAMES = {
    "problem": ("question", "prompt", "query", "input", "instruction"),
    "answer": ("final_answer", "ground_truth", "target", "expected_answer", "label"),
    "solution": ("reference_solution", "rationale", "explanation", "generated_solution"),
}
# reasoning_gym makes example i of a dataset with seed s from the random seed s + i, so two datasets share no example
# if their seeds are further apart than their sizes. Some tasks pass the seeds to numpy, which takes 32 bits.
_SEED_STRIDE = 1_000_000
_SEED_BLOCKS = 2**32 // _SEED_STRIDE // 2 * 2  # even, so that counting past the end keeps odd and even apart


def load_examples(
    spec: str, columns: Mapping[str, str], *, seed: int = 0, limit: int | None = None, allow_empty: bool = False
) -> list[Example]:
    """Return the examples that ``spec`` names, in the dataset's order.

        arithmetic[:LEVELS]      the built-in task, for example arithmetic:1,2 (default: all levels)
        reasoning_gym:TASK       a task of the reasoning-gym package with its default settings
        FILE                     .json (a list of objects, or one object a line), .jsonl, .parquet
        FOLDER                   what datasets' save_to_disk wrote
        OWNER/NAME[:CONFIG]      a dataset on the Hugging Face hub

    each with ``@SPLIT``, "train" by default. The generated tasks have "train" and "test", which share no random seed
    (arithmetic: no problem), and have ``limit`` examples (default 2000). Of other data ``limit`` takes a random sample
    fixed by ``seed``, so that a sorted dataset does not lose its hard end; ``index`` is always the original row.

    ``columns`` maps "problem", "answer" and "solution" to the column names of data that is not generated here; without
    it columns have these names. Only "problem" is required. All other columns go to ``extra``. Numbers become plain
    text (142.0 is "142", 1e-5 is "0.00001"); blank and null answers and solutions are None; a list of texts as an
    answer means that each of them is right, and also goes to ``extra["accepted_answers"]``. Duplicates are kept.

    Raises ValueError for an empty problem (naming the row; with ``allow_empty`` it is ""), a missing column, split,
    level or task, and a dataset without rows; FileNotFoundError for a missing file; TypeError for an answer that is not
    text, a number or a list.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 or None; got {limit}")
    name, split = _split_off(spec)
    kind, _, argument = name.partition(":")
    if kind == "arithmetic":
        return _load_arithmetic(argument, split or "train", seed, limit or GENERATED_SIZE)
    if kind == "reasoning_gym":
        rows: Sequence[Mapping[str, Any]] = _load_reasoning_gym(
            argument, split or "train", seed, limit or GENERATED_SIZE
        )
        columns = {"problem": "question"}
    else:
        rows = _load_rows(name, split)
    if not len(rows):
        raise ValueError(f"{spec} has no rows")
    names = _resolve_columns(spec, rows, columns)
    chosen: Iterable[int] = range(len(rows))
    if limit is not None and limit < len(rows):
        chosen = sorted(random.Random(seed).sample(range(len(rows)), limit))
    examples = [_to_example(spec, index, rows[index], names) for index in chosen]
    if not allow_empty and (empty := next((example for example in examples if not example.problem), None)):
        raise ValueError(
            f"{spec}, row {empty.index}: the problem (column {names['problem']!r}) is empty; remove the row"
        )
    return examples


def suite_sets(path: str) -> dict[str, str]:
    """Return the specifications, as ``load_examples`` takes them, of the sets of an evaluation suite by name.

    A suite is a folder: one that ``DatasetDict.save_to_disk`` wrote, where each split is a set, or one of .json, .jsonl
    and .parquet files, each a set. Raises FileNotFoundError without the folder, ValueError for one without sets.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {path} with evaluation sets; relative paths start at {Path.cwd()}")
    if (listing := folder / "dataset_dict.json").is_file():
        return {split: f"{path}@{split}" for split in json.loads(listing.read_text(encoding="utf-8"))["splits"]}
    files = sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES)
    if not files or (folder / "dataset_info.json").is_file():
        raise ValueError(
            f"{path} holds no evaluation sets: it must be a saved DatasetDict or a folder of .json, .jsonl or .parquet "
            "files; evaluate a single data set with --data"
        )
    return {file.stem: str(file) for file in files}


# ---- Sources -------------------------------------------------------------------------------------------------------


def _split_off(spec: str) -> tuple[str, str | None]:
    """The name and the split of NAME[@SPLIT]; a path that exists may contain an @ itself."""
    name, at, split = spec.rpartition("@")
    if not at or Path(spec).exists():
        return spec, None
    if not name or not split or "/" in split:
        raise ValueError(f"data must be given as NAME[@SPLIT]; got {spec!r}; NAME is {_NOTATION}")
    return name, split


def _load_arithmetic(argument: str, split: str, seed: int, size: int) -> list[Example]:
    try:
        levels = [int(level) for level in argument.split(",")] if argument else list(LEVELS)
    except ValueError:
        raise ValueError(f"arithmetic:{argument} must name levels such as arithmetic:1,2; there are {LEVELS}") from None
    return generate_arithmetic(levels, split, seed, size)


def _load_reasoning_gym(task: str, split: str, seed: int, size: int) -> list[dict[str, Any]]:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError("data reasoning_gym:TASK needs the package reasoning-gym; pip install 'edge-grpo[tasks]'")
    import reasoning_gym
    from reasoning_gym.dataset import ProceduralDataset
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise ValueError(f"reasoning_gym has no task {task!r}{_did_you_mean(task, DATASETS)}")
    if split not in ("train", "test"):
        raise ValueError(f"reasoning_gym:{task} has the splits 'train' and 'test'; got {split!r}")
    if size > _SEED_STRIDE:
        raise ValueError(f"reasoning_gym:{task} has at most {_SEED_STRIDE} examples a split; got limit {size}")
    block = (2 * seed + (split == "test")) % _SEED_BLOCKS  # even blocks are for training, odd ones held out
    try:
        dataset = reasoning_gym.create_dataset(task, seed=block * _SEED_STRIDE, size=size)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"reasoning_gym:{task} has no usable default settings: {error}") from error
    rows = [dict(dataset[index]) for index in range(size)]
    unanswered = sum(row["answer"] is None for row in rows)
    if unanswered or type(dataset).score_answer is not ProceduralDataset.score_answer:
        _log.warning(
            "reasoning_gym:%s grades with its own score_answer%s; the accuracy reward accepts only the reference "
            "answer; where a problem has other right answers, add a reward function",
            task,
            f" and gives no answer for {unanswered} of {size} problems" if unanswered else "",
        )
    return rows


def _load_rows(name: str, split: str | None) -> Sequence[Mapping[str, Any]]:
    path = Path(name).expanduser()
    suffix = path.suffix.lower()
    if suffix in _SUFFIXES:
        if not path.is_file():
            raise FileNotFoundError(f"no data file {name}; relative paths start at {Path.cwd()}")
        if split is not None:
            raise ValueError(f"{name} is a single file without splits; got @{split}; leave it out")
        return _read_parquet(path) if suffix == ".parquet" else _read_json(path)
    if path.is_dir():
        return _load_saved(path, split)
    if path.is_file():
        raise ValueError(f"{name} must be a .json, .jsonl or .parquet file; got the suffix {suffix!r}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name):
        return _load_hub(name, split or "train")
    raise ValueError(f"no data {name!r}{_did_you_mean(name, ('arithmetic', 'reasoning_gym'))} Data is {_NOTATION}")


def _read_json(path: Path) -> list[Mapping[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if path.suffix.lower() == ".json" and error.msg != "Extra data":
            raise ValueError(f"{path} is not JSON: {error}") from error
        return list(_read_json_lines(path, text))
    if isinstance(rows, dict):  # {"data": [...]}, or a file of one line
        lists = [value for value in rows.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        rows = lists[0] if len(rows) == len(lists) == 1 else [rows]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold a list of objects, or one object a line")
    return rows


def _read_json_lines(path: Path, text: str) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON may hold other line separators
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} must be an object; got {type(row).__name__}")
            yield row


def _read_parquet(path: Path) -> list[Mapping[str, Any]]:
    import pyarrow.parquet

    rows: list[Mapping[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


def _load_saved(path: Path, split: str | None) -> Sequence[Mapping[str, Any]]:
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(path))
    except FileNotFoundError as error:
        files = sorted(file.name for file in path.iterdir() if file.suffix in _SUFFIXES)
        hint = f"; name one of its files: {', '.join(files)}" if files else ""
        raise ValueError(f"the folder {path} was not written by datasets' save_to_disk{hint}") from error
    if isinstance(saved, DatasetDict):
        return _pick_split(str(path), saved, split or "train")
    if split is not None:
        raise ValueError(f"{path} is a saved dataset without splits; got @{split}; leave it out")
    return saved


def _load_hub(name: str, split: str) -> Sequence[Mapping[str, Any]]:
    from datasets import load_dataset

    from edge_grpo.policy.hub import cached_if_unreachable

    hub_id, _, config = name.partition(":")
    try:
        with cached_if_unreachable():
            splits = load_dataset(hub_id, config or None)
    except Exception as error:  # network, authentication, a script, a missing configuration: datasets raises each
        raise ValueError(
            f"there is no folder {name}, and loading it from the Hugging Face hub failed with {type(error).__name__}: "
            f"{error}"
        ) from error
    return _pick_split(name, splits, split)


def _pick_split(name: str, splits: Mapping[str, Any], split: str) -> Sequence[Mapping[str, Any]]:
    if split not in splits:
        example = next(iter(splits), "SPLIT")
        raise ValueError(f"{name} has no split {split!r}; there are {', '.join(splits)}; name one as {name}@{example}")
    return splits[split]


# ---- Rows ----------------------------------------------------------------------------------------------------------


def _resolve_columns(spec: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> dict[str, str]:
    """The dataset's column for each of problem, answer and solution that it has."""
    known = getattr(rows, "column_names", None) or list(dict.fromkeys(key for row in rows for key in row))
    unknown = [role for role in columns if role not in _USUAL_NAMES]
    if unknown:
        raise ValueError(f"data.columns maps problem, answer and solution; got {', '.join(map(repr, unknown))}")
    names = {}
    for role, usual in _USUAL_NAMES.items():
        name = columns.get(role, role)
        if name in known:
            names[role] = name
        elif role in columns or role == "problem":
            likely = [other for other in (role, *usual) if other in known]
            hint = f"; did you mean {likely[0]!r}?" if likely else _did_you_mean(name, known)
            raise ValueError(
                f"{spec} has no column {name!r} for the {role}{hint} There are {', '.join(known)}; name it with "
                f"data.columns.{role}=COLUMN"
            )
    return names


def _to_example(spec: str, index: int, row: Mapping[str, Any], names: Mapping[str, str]) -> Example:
    def value(role: str) -> Any:
        return row.get(names[role]) if role in names else None

    problem = _to_text(spec, index, "problem", value("problem")) or ""
    extra = {key: item for key, item in row.items() if key not in names.values()}
    answer = value("answer")
    if isinstance(answer, (list, tuple)):
        texts = (_to_text(spec, index, "answer", item) for item in answer)
        accepted = tuple(dict.fromkeys(text.strip() for text in texts if text is not None))
        if len(accepted) > 1:
            extra["accepted_answers"] = accepted
        answer = accepted[0] if accepted else None
    solution = _to_text(spec, index, "solution", value("solution"))
    return Example(index, problem, _to_text(spec, index, "answer", answer), solution, extra)


def _to_text(spec: str, index: int, role: str, value: Any) -> str | None:
    """A cell as text; None for null, NaN and blanks."""
    if value is None or isinstance(value, str):
        return value if value and value.strip() else None
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if isinstance(value, (numbers.Real, Decimal)):
        number = value if isinstance(value, Decimal) else Decimal(repr(float(value)))  # 0.1, not its binary expansion
        if number.is_nan():
            return None
        if number.is_infinite():
            return "\\infty" if number > 0 else "-\\infty"
        text = format(number, "f")
        text = text.rstrip("0").rstrip(".") if "." in text else text
        return "0" if text == "-0" else text
    wanted = "text, a number, or a list of those" if role == "answer" else "text or a number"
    raise TypeError(f"{spec}, row {index}: the {role} must be {wanted}; got {type(value).__name__} {str(value)[:80]!r}")


def _did_you_mean(name: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, choices, n=1)
    return f"; did you mean {close[0]!r}?" if close else "."
