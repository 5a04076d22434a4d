"""Checkpoints that are either whole or absent, and what a run that resumes from one may change.

``accelerate`` writes model, optimizer, random states and registered objects; this file owns the folder's life cycle:
checkpoints are written beside their place, then renamed into it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from edge_grpo.config import TrainConfig, flatten, to_dict
from edge_grpo.run.files import partial_of

_NAME = re.compile(r"step-(\d{6,})")
_STATE = "trainer_state.json"
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


def steps(folder: Path) -> list[int]:
    """Return the steps that have a whole checkpoint in ``folder``, in ascending order."""
    if not folder.is_dir():
        return []
    matches = ((_NAME.fullmatch(entry.name), entry) for entry in folder.iterdir())
    return sorted(int(match[1]) for match, entry in matches if match and (entry / _STATE).is_file())


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def save(accelerator: Accelerator, folder: Path, step: int, *, keep: int) -> Path:
    """Write the state after ``step`` steps and delete all but the newest ``keep``. All processes call it."""
    target = path_of(folder, step)
    partial = partial_of(target)
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    # accelerate would warn at every save that a head tied to the embedding is stored once; loading ties it again.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / _STATE).write_text(json.dumps({"step": step}))
        _replace(partial, target)
        for old in steps(folder)[:-keep] if keep else []:
            shutil.rmtree(path_of(folder, old))
    accelerator.wait_for_everyone()
    return target


def save_model(accelerator: Accelerator, target: Path, model: Any, tokenizer: Any) -> None:
    """Write model and tokenizer as a folder that ``from_pretrained`` loads, in place of an older one."""
    if accelerator.is_main_process:
        partial = partial_of(target)
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _replace(partial, target)
    accelerator.wait_for_everyone()


def load_latest(accelerator: Accelerator, folder: Path) -> int:
    """Restore the newest whole checkpoint and return its step. Raises ``FileNotFoundError`` when there is none."""
    found = steps(folder)
    if not found:
        raise FileNotFoundError(
            f"nothing to resume: {folder} holds no whole checkpoint; start the run without --resume, "
            "and set save_every to a smaller number of steps if it ended before the first one"
        )
    accelerator.load_state(str(path_of(folder, found[-1])))
    return found[-1]


def check_same_run(output: Path, config: TrainConfig) -> None:
    """Raise ValueError, naming the keys, if ``config`` changes what a resumed run in ``output`` may not change."""
    saved = output / "config.yaml"
    if saved.is_file():
        old = flatten(yaml.safe_load(saved.read_text(encoding="utf-8")))
        new = flatten(to_dict(config))
        changed = [key for key in new if key not in _MAY_CHANGE_ON_RESUME and old.get(key) != new[key]]
        if changed:
            changes = ", ".join(f"{key} was {old.get(key)!r}, is {new[key]!r}" for key in changed)
            raise ValueError(
                f"cannot resume {output}: {changes}; "
                "resume with the run's own config.yaml, or start a new run with another output"
            )


def _replace(partial: Path, target: Path) -> None:
    """Rename a finished folder to ``target`` once its files are on disk, so that no crash leaves half a file there."""
    for path in partial.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_directory(partial)
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)
    _sync_directory(target.parent)


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
