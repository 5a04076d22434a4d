"""Which columns of the vocabulary each process of a group has, and what targets are to one process's columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from edge_kernels._checks import IGNORE_INDEX, check_targets_in_range
from edge_kernels.parallel import agreement
from edge_kernels.parallel.agreement import digest, digest_of_sizes, require_same, together

T = TypeVar("T")


class Layout(NamedTuple):
    """The vocabulary's division: contiguous shards in the order of the group's ranks."""

    group: Any  # a ProcessGroup
    rank: int
    sizes: tuple[int, ...]
    is_agreed: bool = True  # else ``merge`` compares sizes and targets where nothing needs to wait

    def start(self) -> int:
        return sum(self.sizes[: self.rank])

    def size(self) -> int:
        return self.sizes[self.rank]

    def vocab(self) -> int:
        return sum(self.sizes)


def member_of(group: Any) -> Any:
    """Return the group, or the default one for None, of which this process must be a member."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "edge_kernels.parallel needs a process group; call torch.distributed.init_process_group, or use the op of "
            "the same name in edge_kernels"
        )
    group = dist.group.WORLD if group is None else group
    if dist.get_rank(group) < 0:
        raise ValueError("this process must belong to group; got a group without it; call the op on its members only")
    return group


def agreed_layout(
    check: Callable[[], tuple[Tensor, T]],
    size: int,
    device: torch.device,
    ignore_index: int,
    group: Any,
    vocab_sizes: Sequence[int] | None,
) -> tuple[T, Layout]:
    """Return what ``check`` returns beside its targets, and the division of which this process has ``size`` columns.

    Where values may be read, or sizes have to be asked for, the processes compare rows, targets and sizes first, and
    an error is raised on all of them.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)

    def checked() -> tuple[Tensor, T]:
        if vocab_sizes is not None and (len(vocab_sizes) != world or vocab_sizes[rank] != size):
            raise ValueError(
                f"vocab_sizes must have the shard's size of each of the {world} ranks, {size} at rank {rank}; "
                f"got {list(vocab_sizes)}; or leave it out"
            )
        return check()

    if vocab_sizes is not None and not agreement.reads(device):
        return checked()[1], Layout(group, rank, tuple(vocab_sizes), is_agreed=False)
    claimed = 0 if vocab_sizes is None else digest_of_sizes(vocab_sizes)

    def facts(result: tuple[Tensor, T]) -> list[float]:
        targets = result[0]
        return [targets.numel(), float(digest(targets.masked_fill(targets == ignore_index, -1))), claimed, size]

    (targets, result), every = together(checked, facts, 4, device, group)
    rows, targets_of_rank, claims, sizes = zip(*every, strict=True)
    require_same("rows", rows, remedy="the vocabulary is split, tokens are not")
    require_same(
        "targets (by a checksum)", targets_of_rank, remedy="pass ids of the whole vocabulary, not of the shard"
    )
    require_same("vocab_sizes (by a checksum)", claims, remedy="or leave it out on all")
    layout = Layout(group, rank, tuple(int(columns) for columns in sizes))
    if agreement.reads(device):
        check_targets_in_range(targets, layout.vocab(), ignore_index)
    return result, layout


def is_distributed(tensor: Any) -> bool:
    if not dist.is_available() or type(tensor) in (Tensor, torch.nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_part(
    name: str, tensor: Any, dim: int, group: Any, vocab_sizes: Sequence[int] | None
) -> tuple[Any, Any, Sequence[int] | None]:
    """Return the part of a DTensor that lies here, its group and the sizes of all parts; another tensor as it is."""
    if not is_distributed(tensor):
        return tensor, group, vocab_sizes
    from torch.distributed.tensor import Shard

    mesh, placements = tensor.device_mesh, tensor.placements
    is_sharded = len(placements) == 1 and type(placements[0]) is Shard and placements[0].dim % tensor.dim() == dim
    if not is_sharded:
        raise ValueError(
            f"{name} must be sharded over a mesh of one dimension by Shard({dim}); got {placements}; redistribute it, "
            "or pass the local tensor with group"
        )
    own = mesh.get_group()
    if group is not None and dist.get_process_group_ranks(group) != dist.get_process_group_ranks(own):
        raise ValueError(f"group must be that of {name}'s mesh; got another one; leave it out")
    vocab, parts = tensor.shape[dim], mesh.size()
    chunk = -(-vocab // parts)  # as torch.chunk divides
    return tensor.to_local(), own, [min(chunk, max(0, vocab - i * chunk)) for i in range(parts)]


class Targets(NamedTuple):
    """Targets of the whole vocabulary against one shard of it."""

    whole: Tensor  # int64, (...): of the whole vocabulary; -1 where ignored
    ignored: Tensor  # bool
    is_own: Tensor  # bool: lies in this shard
    is_wrong: Tensor  # bool: lies in none
    forward: Tensor  # int64, in the shard: of a target that lies elsewhere any column, whose logprob is not used
    backward: Tensor  # int64: of a target that lies elsewhere -1


def targets_of(targets: Tensor, layout: Layout, ignore_index: int) -> Targets:
    ignored, column = targets == ignore_index, targets - layout.start()
    is_own = (column >= 0) & (column < layout.size()) & ~ignored
    is_wrong = ((targets < 0) | (targets >= layout.vocab())) & ~ignored
    forward, backward = (column.masked_fill(~is_own, place).masked_fill(ignored, IGNORE_INDEX) for place in (0, -1))
    return Targets(targets.masked_fill(ignored, -1), ignored, is_own, is_wrong, forward, backward)
