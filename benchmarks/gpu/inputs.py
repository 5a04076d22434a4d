"""What is run on a GPU and in the rehearsal: the sizes, and batches and heads of them on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import head, peers
from benchmarks.gpu.device import Device
from benchmarks.peers import Batch


class Sizes(NamedTuple):
    """What is run: on a GPU, and as a rehearsal."""

    checked: Sequence[tuple[int, int]]  # rows and V from logits: few rows, V = 1, an odd V, more rows than a GPU's SMs
    checked_head: Sequence[tuple[int, int, int]]  # rows, V and D
    dtypes: Sequence[torch.dtype]
    rows: int
    vocab: int
    hidden: int
    head_rows: int
    square: int  # of the product that gives the rate
    repetitions: int
    seconds: float  # after which nothing new is started


ON_GPU = Sizes(
    checked=[(4, 151_936), (64, 1), (320, 50_257), (1024, 4_099)],
    checked_head=[(64, 151_936, 1536), (320, 5_003, 896)],
    dtypes=[torch.float32, torch.bfloat16, torch.float16],
    rows=4096,
    vocab=151_936,
    hidden=1536,
    head_rows=4096,
    square=8192,
    repetitions=10,
    seconds=270,
)
REHEARSAL = Sizes(
    checked=[(8, 301), (4, 1)],
    checked_head=[(8, 301, 16)],
    dtypes=[torch.float32, torch.bfloat16],
    rows=16,
    vocab=1_003,
    hidden=32,
    head_rows=16,
    square=64,
    repetitions=2,
    seconds=270,
)


def make_batch(rows: int, vocab: int, device: Device) -> Batch:
    return Batch(*(value.to(device.kind) for value in peers.make_batch(*peers.split(rows), vocab)))


def make_head(
    rows: int, vocab: int, hidden: int, dtype: torch.dtype, batch: Batch, device: Device
) -> tuple[Tensor, Tensor]:
    states, weight = head.make_head(rows, vocab, hidden, dtype, batch.targets.cpu())
    return states.detach().to(device.kind).requires_grad_(), weight.detach().to(device.kind).requires_grad_()
