"""Which columns of the vocabulary each process of a group has, and what targets are to one process's columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from edge_kernels._checks import IGNORE_INDEX, check_targets_in_range


class Layout(NamedTuple):
    """The vocabulary's division: contiguous shards in the order of the group's ranks."""

    group: Any  # a ProcessGroup
    rank: int
    sizes: tuple[int, ...]

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


def layout_of(size: int, like: Tensor, group: Any, vocab_sizes: Sequence[int] | None) -> Layout:
    """Return the division of which this process has ``size`` columns, for the rows of ``like`` (..., D or V)."""
    group = member_of(group)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if vocab_sizes is not None:
        sizes = tuple(vocab_sizes)
        if len(sizes) != world or sizes[rank] != size:
            raise ValueError(
                f"vocab_sizes must have the shard's size of each of the {world} ranks, {size} at rank {rank}; "
                f"got {list(sizes)}; or leave it out"
            )
        return Layout(group, rank, sizes)
    own = torch.tensor([size, like.shape[:-1].numel()], dtype=torch.int64, device=like.device)
    parts = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(parts, own, group=group)
    gathered = torch.stack(parts).tolist()
    if len({rows for _, rows in gathered}) > 1:
        raise ValueError(
            f"all ranks must pass the same rows; got {[rows for _, rows in gathered]} of them; "
            "the vocabulary is split, tokens are not"
        )
    return Layout(group, rank, tuple(columns for columns, _ in gathered))


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

    ignored: Tensor  # bool
    is_own: Tensor  # bool: lies in this shard
    is_wrong: Tensor  # bool: lies in none
    forward: Tensor  # int64, in the shard: of a target that lies elsewhere any column, whose logprob is not used
    backward: Tensor  # int64: of a target that lies elsewhere -1


def targets_of(targets: Tensor, layout: Layout, ignore_index: int) -> Targets:
    check_targets_in_range(targets, layout.vocab(), ignore_index)
    ignored, column = targets == ignore_index, targets - layout.start()
    is_own = (column >= 0) & (column < layout.size()) & ~ignored
    is_wrong = ((targets < 0) | (targets >= layout.vocab())) & ~ignored
    forward, backward = (column.masked_fill(~is_own, place).masked_fill(ignored, IGNORE_INDEX) for place in (0, -1))
    return Targets(ignored, is_own, is_wrong, forward, backward)
