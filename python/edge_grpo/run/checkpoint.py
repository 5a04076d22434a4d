"""Checkpoints that are either whole or absent, and what a run that resumes from one may change.

This file owns a checkpoint's life cycle: it is written beside its place, renamed into it, and verified before it is
loaded. What its files hold is ``state``'s.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from edge_grpo.config import TrainConfig, flatten, to_dict
from edge_grpo.policy.adapters import is_adapted, lora_weights, save_lora
from edge_grpo.policy.sharding import is_sharded, read_to_the_end, whole_weights
from edge_grpo.policy.together import together
from edge_grpo.run import shards, state
from edge_grpo.run.files import partial_of, write_json

Result = TypeVar("Result")

_NAME = re.compile(r"step-(\d{6,})")
_RECORD = "trainer_state.json"
_WEIGHTS = "model.safetensors"
_OPTIMIZER = "optimizer.safetensors"
# What a resumed run may change: none of it touches the steps that were already made.
_MAY_CHANGE_ON_RESUME = {
    "steps",
    "output",
    "save_every",
    "eval.every",
    "trackers",
    "reward.function_timeout",
    "reward.on_error",
    "rollout.server",
    "rollout.server_folder",
    "rollout.timeout",
}


@dataclass(frozen=True)
class Record:
    """What a checkpoint says of itself: after which step, by how many processes, and the hash of each of its files.

    ``evaluated`` is false for one that was saved in place of the evaluation that was due after its step.
    """

    step: int
    evaluated: bool
    processes: int
    sha256: dict[str, str]

    @property
    def is_sharded(self) -> bool:
        """Whether each process has written its part of the parameters."""
        return any(map(shards.is_shard, self.sha256))


def steps(folder: Path) -> list[int]:
    """Return the steps that have a whole checkpoint in ``folder``, in ascending order."""
    if not folder.is_dir():
        return []
    matches = ((_NAME.fullmatch(entry.name), entry) for entry in folder.iterdir())
    return sorted(int(match[1]) for match, entry in matches if match and (entry / _RECORD).is_file())


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def save(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    keep: int,
    evaluated: bool = True,
    rollout: Mapping[str, Any] | None = None,
    split: bool = False,
) -> Path:
    """Write the state after ``step`` steps and delete all but the newest ``keep``. All processes call it.

    Where one of them cannot write, all raise, and nothing is left of what was written.

    ``rollout`` is what this process has collected for the next step; all processes have one, or none has.
    With ``split`` each process writes what it holds of the parameters, for any number of processes to read.
    """
    target = path_of(folder, step)
    partial = partial_of(target)
    is_main = accelerator.is_main_process

    def write_own() -> None:
        state.write_random_state(partial / _random_state(accelerator.process_index), accelerator.device)
        if rollout is not None:
            (partial / _rollout(accelerator.process_index)).write_text(json.dumps(rollout), encoding="utf-8")
        if is_main and not split:
            state.write_weights(model, partial / _WEIGHTS)
            state.write_optimizer(optimizer, partial / _OPTIMIZER)

    def finish(hashes: dict[str, str]) -> None:
        write_json(partial / _RECORD, asdict(Record(step, evaluated, accelerator.num_processes, hashes)))
        _replace(partial, target)

    def delete_older() -> None:
        for old in steps(folder)[:-keep] if keep else []:
            shutil.rmtree(path_of(folder, old))

    _on_main(accelerator, lambda: _make_empty(partial))
    with state.writing(partial):
        together(write_own)
        if split:
            together(lambda: shards.write(model, optimizer, partial))
        hashes = _hashes(accelerator, partial)
        _on_main(accelerator, lambda: finish(hashes))
    _on_main(accelerator, delete_older)
    return target


def save_model(accelerator: Accelerator, target: Path, model: Any, tokenizer: Any) -> None:
    """Write model, or its adapter as peft does, and tokenizer as a folder to load, in place of an older one.

    All processes call it, and all raise where the main process cannot write. Of parameters that are split over them it
    collects all in host memory.
    """
    weights = lora_weights(model) if is_adapted(model) else whole_weights(model) if is_sharded(model) else iter(())

    def write() -> None:
        with read_to_the_end(weights) as read:
            kept = {name: value.cpu() for name, value in read} if accelerator.is_main_process else {}
        if not accelerator.is_main_process:
            return
        partial = partial_of(target)
        shutil.rmtree(partial, ignore_errors=True)
        with state.writing(partial):
            if is_adapted(model):
                save_lora(model, kept, partial)
            elif is_sharded(model):
                model.save_pretrained(partial, state_dict=kept)
            else:
                model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            _replace(partial, target)

    together(write)


def load_latest(accelerator: Accelerator, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Record:
    """Restore the newest whole checkpoint and return its record. All processes call it.

    Raises FileNotFoundError when there is none, and ``UnreadableError``, naming the file and the checkpoint before it,
    for one that does not hold what was written. Nothing that it reads can run code.
    """
    found = _on_main(accelerator, lambda: steps(folder))  # a network file system may show others an older state
    if not found:
        raise FileNotFoundError(
            f"nothing to resume: {folder} holds no whole checkpoint; start the run without --resume, "
            "and set save_every to a smaller number of steps if it ended before the first one"
        )
    newest = path_of(folder, found[-1])
    try:
        record = _verified(accelerator, newest)
        if record.is_sharded:
            shards.read(model, optimizer, newest)
        together(lambda: _read_own(accelerator, newest, record, model, optimizer))
        if record.processes != accelerator.num_processes and accelerator.is_main_process:
            print(
                f"{newest} was saved by {record.processes} processes and is resumed by {accelerator.num_processes}: "
                "the next steps have the same batches, and the same losses to rounding, unless the model has dropout "
                "or a reward function draws random numbers",
                file=sys.stderr,
            )
    except state.UnreadableError as error:
        older = f"to resume from step {found[-2]}" if found[1:] else "and start again: there is no older checkpoint"
        raise state.UnreadableError(f"{error}; delete {newest} {older}") from error
    return record


def _read_own(
    accelerator: Accelerator, path: Path, record: Record, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Restore what this process reads without the others."""
    if not record.is_sharded:
        state.read_weights(model, path / _WEIGHTS)
        state.read_optimizer(optimizer, path / _OPTIMIZER)
    if record.processes == accelerator.num_processes:
        state.read_random_state(path / _random_state(accelerator.process_index), accelerator.device)


