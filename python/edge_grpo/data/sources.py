"""From a dataset's name to examples, and from examples to prompts as token ids.

``load_examples`` reads every kind of source into ``Example``s, ``suite_sets`` finds those of a suite;
``render_prompts`` applies the template and the tokenizer. Order, epochs and groups are the trainer's.
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
from typing import TYPE_CHECKING, Any

from edge_grpo.config import DataConfig
from edge_grpo.data.arithmetic import LEVELS
from edge_grpo.data.arithmetic import generate as generate_arithmetic
from edge_grpo.text import fill
from edge_grpo.types import Example, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

GENERATED_SIZE = 2000  # examples of a generated task when no limit is given
_NOTATION = (
    "arithmetic[:LEVELS], reasoning_gym:TASK, a .json, .jsonl or .parquet file, a folder written by save_to_disk, or a "
    "hub id OWNER/NAME[:CONFIG], each with an optional @SPLIT"
)
# What others call these columns, to suggest a mapping; none is ever taken unasked.
_USUAL_NAMES = {
    "problem": ("question", "prompt", "query", "input", "instruction"),
    "answer": ("final_answer", "ground_truth", "target", "expected_answer", "label"),
    "solution": ("reference_solution", "rationale", "explanation", "generated_solution"),
}
# reasoning_gym makes example i of a dataset with seed s from the random seed s + i, so the seeds of two datasets that
# share none lie further apart than their sizes. Some tasks hand them to numpy, which takes 32 bits.
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
    (arithmetic: no problem), and are as long as ``limit`` (default 2000) says. Of other data ``limit`` takes a random
    sample fixed by ``seed``, so that a sorted dataset is not cut to its easy end; ``index`` is always the original row.

    ``columns`` maps "problem", "answer", "solution" to the names that data not generated here has for them; the default
    is the same names, of which only "problem" must be there. All other columns go to ``extra``. Numbers become plain
    text (142.0 is "142", 1e-5 is "0.00001"); blank and null answers and solutions are None; an answer that is a list
    of texts means that each of them is right, and goes to ``extra["accepted_answers"]`` as well. Duplicates are kept.

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
    """Return what ``load_examples`` calls the sets of an evaluation suite, by their names.

    A suite is a folder: one that ``DatasetDict.save_to_disk`` wrote, where each split is a set, or one of .json, .jsonl
    and .parquet files, each a set. Raises FileNotFoundError without the folder, ValueError for one without sets.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {path} with evaluation sets; relative paths start at {Path.cwd()}")
    if (listing := folder / "dataset_dict.json").is_file():
        return {split: f"{path}@{split}" for split in json.loads(listing.read_text(encoding="utf-8"))["splits"]}
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".jsonl", ".parquet"))
    if not files or (folder / "dataset_info.json").is_file():
        raise ValueError(
            f"{path} holds no evaluation sets: it must be a saved DatasetDict or a folder of .json, .jsonl or .parquet "
            "files; evaluate a single data set with --data"
        )
    return {file.stem: str(file) for file in files}


def render_prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: DataConfig, *, as_chat: bool = True
) -> tuple[list[Prompt], int]:
    """Return the examples as prompts, and how many were left out for having more than ``max_prompt_length`` tokens.

    With a chat template the prompt is the system prompt, if any, and the user message (``prompt_template``) followed by
    the template's opening of the assistant's turn. Without one, or with ``as_chat`` off, it is the user message as
    plain text, after the system prompt and a blank line. ``token_ids`` is exactly what the model reads: the template
    writes its own special tokens, and plain text gets those that the tokenizer begins a sequence with, once, and none
    that end one.

    Raises ValueError without examples, when every prompt is too long, and when the template takes no system prompt.
    """
    if not examples:
        raise ValueError("examples must not be empty")
    messages = [fill(config.prompt_template, "problem", example.problem) for example in examples]
    if as_chat and tokenizer.chat_template:
        texts = [_chat_text(message, tokenizer, config.system_prompt) for message in messages]
        token_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    else:
        system = f"{config.system_prompt}\n\n" if config.system_prompt else ""
        texts = [system + message for message in messages]
        token_ids = [_plain_ids(text, tokenizer) for text in texts]
    prompts = [
        Prompt(example, text, tuple(ids))
        for example, text, ids in zip(examples, texts, token_ids, strict=True)
        if len(ids) <= config.max_prompt_length
    ]
    if not prompts:
        shortest = min(len(ids) for ids in token_ids)
        raise ValueError(
            f"all {len(examples)} prompts have more than data.max_prompt_length = {config.max_prompt_length} tokens; "
            f"the shortest has {shortest}"
        )
    return prompts, len(examples) - len(prompts)


# ---- Sources -------------------------------------------------------------------------------------------------------


def _split_off(spec: str) -> tuple[str, str | None]:
    """The name and the split of NAME[@SPLIT]; a path that exists may contain an @ itself."""
    name, at, split = spec.rpartition("@")
    if not at or Path(spec).exists():
        return spec, None
    if not name or not split or "/" in split:
        raise ValueError(f"data must be named NAME[@SPLIT]; got {spec!r}; NAME is {_NOTATION}")
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
            "reasoning_gym:%s grades with its own score_answer%s; the accuracy reward accepts the reference answer "
            "alone; where a problem has other right answers, add a reward function",
            task,
            f" and gives no answer for {unanswered} of {size} problems" if unanswered else "",
        )
    return rows


def _load_rows(name: str, split: str | None) -> Sequence[Mapping[str, Any]]:
    path = Path(name).expanduser()
    suffix = path.suffix.lower()
    if suffix in (".json", ".jsonl", ".parquet"):
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
        files = sorted(file.name for file in path.iterdir() if file.suffix in (".json", ".jsonl", ".parquet"))
        hint = f"; name one of its files: {', '.join(files)}" if files else ""
        raise ValueError(f"the folder {path} was not written by datasets' save_to_disk{hint}") from error
    if isinstance(saved, DatasetDict):
        return _pick_split(str(path), saved, split or "train")
    if split is not None:
        raise ValueError(f"{path} is a saved dataset without splits; got @{split}; leave it out")
    return saved


def _load_hub(name: str, split: str) -> Sequence[Mapping[str, Any]]:
    from datasets import load_dataset

    hub_id, _, config = name.partition(":")
    try:
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
    """Which column is which, for those of problem, answer, solution that the dataset has."""
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
    """A cell as text; None for what holds nothing: null, NaN, blanks."""
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


# ---- Text and tokens -----------------------------------------------------------------------------------------------


def _chat_text(message: str, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> str:
    chat = [{"role": "user", "content": message}]
    if system_prompt:
        chat.insert(0, {"role": "system", "content": system_prompt})
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise through jinja2, or fail in their own ways
        hint = "; if it takes no system message, set data.system_prompt to null" if system_prompt else ""
        raise ValueError(f"the tokenizer's chat template failed: {type(error).__name__}: {error}{hint}") from error
    assert isinstance(text, str)
    return text


def _plain_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    bare: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if tokenizer.bos_token and text.startswith(str(tokenizer.bos_token)):
        return bare
    ids: list[int] = tokenizer.encode(text)
    # Some tokenizers also end every text with a token after which a model would not go on: keep what stands before.
    for start in range(len(ids) - len(bare) + 1):
        if ids[start : start + len(bare)] == bare:
            return ids[: start + len(bare)]
    return ids
