"""What real processes on CPUs did with shrunken models, beside what the cost model says of them.

Bytes and counts are exact, so tests ask for equality. Flops are counted by torch, of products alone.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.scaling import collectives
from benchmarks.scaling.collectives import Collective
from benchmarks.scaling.transformer import Transformer

ROOT = Path(__file__).parents[2]


class Comparison(NamedTuple):
    """One thing, as processes did it and as the model has it: collectives, or a number."""

    what: str
    processes: int
    measured: Any
    computed: Any


def run(timeout: float = 300) -> dict[int, dict[str, Any]]:
    """Return what the processes of ``processes.py`` found, by the number of those that worked together."""
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        command = [sys.executable, "-m", "benchmarks.scaling.processes", folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
        if done.returncode:
            raise RuntimeError(f"the processes failed: {done.stderr[-3000:]}")
        return {int(path.stem): json.loads(path.read_text()) for path in Path(folder).glob("*.json")}


def comparisons(found: dict[int, dict[str, Any]]) -> Iterator[Comparison]:
    """Yield each case of the processes beside the model's prediction."""
    from benchmarks.scaling import processes as shrunken

    rows = shrunken.SEQUENCES * shrunken.LENGTH
    model, tied, buckets = shrunken.SHARDED, shrunken.TIED, (shrunken.BUCKET_BYTES, shrunken.BUCKET_BYTES)
    for number, cases in sorted(found.items()):
        expected = collectives.ddp(shrunken.BUCKETED, 4, buckets)
        yield _traffic("DDP, an optimizer step of two micro-batches", number, cases["ddp"], expected)
        variants = [
            ("FSDP2", model, "plain", 4),
            ("FSDP2, checkpointed", model, "checkpointed", 4),
            ("FSDP2, gathered in bfloat16", model, "rounded", 2),
            ("FSDP2, tied", tied, "tied", 4),
        ]
        for title, shape, name, itemsize in variants:
            case = cases[f"fsdp_{name}"]
            forward = collectives.fsdp_forward(shape, number, itemsize)
            gathers = collectives.fsdp_backward(shape, number, itemsize)
            sums = collectives.fsdp_reduction(shape, number, 4)
            yield _traffic(f"{title}: scoring", number, case["scoring"], forward)
            yield _traffic(f"{title}: forward", number, case["forward"], forward)
            yield _traffic(f"{title}: backward", number, case["backward"], gathers)
            yield _traffic(f"{title}: last backward", number, case["last backward"], gathers + sums)
            weights = collectives.full_tensors(shape, number, 4)
            yield _traffic(f"{title}: weights for an engine", number, case["weights"], weights)
            held = collectives.padded(shape.shapes(), number) // number
            for kind, size in (("weights", 4), ("gradients", 4), ("moments", 8)):
                yield Comparison(f"{title}: bytes of {kind}", number, case["bytes"][kind], size * held)
        if cases["fsdp_in_nodes"]:
            whole = collectives.fsdp_forward(model, 2, 4) + collectives.fsdp_backward(model, 2, 4)
            whole += collectives.fsdp_reduction(model, 2, 4) + collectives.replicas_reduction(model, 2, 4)
            yield _traffic("FSDP2 in nodes of two: a micro-batch", number, cases["fsdp_in_nodes"], whole)
        case = cases["vocabulary"]
        yield _traffic("vocabulary split: forward", number, case["forward"], collectives.vocabulary_forward(rows))
        backward = collectives.vocabulary_backward(rows, model.hidden)
        yield _traffic("vocabulary split: backward", number, case["backward"], backward)
        gathered = collectives.gathered_objects(len(pickle.dumps(["x" * shrunken.OBJECT_LENGTH])), number)
        yield _traffic("objects", number, cases["objects"], gathered)


def _traffic(what: str, processes: int, seen: Sequence[Sequence[Any]], expected: Sequence[Collective]) -> Comparison:
    return Comparison(what, processes, merged(Collective(*one) for one in seen), merged(expected))


def merged(found: Any) -> list[Collective]:
    """Return the collectives in one order, equal ones together."""
    counts: Counter[tuple[str, int]] = Counter()
    for collective in found:
        counts[collective.name, collective.nbytes] += collective.count
    return [Collective(name, nbytes, count) for (name, nbytes), count in sorted(counts.items())]


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, *(_for_all_heads(shape, q) for shape in (k, v)))


