"""Where examples come from: ``load_examples`` reads every kind of source, ``suite_sets`` finds the sets of a suite.

How a file is read is ``files``, what its columns mean ``rows``, the built-in task ``arithmetic``, what a model reads of
an example ``prompts``. Order, epochs and groups are the trainer's.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_grpo.data.arithmetic import LEVELS
from edge_grpo.data.arithmetic import generate as generate_arithmetic
from edge_grpo.data.files import FORMATS, read_files, sort_files, split_files, stem_of, suffix_of
from edge_grpo.data.rows import RowReader, did_you_mean
from edge_grpo.text import AnswerStyle
from edge_grpo.types import Example

_log = logging.getLogger(__name__)

GENERATED_SIZE = 2000  # examples of a generated task when no limit is given
_NOTATION = (
    f"arithmetic[:LEVELS], reasoning_gym:TASK, {FORMATS}, a pattern of such files (data/*.jsonl), a folder of them or "
    "one written by save_to_disk, or a hub id OWNER/NAME[:CONFIG], each with an optional @SPLIT"
)
_PATTERN = re.compile(r"[*?\[]")
# reasoning_gym makes example i of a dataset with seed s from the random seed s + i, so two datasets share no example
# if their seeds are further apart than their sizes. Some tasks pass the seeds to numpy, which takes 32 bits.
_SEED_STRIDE = 1_000_000
_SEED_BLOCKS = 2**32 // _SEED_STRIDE // 2 * 2  # even, so that counting past the end keeps odd and even apart


def load_examples(
    spec: str,
    columns: Mapping[str, str],
    *,
    seed: int = 0,
    limit: int | None = None,
    allow_empty: bool = False,
    style: AnswerStyle = "box",
) -> list[Example]:
    r"""Return the examples that ``spec`` names, in the dataset's order.

        arithmetic[:LEVELS]      the built-in task, for example arithmetic:1,2 (default: all levels)
        reasoning_gym:TASK       a task of the reasoning-gym package with its default settings
        FILE                     .json (a list of objects, or one object a line), .jsonl, .csv, .tsv, .parquet
        PATTERN                  several files, one after the other: data/part-*.jsonl, MATH/train/**/*.json
        FOLDER                   files of one dataset, such as a downloaded one, or what datasets' save_to_disk wrote
        OWNER/NAME[:CONFIG]      a dataset on the Hugging Face hub

    each with ``@SPLIT``, "train" by default. The generated tasks have "train" and "test", which share no random seed
    (arithmetic: no problem), and have ``limit`` examples (default 2000). Of other data ``limit`` takes a random sample
    fixed by ``seed``, so that a sorted dataset does not lose its hard end; ``index`` is always the original row.

    ``columns`` maps "problem", "answer" and "solution" to the column names of data that is not generated here, or to a
    value within a column (``reward_model.ground_truth``); without it columns have these names. Only "problem" is
    required. All other columns go to ``extra``, mapped ones too by their own names. Numbers become plain text (142.0 is
    "142", 1e-5 is "0.00001"); blank and null answers and solutions are None; a list of texts as an answer means that
    each of them is right. Of a list of solutions the first is taken. Duplicates are kept.

    A problem may be a conversation, a list of messages with ``role`` and ``content`` that ends with the user's. Without
    columns of these names, a ``prompt`` of such lists is the problem (TRL, verl), and ``reward_model.ground_truth`` the
    answer (verl). An answer or a solution that ends in a line ``#### 4`` (GSM8K) is read as the answer 4 after a
    solution, which then ends in ``style``, as the run looks for answers. Without a column of answers, an answer is the
    solution's last box (MATH).

    Raises ValueError for an empty problem (naming the row; with ``allow_empty`` it is ""), a missing column, split,
    level or task, a dataset without rows, and what is not text; FileNotFoundError for a missing file; TypeError for an
    answer that is not text, a number or a list.
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
    reader = RowReader(spec, rows, columns, style)
    chosen: Iterable[int] = range(len(rows))
    if limit is not None and limit < len(rows):
        chosen = sorted(random.Random(seed).sample(range(len(rows)), limit))
    examples = [reader.read(index, rows[index]) for index in chosen]
    if not allow_empty and (empty := next((example for example in examples if not example.problem), None)):
        raise ValueError(
            f"{spec}, row {empty.index}: the problem (column {reader.names['problem']!r}) is empty; remove the row"
        )
    return examples


def suite_sets(path: str) -> dict[str, str]:
    """Return the specifications, as ``load_examples`` takes them, of the sets of an evaluation suite by name.

    A suite is a folder: one that ``DatasetDict.save_to_disk`` wrote, where each split is a set, or one of files as
    ``load_examples`` reads them, each a set. Raises FileNotFoundError without the folder, ValueError for one without
    sets.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {path} with evaluation sets; relative paths start at {Path.cwd()}")
    if (listing := folder / "dataset_dict.json").is_file():
        return {split: f"{path}@{split}" for split in json.loads(listing.read_text(encoding="utf-8"))["splits"]}
    files = sorted(file for file in folder.iterdir() if suffix_of(file))
    if not files or (folder / "dataset_info.json").is_file():
        raise ValueError(
            f"{path} holds no evaluation sets: it must be a saved DatasetDict or a folder of files, each {FORMATS}; "
            "evaluate a single data set with --data"
        )
    return {stem_of(file): str(file) for file in files}


def _split_off(spec: str) -> tuple[str, str | None]:
    """The name and the split of NAME[@SPLIT]; a path that exists may contain an @ itself."""
    name, at, split = spec.rpartition("@")
    if not at or "/" in split or Path(spec).exists():
        return spec, None
    if not name or not split:
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
        raise ValueError(f"reasoning_gym has no task {task!r}{did_you_mean(task, DATASETS)}")
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
    if path.is_dir():
        return _load_folder(path, split)
    is_pattern = bool(_PATTERN.search(name)) and not path.exists()
    if not is_pattern and suffix_of(path) is None:
        if path.is_file():
            raise ValueError(f"{name} must be {FORMATS}; got {path.name!r}")
        if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name):
            return _load_hub(name, split or "train")
        raise ValueError(f"no data {name!r}{did_you_mean(name, ('arithmetic', 'reasoning_gym'))} Data is {_NOTATION}")
    if split is not None:
        raise ValueError(f"{name} names files, without splits; got @{split}; leave it out")
    if not is_pattern:
        if not path.is_file():
            raise FileNotFoundError(f"no data file {name}; relative paths start at {Path.cwd()}")
        return read_files([path])
    matches = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
    found = [file for file in matches if file.is_file() and suffix_of(file)]
    if not found:
        raise FileNotFoundError(f"no data file matches {name}; relative paths start at {Path.cwd()}; each is {FORMATS}")
    return read_files(sort_files(found))


def _load_folder(path: Path, split: str | None) -> Sequence[Mapping[str, Any]]:
    """The rows of what save_to_disk wrote, or else of the folder's files."""
    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        splits = split_files(path)
        if not splits:
            raise ValueError(f"the folder {path} holds no data: neither what save_to_disk writes, nor {FORMATS}")
        return read_files(_pick_split(str(path), splits, split or "train"))
    from datasets import DatasetDict, load_from_disk

    saved = load_from_disk(str(path))
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


def _pick_split(name: str, splits: Mapping[str, Any], split: str) -> Any:
    if split not in splits:
        example = next(iter(splits), "SPLIT")
        raise ValueError(f"{name} has no split {split!r}; there are {', '.join(splits)}; name one as {name}@{example}")
    return splits[split]