def load_rollouts(folder: Path, record: Record) -> list[dict[str, Any]]:
    """Return what each of the processes that saved a checkpoint had collected for its next step; nothing without."""
    found = []
    for path in (path_of(folder, record.step) / _rollout(rank) for rank in range(record.processes)):
        if path.name in record.sha256:
            with state.reading(path):
                found.append(json.loads(path.read_text(encoding="utf-8")))
    return found


def _verified(accelerator: Accelerator, path: Path) -> Record:
    """The checkpoint's record. Each process compares some files with it, and all processes learn the outcome."""
    record: Record | None = None
    complaint: str | None = None
    try:
        record = _read_record(path)
        for name in _share(accelerator, list(record.sha256)):
            with state.reading(path / name):
                if _sha256(path / name) != record.sha256[name]:
                    raise ValueError("its content has changed since it was written")
    except state.UnreadableError as error:
        complaint = str(error)
    complaints = [found for found in gather_object([complaint]) if found is not None]
    if record is None or complaints:
        raise state.UnreadableError(complaints[0])
    return record


def _read_record(path: Path) -> Record:
    with state.reading(path / _RECORD):
        record = Record(**json.loads((path / _RECORD).read_text(encoding="utf-8")))
        named = _NAME.fullmatch(path.name)
        random_states = {_random_state(rank) for rank in range(record.processes)}
        rollouts = {_rollout(rank) for rank in range(record.processes)} & record.sha256.keys()
        others = record.sha256.keys() - random_states - rollouts
        if (
            named is None
            or record.step != int(named[1])
            or not random_states < record.sha256.keys()
            or not (others == {_WEIGHTS, _OPTIMIZER} or (others and all(map(shards.is_shard, others))))
            or len(rollouts) not in (0, record.processes)
        ):
            raise ValueError("it belongs to another checkpoint")
        written = {entry.name for entry in path.iterdir() if shards.is_shard(entry.name)}
        if extra := written - others:  # what reads shards takes all that lie in the folder
            raise ValueError(f"{min(extra)} belongs to another checkpoint")
    return record


