"""Weights and logits that are DTensors: group and sizes are theirs, and so is the gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from grpo_batch import V, config_of, inputs_for, make_batch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from traffic import close, counted, random, refuses, without_reading

import edge_kernels
from edge_kernels import parallel


def distributed_tensors(group: Any) -> None:
    if dist.get_world_size(group) != dist.get_world_size():
        return
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for vocab in (V, 4, 1):  # torch gives the last ranks less, or nothing
        targets = torch.arange(6) % vocab
        whole = [random(*shape, seed=n).requires_grad_() for n, shape in enumerate([(6, 5), (vocab, 5), (vocab,)])]
        hidden = whole[0].detach().clone().requires_grad_()
        weight, bias = (distribute_tensor(value.detach(), mesh, [Shard(0)]).requires_grad_() for value in whole[1:])
        expected = edge_kernels.linear_token_stats(whole[0], whole[1], targets, whole[2])
        with counted(("allreduce_", 8 * 6 + 32), ("allreduce_", 24 * 6)), without_reading():
            actual = parallel.linear_token_stats(hidden, weight, targets, bias)
        (expected.logprobs.sum() + 2 * expected.entropy.sum()).backward()
        (actual.logprobs.sum() + 2 * actual.entropy.sum()).backward()
        for name, a, e in zip(("hidden", "weight", "bias"), (hidden, weight, bias), whole, strict=True):
            assert isinstance(a.grad, DTensor) == (name != "hidden")
            close(a.grad.full_tensor() if isinstance(a.grad, DTensor) else a.grad, e.grad, f"{vocab} {name}")
        logits = distribute_tensor(F.linear(*(value.detach() for value in whole)), mesh, [Shard(1)])
        close(parallel.token_stats(logits, targets).entropy, expected.entropy, f"{vocab} logits")
    batch = make_batch()
    weight, bias = (
        distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_() for x in (batch.weight, batch.bias)
    )
    logits = F.linear(batch.hidden, batch.weight, batch.bias).detach()
    shard = distribute_tensor(logits, mesh, [Shard(2)]).requires_grad_()
    for loss_type in ("grpo", "geo_mean"):
        inputs = inputs_for(batch, config_of(loss_type))
        tokens = (batch.targets, batch.mask)
        expected = edge_kernels.linear_edge_grpo_loss(batch.hidden, batch.weight, *tokens, batch.bias, **inputs)
        hidden = batch.hidden.detach().requires_grad_()
        out = parallel.linear_edge_grpo_loss(hidden, weight, *tokens, bias, **inputs)
        close(out.loss, expected.loss, f"{loss_type}: loss")
        wanted = torch.autograd.grad(expected.loss, (batch.hidden, batch.weight, batch.bias))
        for a, e in zip(torch.autograd.grad(out.loss, (hidden, weight, bias)), wanted, strict=True):
            close(a.full_tensor() if isinstance(a, DTensor) else a, e, f"{loss_type}: gradient")
        whole_logits = logits.clone().requires_grad_()
        (e,) = torch.autograd.grad(edge_kernels.edge_grpo_loss(whole_logits, *tokens, **inputs).loss, whole_logits)
        (a,) = torch.autograd.grad(parallel.edge_grpo_loss(shard, *tokens, **inputs).loss, shard)
        close(a.full_tensor(), e, f"{loss_type}: gradient of logits")
    for wrong in ([Shard(1)], None):
        refused = distribute_tensor(random(6, 6), mesh, wrong)
        refuses("Shard", parallel.linear_token_stats, random(4, 6), refused, torch.zeros(4, dtype=torch.int64))
    whole_hidden = distribute_tensor(random(4, 6), mesh, None)
    refuses("to_local", parallel.linear_token_stats, whole_hidden, random(2, 6), torch.zeros(4, dtype=torch.int64))


CASES = (distributed_tensors,)
