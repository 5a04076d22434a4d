"""CPU processes that run shrunken models over gloo and write down what they send and what they hold.

python -m benchmarks.scaling.processes FOLDER: four of them, of which the first two also make a group of their own.
FOLDER/4.json and FOLDER/2.json have what the first process found: of each case its collectives, as [name, bytes of the
whole tensor], or the bytes that it holds. What should be there is in ``measured.py``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.scaling.collectives import ALL_GATHER, ALL_REDUCE, BROADCAST, REDUCE_SCATTER
from benchmarks.scaling.transformer import Transformer
from edge_grpo.policy.head import LMHead
from edge_grpo.policy.model import PolicyModel, enable_checkpointing
from edge_kernels import GRPOLossConfig, linear_edge_grpo_loss, parallel
from edge_kernels.parallel import agreement

# No size is a multiple of four, so that shards are uneven: 1003 rows of the vocabulary, 37 of a key, 90 of the MLP.
SHARDED = Transformer("shrunken", 74, 3, 4, 2, 90, 1003, is_tied=False, head_dim=18)
TIED = Transformer("shrunken, tied", 74, 3, 4, 2, 90, 1003, is_tied=True, head_dim=18)
# 14 MB of gradients, in more than two of DistributedDataParallel's buckets.
BUCKETED = Transformer("shrunken", 256, 4, 4, 2, 512, 2003, is_tied=False, head_dim=64)
BUCKET_BYTES = 2**21  # five buckets
SEQUENCES, LENGTH = 2, 12
OBJECT_LENGTH = 1000
PROCESSES = 4
CASES: dict[str, Callable[[Any], Any]] = {}

_NAMES = {
    "_allgather_base_": ALL_GATHER,
    "all_gather_into_tensor": ALL_GATHER,
    "allgather_": ALL_GATHER,
    "_reduce_scatter_base_": REDUCE_SCATTER,
    "allreduce_": ALL_REDUCE,
    "broadcast_": BROADCAST,
}


class Traffic(TorchDispatchMode):
    """Collects the collectives that this process takes part in, with the bytes of their largest tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own collectives come here one by one
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1]
            if name in _NAMES:
                self.seen.append((_NAMES[name], self._bytes(name, args)))
            elif name not in ("wait_tensor", "_wrap_tensor_autograd", "barrier"):
                raise NotImplementedError(f"a collective that is not known here: {func}")
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _bytes(name: str, args: Any) -> int:
        if name == "all_gather_into_tensor":  # functional: its argument is a part
            return args[0].nbytes * args[1]
        if name == "allgather_":
            return sum(value.nbytes for value in tree_leaves(args[0]))
        return max(value.nbytes for value in tree_leaves(args) if isinstance(value, Tensor))