def _hashes(accelerator: Accelerator, folder: Path) -> dict[str, str]:
    """The hash of each file in a folder; every process computes some of them.

    The main process says which there are: on a network file system the others may see only their own for a while.
    """
    names = _on_main(accelerator, lambda: sorted(path.name for path in folder.iterdir()))
    own = together(lambda: {name: _sha256(folder / name) for name in _share(accelerator, names)})
    return {name: value for share in gather_object([own]) for name, value in share.items()}


def _on_main(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Return, on all processes, what ``work`` returns on the main one; where it fails, all raise."""
    own = together(lambda: work() if accelerator.is_main_process else None)
    (result,) = broadcast_object_list([own])
    return cast("Result", result)


def _share(accelerator: Accelerator, names: list[str]) -> list[str]:
    return names[accelerator.process_index :: accelerator.num_processes]


def _random_state(rank: int) -> str:
    return f"random_state_{rank}.json"


def _rollout(rank: int) -> str:
    return f"rollout_{rank}.json"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def what_is_left(folder: Path) -> str:
    """Return the last checkpoint in ``folder``, all of which are finite, and what to do about a run that diverged."""
    found = steps(folder)
    saved = f"the last finite checkpoint is {path_of(folder, found[-1])}" if found else "no checkpoint had been saved"
    return f"{saved}; a resumed run makes the same steps again, so start one with a lower optim.learning_rate"


def check_same_run(output: Path, config: TrainConfig) -> None:
    """Raise ValueError if ``config`` is not for the run in ``output``.

    That is, if it changes what a resumed run may not change, or asks for fewer steps than were made.
    """
    made = steps(output / "checkpoints")
    if made and made[-1] > config.steps:
        raise ValueError(
            f"cannot resume {output}: {made[-1]} steps were made, and steps is {config.steps}; set steps to at least "
            f"{made[-1]}, or start a new run with another output"
        )
    saved = output / "config.yaml"
    if saved.is_file():
        with state.reading(saved):
            old = flatten(yaml.safe_load(saved.read_text(encoding="utf-8")))
        new = flatten(to_dict(config))
        old = flatten(to_dict(TrainConfig())) | old  # a key that the saved file does not know had its default's effect
        for leaves in (old, new):  # what is sampled does not depend on how many devices hold an engine
            own = leaves["rollout.vllm"].items()
            leaves["rollout.vllm"] = {name: value for name, value in own if name != "tensor_parallel_size"}
        changed = [key for key in new if key not in _MAY_CHANGE_ON_RESUME and old[key] != new[key]]
        if changed:
            changes = ", ".join(f"{key} was {old[key]!r}, is {new[key]!r}" for key in changed)
            raise ValueError(
                f"cannot resume {output}: {changes}; "
                "resume with the run's own config.yaml, or start a new run with another output"
            )


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _replace(partial: Path, target: Path) -> None:
    """Rename a finished folder to ``target`` once its files are on disk, so that no crash leaves half a file there."""
    for path in partial.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_directory(partial)
    replaced = target.with_name(f".replaced-{target.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        os.replace(target, replaced)
    os.replace(partial, target)
    _sync_directory(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
