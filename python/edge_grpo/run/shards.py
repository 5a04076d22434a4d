"""The state of a model whose parameters are split over processes, by ``torch.distributed.checkpoint``.

Every process writes its own part, as safetensors, which cannot run code; any number of processes reads them, each the
part that it now holds. Settings of the optimizer are the configuration's. Where the files lie is ``checkpoint``'s.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from edge_grpo.policy.together import together
from edge_grpo.run.state import OF_ADAMW, reading

_FILE = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


def is_shard(name: str) -> bool:
    """Whether a file of this name holds a part of a sharded state."""
    return bool(_FILE.fullmatch(name))


def write(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write the trained parameters, the buffers and AdamW's state into ``folder``. All processes call it.

    Where one of them fails, all raise what it did.
    """
    tensors = _of_model(model)
    for name, parameter in _trained(model).items():
        for part, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{part}:{name}"] = value
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _on_all() as no_dist:
        dcp.save(tensors, storage_writer=writer, no_dist=no_dist)


def read(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Restore what ``write`` has written into ``folder``, whole or for any number of processes. All call it."""
    with reading(folder):
        reader = dcp.HuggingFaceStorageReader(str(folder))
        # Each process lists the folder, and may fail alone.
        tensors, state = together(lambda: _to_be_read(model, reader.read_metadata().state_dict_metadata))
        with _on_all() as no_dist:
            dcp.load(tensors, storage_reader=reader, no_dist=no_dist)
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def _to_be_read(model: nn.Module, saved: Mapping[str, Any]) -> tuple[dict[str, Any], dict[int, dict[str, Tensor]]]:
    """What files with the tensors ``saved`` are read into, by their names, and the optimizer's state among it.

    Raises ValueError where the files are another model's.
    """
    tensors = _of_model(model)
    state: dict[int, dict[str, Tensor]] = {}
    for index, (name, parameter) in enumerate(_trained(model).items()):
        found = [part for part in OF_ADAMW if f"{part}:{name}" in saved]
        if found:
            state[index] = {part: torch.zeros(()) if part == "step" else torch.zeros_like(parameter) for part in found}
            tensors |= {f"{part}:{name}": value for part, value in state[index].items()}
    if saved.keys() != tensors.keys():
        raise ValueError(f"{min(saved.keys() ^ tensors.keys())} is not in both files and model: another model")
    for name, value in tensors.items():
        if (size := tuple(saved[name].size)) != tuple(value.shape):
            raise ValueError(f"{name} has shape {size}, not {tuple(value.shape)}: another model")
    return tensors, state


@contextmanager
def _on_all() -> Iterator[bool]:
    """Yield whether this process is alone, which torch warns of.

    Where a process fails, torch raises on all of them what is no Exception; here it is what the first of them raised.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield not dist.is_initialized()
        except dcp.api.CheckpointException as error:
            _, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
            raise cause from None


def _of_model(model: nn.Module) -> dict[str, Any]:
    """The trained parameters and the buffers that are saved, by name; each is the tensor itself, to be read into."""
    names = model.state_dict().keys()
    buffers = {name: value for name, value in model.named_buffers() if name in names}
    return {f"model:{name}": value.detach() for name, value in (_trained(model) | buffers).items()}


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}
