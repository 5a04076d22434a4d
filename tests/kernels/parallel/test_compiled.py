"""The losses of a split vocabulary, and of split responses, compiled into one graph, against eager ones.

In a group of one process; its collectives are in the graph all the same.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from edge_kernels import parallel

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from grpo_batch import V, config_of, inputs_for, make_batch

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("group_of_one")]


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("kind", "loss_type"),
    [
        ("head", "grpo"),
        ("head", "geo_mean"),
        ("logits", "grpo"),
        ("responses", "geo_mean"),
    ],
)
def test_is_one_graph(kind: str, loss_type: str) -> None:
    batch, config = make_batch(dtype=torch.float32), config_of(loss_type, beta=0.04, entropy_coef=0.1)
    inputs = inputs_for(batch, config)
    if loss_type == "geo_mean":
        inputs |= {"advantages": None, "rewards": batch.rewards, "group_ids": batch.groups}
    places: dict[str, Any] = {"sequence_group": dist.group.WORLD} if kind == "responses" else {"vocab_sizes": (V,)}

    def function(*arguments: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if kind == "logits":
            out = parallel.edge_grpo_loss(*arguments, batch.targets, batch.mask, **inputs, **places, inplace=True)
        else:
            hidden, weight, bias = arguments
            out = parallel.linear_edge_grpo_loss(hidden, weight, batch.targets, batch.mask, bias, **inputs, **places)
        return 2 * out.loss, out.metrics

    head = (batch.hidden, batch.weight, batch.bias)
    arguments = (torch.nn.functional.linear(*head).detach().requires_grad_(),) if kind == "logits" else head
    torch.compiler.reset()
    loss, metrics = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
    got = torch.autograd.grad(loss, arguments)
    expected, expected_metrics = function(*(x.clone() for x in arguments) if kind == "logits" else arguments)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics, expected_metrics)
    torch.testing.assert_close(got, torch.autograd.grad(expected, arguments))
