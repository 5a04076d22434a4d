"""What processes send: collectives by the names of torch.distributed's ops, how many, and the bytes of their tensors.

``tests/benchmarks/scaling`` holds these lists against those of real processes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from benchmarks.scaling.cluster import Links
from benchmarks.scaling.transformer import Shapes, Transformer, size

ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE, BROADCAST = "all-gather", "reduce-scatter", "all-reduce", "broadcast"

# DistributedDataParallel's buckets: a first one that leaves early, and the others.
BUCKET_BYTES = (2**20, 25 * 2**20)


@dataclass(frozen=True, order=True)
class Collective:
    """Equal collectives; ``nbytes`` of the whole tensor that one of them gathers, reduces or sends."""

    name: str
    nbytes: int
    count: int = 1

    def sent_bytes(self, processes: int) -> float:
        """Return what each process sends in all of them, by a ring."""
        passes = 2 if self.name == ALL_REDUCE else 1
        return self.count * passes * self.nbytes * (processes - 1) / processes

    def times(self, number: int) -> Collective:
        return replace(self, count=number * self.count)


@dataclass(frozen=True)
class Sent:
    """Collectives of one group of processes."""

    collectives: tuple[Collective, ...]
    links: Links

    @classmethod
    def of(cls, collectives: Iterable[Collective], links: Links, times: int = 1) -> Sent:
        return cls(tuple(collective.times(times) for collective in collectives if links.processes > 1), links)

    @property
    def count(self) -> int:
        return sum(collective.count for collective in self.collectives)

    @property
    def nbytes(self) -> float:
        """What each process sends."""
        return sum(collective.sent_bytes(self.links.processes) for collective in self.collectives)

    @property
    def seconds(self) -> float:
        return self.nbytes / self.links.rate + self.count * self.links.latency


def padded(shapes: Shapes, processes: int) -> int:
    """Return the elements of parameters that are split along their first dimension, each part as large as the first."""
    return sum(processes * -(-shape[0] // processes) * math.prod(shape[1:]) for shape in shapes)


# --- FSDP2: each layer a unit, the rest the root's --------------------------------------------------------------------


def fsdp_forward(model: Transformer, processes: int, itemsize: int, *, has_head: bool = True) -> list[Collective]:
    """Of one micro-batch's forward pass, with or without gradient; ``itemsize`` of an element as it is computed."""
    return [
        Collective(ALL_GATHER, itemsize * padded(model.root_shapes(has_head=has_head), processes)),
        Collective(ALL_GATHER, itemsize * padded(model.layer_shapes(), processes), model.layers),
    ]


def fsdp_backward(model: Transformer, processes: int, itemsize: int) -> list[Collective]:
    """Of one micro-batch's backward pass, checkpointed or not. The root's parameters are still there."""
    return [Collective(ALL_GATHER, itemsize * padded(model.layer_shapes(), processes), model.layers)]


def fsdp_reduction(model: Transformer, processes: int, itemsize: int, *, has_head: bool = True) -> list[Collective]:
    """Of the gradients that have been added up: after the last micro-batch, or after each."""
    layer = padded(model.layer_shapes(), processes)
    root = padded(model.root_shapes(has_head=has_head), processes)
    return [Collective(REDUCE_SCATTER, itemsize * layer, model.layers), Collective(REDUCE_SCATTER, itemsize * root)]


def replicas_reduction(model: Transformer, shards: int, itemsize: int) -> list[Collective]:
    """Of the same gradients where each of several groups of ``shards`` processes holds all parameters."""
    layer, root = (padded(shapes, shards) // shards for shapes in (model.layer_shapes(), model.root_shapes()))
    return [Collective(ALL_REDUCE, itemsize * layer, model.layers), Collective(ALL_REDUCE, itemsize * root)]


@cache
def full_tensors(model: Transformer, processes: int, itemsize: int) -> tuple[Collective, ...]:
    """Of gathering the parameters one by one, as an engine takes them; those of a shape together."""
    return tuple(
        Collective(ALL_GATHER, itemsize * padded([shape], processes), count)
        for shape, count in Counter(model.shapes()).items()
    )


# --- DistributedDataParallel ------------------------------------------------------------------------------------------


@cache
def ddp(model: Transformer, itemsize: int, bucket_bytes: tuple[int, int] = BUCKET_BYTES) -> tuple[Collective, ...]:
    """Of an optimizer step, however many micro-batches it has: the rotary frequencies, and all gradients once.

    Buckets of a size are together. (The first step of a run has one bucket.)
    """
    buffers = Collective(BROADCAST, 2 * 4 * (model.head_dim // 2))
    buckets = Counter(_buckets(model.shapes(), itemsize, bucket_bytes))
    return (buffers, *(Collective(ALL_REDUCE, nbytes, count) for nbytes, count in buckets.items()))


def _buckets(shapes: Shapes, itemsize: int, bucket_bytes: tuple[int, int]) -> Iterator[int]:
    """Yield the bytes of each bucket: parameters from the last one to the first, until a bucket has its size."""
    filled, (limit, others) = 0, bucket_bytes
    for shape in reversed(shapes):
        filled += itemsize * size([shape])
        if filled >= limit:
            yield filled
            filled, limit = 0, others
    if filled:
        yield filled


# --- a vocabulary that is split: docs/parallel.md ---------------------------------------------------------------------


def vocabulary_forward(rows: int) -> list[Collective]:
    """Of a head on ``rows`` tokens: their largest logits in float64 with four checksums, and three sums in float32."""
    return [Collective(ALL_REDUCE, 8 * rows + 32), Collective(ALL_REDUCE, 12 * rows)]


def vocabulary_backward(rows: int, hidden: int) -> list[Collective]:
    """The gradient of the hidden states, in float32."""
    return [Collective(ALL_REDUCE, 4 * rows * hidden)]


# --- samples ----------------------------------------------------------------------------------------------------------


def gathered_objects(nbytes: int, processes: int) -> list[Collective]:
    """Of accelerate's ``gather_object``: sizes, then bytes, ``nbytes`` from each process as from the fullest."""
    return [Collective(ALL_GATHER, 8 * processes), Collective(ALL_GATHER, nbytes * processes)]
