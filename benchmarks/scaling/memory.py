"""What a GPU holds, in bytes: while the policy trains, and while vLLM samples beside it or on a server of its own.

Of a machine's own memory, what the start takes.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.scaling.cluster import ASSUMED, HEAD_RATES, SHEET
from benchmarks.scaling.collectives import padded
from benchmarks.scaling.layouts import LORA_RANK, Setup
from benchmarks.scaling.transformer import Transformer
from edge_kernels.ops.head_plan import MEMORY_BUDGET, Plan, Problem, choose

_TRAINED = 4 + 4 + 8  # bytes of an adapter's parameter, gradient and moments


class Memory(NamedTuple):
    """Of the fullest GPU while it trains."""

    states: float  # parameters, gradients, Adam's moments
    gathered: float  # whole layers and head, their gradients; DDP's buckets; copies in 16 bits
    activations: float
    head: float  # the tile of logits and what is beside it

    @property
    def total(self) -> float:
        return sum(self) + ASSUMED.reserved_bytes

    def fits(self) -> bool:
        return self.total <= ASSUMED.usable * SHEET.memory_bytes


def head_problem(setup: Setup, rows: int) -> Problem:
    """Return the head's problem of a micro-batch of ``rows`` tokens on one process, with our compiled kernels.

    Where the vocabulary is split a process has its columns of all its group's tokens.
    """
    precision, parts = setup.layout.precision, setup.vocabulary_shards
    return Problem(
        rows=rows * parts,
        hidden=setup.model.hidden,
        vocab=-(-setup.model.vocab // parts),
        itemsize=2,
        weight_itemsize=setup.gathered_itemsize,
        advantages_known=parts == 1,
        wants_weight=precision.trains_all,
        sums_in_place=True,
        fuses=False,
        takes_statistics=True,
    )


def head_plan(setup: Setup, rows: int) -> Plan:
    """Raises ValueError where no tile fits the budget."""
    return choose(head_problem(setup, rows), setup.job.memory_budget or MEMORY_BUDGET, HEAD_RATES)


def largest_rows(setup: Setup) -> int:
    """Return the tokens of the largest micro-batch, of one process."""
    return setup.job.micro_batch_size * setup.job.longest


def lora_parameters(model: Transformer) -> int:
    """Return the elements of adapters on every linear layer but the head."""
    matrices = [shape for shape in model.layer_shapes() if len(shape) == 2]
    return model.layers * LORA_RANK * sum(sum(shape) for shape in matrices)


def rest_bytes(setup: Setup) -> float:
    """Return what parameters and moments take at any time: on one process, the first one of uneven shards."""
    precision = setup.layout.precision
    held = padded(setup.model.shapes(), setup.shards) / setup.shards * (precision.weight + precision.moments)
    return held + (0 if precision.trains_all else lora_parameters(setup.model) * _TRAINED / setup.shards)


def training(setup: Setup) -> Memory:
    model, job, precision = setup.model, setup.job, setup.layout.precision
    rows = largest_rows(setup)
    gradients = padded(model.shapes(), setup.shards) / setup.shards * precision.gradient
    in_autocast = setup.is_cast_late
    stream = 4 if in_autocast else 2
    per_token = model.activation_bytes(checkpointing=job.gradient_checkpointing, in_autocast=in_autocast)
    if job.gradient_checkpointing:  # one layer's are made again at a time
        per_token += model.layer_activation_bytes(in_autocast=in_autocast)
    per_token += model.hidden * (4 * stream + 4)  # the last norm; hidden states of the head and their gradient
    plan = head_plan(setup, rows)
    others = 0 if setup.vocabulary_shards == 1 else 2 * rows * setup.vocabulary_shards * model.hidden * 2
    return Memory(rest_bytes(setup) + gradients, _gathered(setup), rows * per_token, plan.extra_bytes + others)


def _gathered(setup: Setup) -> float:
    """Return what is whole for a while, and what stands beside parameters and gradients."""
    model, precision, itemsize = setup.model, setup.layout.precision, setup.gathered_itemsize
    copied = 1 if setup.job.gradient_checkpointing else model.layers  # layers whose copies are kept for their gradients
    copies = 2 * model.matrices() * copied if setup.is_cast_late else 0
    if not setup.layout.is_sharded:
        return copies + (precision.gradient * model.parameters if setup.trainers > 1 else 0)  # DDP's buckets
    has_head = not setup.layout.splits_vocabulary  # else no process holds all of it
    layer = padded(model.layer_shapes(), setup.shards)
    root = padded(model.root_shapes(has_head=has_head), setup.shards)
    if not precision.trains_all:
        return itemsize * (root + 2 * layer)
    # The root, gathered from the first layer to the last, with its gradients and in the end their float32 sums; two
    # layers (the next one comes while this one computes) with one's gradients and sums.
    passing = 2 * itemsize * root + max(4 * root, (3 * itemsize + 4) * layer)
    adds_up = setup.micro_batches > 1 and not setup.job.reduce_each_micro_batch
    return copies + passing + (4 * padded(model.shapes(), 1) if adds_up else 0)  # whole gradients, in float32


def loading(setup: Setup) -> float:
    """Return what processes hold of the first machine's own memory at the start, where they read all weights.

    Every one does, or, where the weights are to be split, the first for all; other machines then hold none.
    With a reference model (``loss.beta``, ``reward.kl_coef``) twice as much.
    """
    readers = 1 if setup.shards > 1 else setup.trainers_of_node
    return readers * setup.model.parameters * setup.layout.precision.weight


def cache_room(setup: Setup) -> float:
    """Return the bytes that an engine has for keys and values on each of its GPUs; negative where it does not fit."""
    weights = 2 * setup.model.parameters / setup.sampling.tensor_parallel + ASSUMED.engine_bytes
    if setup.servers:
        return ASSUMED.engine_share * SHEET.memory_bytes - weights
    return SHEET.memory_bytes - ASSUMED.reserved_bytes - rest_bytes(setup) - weights
