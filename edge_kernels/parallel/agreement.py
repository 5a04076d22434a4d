"""What the processes of a group tell each other before they compute, so that all of them raise an error or none does.

A process that raised alone would leave the others waiting in the next collective. On a CPU one all-gather of a few
numbers prevents that; on a GPU, which would have to be waited for, and in compiled code nothing is read.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from edge_kernels.ops.batch_checks import Draft

T = TypeVar("T")

_DIGEST = 2**52 - 1  # a float64 has all such numbers


def reads(device: torch.device) -> bool:
    """Whether values are looked at: where that waits for nothing."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def together(
    check: Callable[[], T], facts: Callable[[T], Sequence[float]], count: int, device: torch.device, group: Any
) -> tuple[T, list[list[float]]]:
    """Return what ``check`` returns, and the ``count`` facts about it of every process; if one raises, all do.

    One all-gather of ``1 + count`` float64 numbers from each.
    """
    error, own = None, [0.0] * count
    try:
        result = check()
        own = list(facts(result))
    except Exception as raised:
        error = raised
    record = torch.tensor([float(error is not None), *own], dtype=torch.float64, device=device)
    parts = [torch.empty_like(record) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, record, group=group)
    if error is not None:
        raise error
    every = torch.stack(parts).tolist()
    refused = [rank for rank, (is_refused, *_) in enumerate(every) if is_refused]
    if refused:
        raise ValueError(
            f"arguments must be right on every rank of the group; those of rank {refused[0]} were refused; "
            "see the error that it raised"
        )
    return result, [numbers for _, *numbers in every]


def require_same(name: str, values: Sequence[float], *, tolerance: float = 0.0, remedy: str) -> None:
    """Raise ValueError unless the values of all ranks are equal, or that near to each other."""
    if max(values) - min(values) > tolerance:
        shown = [int(value) if value == int(value) else value for value in values]
        raise ValueError(f"all ranks of the group must pass the same {name}; got {shown} by rank; {remedy}")


def digest(values: Tensor) -> Tensor:
    """Return a number in [0, 2^52) that tells int64 values (N,) from others, whatever their order: float64, a scalar.

    Made of integers, so that every machine gets the same.
    """
    weights = torch.arange(values.numel(), device=values.device) * 0x9E3779B97F4A7C + 0x5851F42D4C957F
    return (((values.flatten() + 1) * weights).sum() & _DIGEST).double()


def digest_of_sizes(sizes: Sequence[int]) -> int:
    return sum(size * (1 + 31 * rank * rank % 65521) for rank, size in enumerate(sizes))


def agreed_responses(check: Callable[[], tuple[Draft, T]], device: torch.device, group: Any) -> tuple[Draft, T]:
    """Return what ``check`` returns, if the processes that split the responses agree; else raise on all of them.

    Looks at how many responses there are, what belongs to each, and which options and arguments are given.
    """
    if not reads(device):
        return check()
    result, rows = together(check, lambda result: _facts(result[0]), 5, device, group)
    counts, settings, groups, values, magnitudes = zip(*rows, strict=True)
    remedy = "pass all responses in the same order on every process, also those of which it has no token"
    require_same("number of responses", counts, remedy=remedy)
    require_same("config and optional arguments (by a checksum)", settings, remedy="give each one on all or on none")
    require_same("group_ids and truncated_mask (by a checksum)", groups, remedy=remedy)
    tolerance = 1e-5 * max(magnitudes)  # processes may round their own rewards differently
    require_same("rewards or advantages (by a weighted sum)", values, tolerance=tolerance, remedy=remedy)
    return result


def _facts(draft: Draft) -> list[float]:
    batch, B = draft.batch, draft.batch.sequences.num_responses
    given = [(name, value is not None) for name, value in batch._asdict().items() if name not in ("lengths", "masked")]
    settings = zlib.crc32(repr((batch.config, given, draft.is_per_token, draft.truncated is None)).encode())
    whole, exact = [], []
    for value in (None if draft.is_per_token else batch.advantages, batch.rewards):
        if value is not None:
            whole.append(value.detach().double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
    if batch.group_ids is not None:  # numbered by their first member: names may be a process's own
        _, number = batch.group_ids.unique(return_inverse=True)
        places = torch.arange(B, device=number.device)
        first = torch.full_like(places, B).scatter_reduce(0, number, places, "amin")
        exact.append(first[number])
    if draft.truncated is not None:
        exact.append(draft.truncated.long())
    values = torch.cat(whole) if whole else torch.zeros(0, dtype=torch.float64)
    weights = torch.linspace(1, 2, len(values), dtype=torch.float64)
    groups = float(digest(torch.cat(exact))) if exact else 0.0
    return [B, settings, groups, float(values @ weights), float(values.abs() @ weights)]
