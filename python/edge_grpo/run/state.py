"""What training resumes from, in files that cannot run code: safetensors for weights and optimizer, JSON for the rest.

Errors name the file. When which file is written and read is ``checkpoint``'s.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from edge_grpo.policy.adapters import is_adapted

OF_ADAMW = ("step", "exp_avg", "exp_avg_sq")


class UnreadableError(ValueError):
    """A file of a checkpoint does not hold what was written into it."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong while ``path`` is read into an ``UnreadableError`` that names it."""
    try:
        yield
    except Exception as error:  # a damaged file can fail anywhere
        raise UnreadableError(f"{path} cannot be read ({type(error).__name__}: {error})") from error


@contextmanager
def writing(partial: Path) -> Iterator[None]:
    """Remove the folder ``partial`` if it cannot be written whole: on a full disk its space is needed.

    Of what safetensors raises, the reason of the operating system becomes the OSError that it is.
    """
    try:
        yield
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, SafetensorError) and (reason := re.search(r"\(os error (\d+)\)", str(error))):
            raise OSError(int(reason[1]), os.strerror(int(reason[1])), str(partial.parent)) from error
        raise


def write_weights(model: nn.Module, path: Path) -> None:
    """Write the weights; of a model with adapters, what is trained, since the rest is the base model's files."""
    if is_adapted(model):
        save_file({name: value.detach().contiguous() for name, value in _trained(model).items()}, path)
    else:
        save_model(model, str(path))


def read_weights(model: nn.Module, path: Path) -> None:
    with reading(path):
        if not is_adapted(model):
            load_model(model, path)
            return
        saved, trained = load_file(path), _trained(model)
        if saved.keys() != trained.keys():
            raise ValueError(f"{min(saved.keys() ^ trained.keys())} is not in both file and model: other adapters")
        with torch.no_grad():
            for name, value in trained.items():
                if value.shape != saved[name].shape:
                    raise ValueError(f"{name} has shape {tuple(saved[name].shape)}, not {tuple(value.shape)}")
                value.copy_(saved[name])


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def write_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Write what AdamW has accumulated. Its settings are the configuration's, and its rate follows from the step."""
    state = optimizer.state_dict()["state"]
    save_file(
        {f"{index}.{name}": value.contiguous() for index, values in state.items() for name, value in values.items()},
        path,
    )


def read_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
    with reading(path):
        for key, value in load_file(path).items():
            index, _, name = key.partition(".")
            expected = torch.Size() if name == "step" else parameters[int(index)].shape
            if name not in OF_ADAMW or value.shape != expected:
                raise ValueError(f"{key} of shape {tuple(value.shape)} belongs to another optimizer or model")
            state[int(index)][name] = value
        optimizer.load_state_dict({"state": dict(state), "param_groups": optimizer.state_dict()["param_groups"]})


def write_random_state(path: Path, device: torch.device) -> None:
    """Write this process's random state: Python's, NumPy's, torch's, and that of its GPU."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002  # what a model's own code may use
    tree: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
    }
    if device.type == "cuda":
        tree["cuda"] = torch.cuda.get_rng_state(device).tolist()
    path.write_text(json.dumps(tree), encoding="utf-8")


def read_random_state(path: Path, device: torch.device) -> None:
    with reading(path):
        tree = json.loads(path.read_text(encoding="utf-8"))
        version, values, gauss = tree["python"]
        random.setstate((version, tuple(values), gauss))
        np.random.set_state(tuple(tree["numpy"]))  # noqa: NPY002
        torch.set_rng_state(torch.tensor(tree["torch"], dtype=torch.uint8))
        if device.type == "cuda":
            torch.cuda.set_rng_state(torch.tensor(tree["cuda"], dtype=torch.uint8), device)