def _attention_backward_flops(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, q, *(_for_all_heads(shape, q) for shape in (k, v)))


def _for_all_heads(shape: Any, query: Any) -> tuple[int, ...]:
    """Torch's formulas know no keys that several heads share."""
    batch, _, *rest = shape
    return batch, query[1], *rest


# torch counts a GPU's kernel by these formulas, and no product of a CPU's.
_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


# --- in this process --------------------------------------------------------------------------------------------------


def flops(model: Transformer, *, checkpointing: bool, sequences: int = 2, length: int = 32) -> tuple[Comparison, ...]:
    """Return the products of a forward and of a backward pass through the layers."""
    from benchmarks.scaling.processes import qwen2
    from edge_grpo.policy.model import PolicyModel, enable_checkpointing

    inner = qwen2(model)
    if checkpointing:
        enable_checkpointing(inner)
    policy = PolicyModel(inner).train()
    ids = torch.arange(sequences * length).view(sequences, length) % model.vocab
    with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as forward:
        hidden = policy(ids, torch.ones_like(ids))
    with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as backward:
        hidden.sum().backward()
    lengths, suffix = [length] * sequences, ", checkpointed" if checkpointing else ""
    own = model.forward_flops(lengths, is_causal=False)  # torch counts both halves of attention
    again = model.backward_flops(lengths, is_causal=False, recomputes=checkpointing)
    return (
        Comparison(f"flops of a forward pass{suffix}", 1, forward.get_total_flops(), own),
        Comparison(f"flops of a backward pass{suffix}", 1, backward.get_total_flops(), again),
    )


def activations(model: Transformer, *, checkpointing: bool, in_autocast: bool) -> Comparison:
    """Return the bytes that the layers save of one token: the difference that one layer makes, times their number."""
    one, two = (_saved_bytes(model, layers, checkpointing, in_autocast) for layers in (1, 2))
    name = "bytes of a token's activations" + ", checkpointed" * checkpointing + ", autocast" * in_autocast
    computed = model.activation_bytes(checkpointing=checkpointing, in_autocast=in_autocast)
    return Comparison(name, 1, model.layers * (two - one), computed)


def _saved_bytes(model: Transformer, layers: int, checkpointing: bool, in_autocast: bool) -> float:
    from benchmarks.scaling.processes import LENGTH, SEQUENCES, qwen2
    from edge_grpo.policy.model import PolicyModel, enable_checkpointing

    inner = qwen2(replace(model, layers=layers))
    if not in_autocast:
        inner.bfloat16()
    if checkpointing:
        enable_checkpointing(inner)
    policy = PolicyModel(inner).train()
    matrices = {tuple(shape) for shape in model.shapes() if len(shape) == 2}
    matrices |= {shape[::-1] for shape in matrices}
    own = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    storages: dict[int, Any] = {}

    def save(value: torch.Tensor) -> torch.Tensor:
        is_copy = in_autocast and value.dtype == torch.bfloat16 and tuple(value.shape) in matrices  # of a weight
        if value.untyped_storage().data_ptr() not in own and not is_copy:
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage()  # kept, so that no address is reused
        return value

    ids = torch.arange(SEQUENCES * LENGTH).view(SEQUENCES, LENGTH) % model.vocab
    with (
        torch.autograd.graph.saved_tensors_hooks(save, lambda value: value),
        torch.autocast("cpu", torch.bfloat16, enabled=in_autocast),
    ):
        policy(ids, torch.ones_like(ids))
    return sum(storage.nbytes() for storage in storages.values()) / ids.numel()


def shown(found: dict[int, dict[str, Any]]) -> list[Comparison]:
    """Return what the page shows: with four processes, of FSDP2's variants the gradient's reduction alone."""
    from benchmarks.scaling.processes import SHARDED

    most = [one for one in comparisons(found) if one.processes == max(found)]
    rows = [one for one in most if not one.what.startswith("FSDP2,") or "last" in one.what]
    for checkpointing in (False, True):
        rows += flops(SHARDED, checkpointing=checkpointing)
        rows += [activations(SHARDED, checkpointing=checkpointing, in_autocast=value) for value in (False, True)]
    return rows