def case(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    CASES[function.__name__] = function
    return function


def qwen2(model: Transformer) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(  # type: ignore[call-arg]  # head_dim: of any configuration
        vocab_size=model.vocab,
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        tie_word_embeddings=model.is_tied,
        head_dim=model.head_dim,
    )
    return Qwen2ForCausalLM(config)


def loss_of(policy: nn.Module, vocab: int) -> Tensor:
    """The trainer's loss of one micro-batch: inside the policy's forward, where its head is whole."""
    input_ids = torch.arange(SEQUENCES * LENGTH).view(SEQUENCES, LENGTH) * 7919 % vocab

    def loss(hidden: Tensor, head: LMHead) -> Tensor:
        targets, mask = input_ids[:, 1:], torch.ones(SEQUENCES, LENGTH - 1, dtype=torch.bool)
        inputs = (hidden[:, :-1], head.weight, targets, mask)
        return linear_edge_grpo_loss(*inputs, advantages=torch.tensor([1.0, -1.0]), config=GRPOLossConfig()).loss

    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        return policy(input_ids, torch.ones_like(input_ids), loss)


def shard(model: Transformer, mesh: Any, *, checkpointing: bool = False, rounded: bool = False) -> Any:
    """Return the policy as the trainer shards it: each layer a unit, the rest the root's, sums in float32.

    ``rounded``: gathered in bfloat16.
    """
    inner = qwen2(model)
    if checkpointing:
        enable_checkpointing(inner)
    rule = MixedPrecisionPolicy(torch.bfloat16 if rounded else None, torch.float32)
    options: dict[str, Any] = {"mp_policy": rule, "mesh": mesh}
    for layer in inner.model.layers:
        fully_shard(layer, **options)
    return fully_shard(PolicyModel(inner).train(), **options)


def traffic_of(function: Callable[[], Any]) -> list[tuple[str, int]]:
    with Traffic() as traffic:
        function()
    return traffic.seen


# --- cases ------------------------------------------------------------------------------------------------------------


# ``mesh`` is that of the processes which run a case.


@case
def ddp(mesh: Any) -> list[tuple[str, int]]:
    """Two micro-batches, of which the last one sends, three times: buckets are formed anew after the first time."""
    own = {"process_group": mesh.get_group(), "bucket_cap_mb": BUCKET_BYTES / 2**20}
    policy = DistributedDataParallel(PolicyModel(qwen2(BUCKETED)).train(), **own)
    for _ in range(3):
        with policy.no_sync():
            others = traffic_of(lambda: loss_of(policy, BUCKETED.vocab).backward())
        last = traffic_of(lambda: loss_of(policy, BUCKETED.vocab).backward())
    return others + last


def fsdp(model: Transformer, mesh: Any, **options: bool) -> dict[str, Any]:
    policy = shard(model, mesh, **options)
    with torch.no_grad():
        scoring = traffic_of(lambda: loss_of(policy, model.vocab))
    policy.reshard()
    backward = []
    for reduces in (False, True):
        policy.set_requires_gradient_sync(reduces)
        with Traffic() as traffic:
            loss = loss_of(policy, model.vocab)
        backward.append(traffic_of(loss.backward))
    weights = traffic_of(lambda: [value.full_tensor() for value in policy.parameters()])
    optimizer = torch.optim.AdamW(policy.parameters())
    optimizer.step()
    states: list[Any] = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    held: dict[str, Any] = {
        "weights": policy.parameters(),
        "gradients": [p.grad for p in policy.parameters()],
        "moments": states,
    }
    return {
        "scoring": scoring,
        "forward": traffic.seen,
        "backward": backward[0],
        "last backward": backward[1],
        "weights": weights,
        "bytes": {name: sum(value.to_local().nbytes for value in values) for name, values in held.items()},
    }


@case
def fsdp_plain(mesh: Any) -> dict[str, Any]:
    return fsdp(SHARDED, mesh)


@case
def fsdp_checkpointed(mesh: Any) -> dict[str, Any]:
    return fsdp(SHARDED, mesh, checkpointing=True)


@case
def fsdp_rounded(mesh: Any) -> dict[str, Any]:
    return fsdp(SHARDED, mesh, rounded=True)


@case
def fsdp_tied(mesh: Any) -> dict[str, Any]:
    return fsdp(TIED, mesh)


@case
def fsdp_in_nodes(mesh: Any) -> list[tuple[str, int]] | None:
    """Two processes are a node here."""
    if mesh.size() < PROCESSES:
        return None
    nodes = init_device_mesh("cpu", (mesh.size() // 2, 2), mesh_dim_names=("replicas", "shards"))
    policy = shard(SHARDED, nodes)
    return traffic_of(lambda: loss_of(policy, SHARDED.vocab).backward())


@case
def vocabulary(mesh: Any) -> dict[str, Any]:
    rows = SEQUENCES * LENGTH
    sizes = [len(part) for part in torch.arange(SHARDED.vocab).tensor_split(mesh.size())]
    torch.manual_seed(0)
    hidden = torch.randn(SEQUENCES, LENGTH, SHARDED.hidden, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(sizes[mesh.get_rank()], SHARDED.hidden, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.arange(rows).view(SEQUENCES, LENGTH)
    mask, advantages = torch.ones_like(targets, dtype=torch.bool), torch.tensor([1.0, -1.0])
    places = {"group": mesh.get_group(), "vocab_sizes": sizes}
    # As on a GPU: no values are read, so none are compared beforehand.
    with mock.patch.object(agreement, "reads", return_value=False), Traffic() as traffic:
        out = parallel.linear_edge_grpo_loss(hidden, weight, targets, mask, advantages=advantages, **places)
    return {"forward": traffic.seen, "backward": traffic_of(out.loss.backward)}


@case
def objects(mesh: Any) -> list[tuple[str, int]]:
    """What accelerate's ``gather_object`` does, with another number of bytes on each process."""
    own = ["x" * (OBJECT_LENGTH - mesh.get_rank())]
    return traffic_of(lambda: dist.all_gather_object([None] * mesh.size(), own, group=mesh.get_group()))


def run(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=PROCESSES)
    everyone, two = init_device_mesh("cpu", (PROCESSES,)), DeviceMesh("cpu", [0, 1])
    for mesh in (everyone, two):
        if mesh.get_coordinate() is None:
            continue
        found = {name: function(mesh) for name, function in CASES.items()}
        if rank == 0:
            (folder / f"{mesh.size()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked, so that what takes longest, importing torch and transformers, is done once.
    torch.multiprocessing.start_processes(run, (Path(sys.argv[1]),), PROCESSES, start_method="fork")
