"""Parameters split over processes by FSDP2 (``torch.distributed.fsdp.fully_shard``), and the ways to see them whole.

The first process alone reads weights. Each layer is a unit that is gathered when it runs. Embedding, final norm and
output head are the outermost unit's, whose forward is ``PolicyModel``'s: there the head's weight is whole and takes the
right gradient.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from edge_grpo.policy.model import PolicyModel

Item = TypeVar("Item")


def shard(policy: PolicyModel, *, processes: int, device: torch.device) -> None:
    """Split the first process's parameters over all processes, in place; each holds its own part on ``device``.

    All processes call it with the same model, which need not have weights on another than the first (``is_empty``).
    A unit at a time is whole. Parameters are gathered in the precision that they have, as without sharding: autocast
    rounds less than a model gathered in bfloat16. Gradients are averaged over processes, in float32.
    Raises ValueError for a model that does not say what its layers are, and on all processes where two models differ.
    """
    layers = layers_of(policy.model)
    rule = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    mesh = init_device_mesh(device.type, (processes,))
    _check_equal(policy, mesh.get_group())
    for unit in (*layers, policy):
        _take_from_first(unit, device, mesh.get_group())
        fully_shard(unit, mesh=mesh, mp_policy=rule)
    # The outermost unit learns in its first pass that the others are its parts. Sampling would run a layer before it.
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with torch.no_grad():
        policy(token, torch.ones_like(token))
    release(policy)
    assert all(isinstance(parameter, DTensor) for parameter in policy.parameters())


def is_empty(model: nn.Module) -> bool:
    """Whether ``model`` has been built without weights, for ``shard`` to bring them (``load_model``'s ``empty``)."""
    return any(parameter.is_meta for parameter in model.parameters())


def _check_equal(policy: PolicyModel, group: dist.ProcessGroup) -> None:
    """Raise ValueError unless the processes' models have tensors of the same names, shapes and types."""
    tensors = chain(policy.named_parameters(), policy.named_buffers())
    own = [f"{name} {tuple(value.shape)} {value.dtype}" for name, value in tensors]
    everyone: list[list[str]] = [[] for _ in range(group.size())]
    dist.all_gather_object(everyone, own, group)
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            differing = sorted(set(other) ^ set(everyone[0]))[:4]
            raise ValueError(
                f"process {rank} has another model than process 0 ({', '.join(differing) or 'in another order'}); let "
                "model.path name the same files everywhere, and install the same transformers"
            )


@torch.no_grad()
def _take_from_first(unit: nn.Module, device: torch.device, group: dist.ProcessGroup) -> None:
    """Put on ``device``, in the place of what ``unit`` holds, what it holds in the first process; not what is split."""
    for tensor in chain(unit.parameters(), unit.buffers()):
        if isinstance(tensor, DTensor):
            continue
        value = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device).contiguous()
        dist.broadcast(value, group=group, group_src=0)
        if not tensor.is_meta:
            tensor.data = value
        elif isinstance(tensor, nn.Parameter):  # one that two modules share stays one
            torch.utils.swap_tensors(tensor, nn.Parameter(value, requires_grad=tensor.requires_grad))
        else:
            torch.utils.swap_tensors(tensor, value.detach())


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules of the classes that the architecture names as its layers, in order."""
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    inner = {id(part) for layer in layers for part in layer.modules() if part is not layer}
    layers = [layer for layer in layers if id(layer) not in inner]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} does not name its layers (_no_split_modules = {sorted(names)}), so that its "
            "parameters cannot be sharded layer by layer; train it with model.sharding=none"
        )
    return layers


def is_sharded(model: nn.Module) -> bool:
    """Whether ``model`` or a part of it has been split over processes."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def set_synchronized(policy: nn.Module, synchronized: bool) -> None:
    """Whether the next backward pass of a sharded policy reduces gradients, or adds them up in each process."""
    assert isinstance(policy, FSDPModule)
    policy.set_requires_gradient_sync(synchronized)


def release(policy: nn.Module) -> None:
    """Give back what a pass without a backward pass leaves whole: the outermost unit, which a backward pass would need.

    Until then ``parameters()`` would return whole copies of its parameters, which no optimizer updates.
    """
    if isinstance(policy, FSDPModule):
        policy.reshard()


@contextmanager
def whole_parameters(policy: nn.Module) -> Iterator[None]:
    """Within the block every process holds all parameters, and may run the model as often as it likes.

    For sampling, where processes make different numbers of passes. All processes enter and leave together; there is no
    gradient. Without sharding it does nothing.
    """
    units = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for number, unit in enumerate(units):
            unit.reshard()
            unit.set_reshard_after_forward(number > 0, recurse=False)  # the outermost one is needed again at once


def whole(value: Tensor) -> Tensor:
    """Return all of a tensor that may be split, detached. All processes call it for the same ones in one order."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the state dict's tensors by name, each of them whole; where two names share one, it is yielded once.

    One split tensor is gathered at a time, for which all processes must iterate to the end.
    """
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            yield name, whole(value)


@contextmanager
def read_to_the_end(items: Iterator[Item]) -> Iterator[Iterator[Item]]:
    """Yield ``items``; what the block leaves of them, as it does where it fails, is read after it.

    For tensors that are gathered as they are read: the other processes gather all of them.
    """
    try:
        yield items
    finally:
        deque(items, maxlen=0)


def own_part(value: Tensor) -> Tensor:
    """Return what this process holds of a tensor that may be split, detached; it may be empty."""
    value = value.detach()
    return value.to_local() if isinstance(value, DTensor) else value
