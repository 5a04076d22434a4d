"""Traces every op for a CUDA device that is not there; ``python fake_cuda.py [library]``, run by test_fake_cuda.py.

Fake tensors have shapes and no values. A PyTorch built without CUDA asks the device even so which one is current; the
library, if one is given, answers that it does not matter.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from edge_kernels import (
    GRPOLossConfig,
    edge_grpo_loss,
    get_backend,
    linear_edge_grpo_loss,
    linear_token_stats,
    token_entropy,
    token_stats,
)
from edge_kernels.contract import METRICS, LossRule, TokenTerms, Transform
from edge_kernels.ops.grpo_loss import grpo_loss_op
from edge_kernels.ops.linear_grpo_loss import linear_grpo_loss_backward_op, linear_grpo_loss_op
from edge_kernels.ops.linear_token_stats import linear_token_stats_backward_op
from edge_kernels.ops.token_loss import token_loss_op
from edge_kernels.ops.token_stats import token_stats_backward_op

B, T, V, D = 2, 3, 10**6, 7  # logits of 12 MB that nothing allocates
CONFIG = GRPOLossConfig()
TRANSFORM = Transform(1.0, None, 1.0, -100)


def cuda(*shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=requires_grad)


def describe(tensors: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    assert all(tensor.device.type == "cuda" for tensor in tensors)
    return [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]


def check_public_functions(dtype: torch.dtype) -> None:
    logits, hidden, weight = cuda(B, T, V, dtype=dtype), cuda(B, T, D, dtype=dtype), cuda(V, D, dtype=dtype)
    targets, mask = cuda(B, T, dtype=torch.long), cuda(B, T, dtype=torch.bool)
    per_token = ((B, T), torch.float32)
    assert describe(token_stats(logits, targets)) == [per_token] * 3
    assert describe([token_entropy(logits)]) == [per_token]
    assert describe(linear_token_stats(hidden, weight, targets)) == [per_token] * 3
    for how in ({"advantages": cuda(B)}, {"rewards": cuda(B), "group_ids": cuda(B, dtype=torch.long)}):
        for out in (
            edge_grpo_loss(logits, targets, mask, config=CONFIG, **how),
            linear_edge_grpo_loss(hidden, weight, targets, mask, config=CONFIG, **how),
        ):
            assert describe(out[:3]) == [((), torch.float32), per_token, per_token]


def check_gradients(dtype: torch.dtype) -> None:
    """The ops that autograd calls, and those that make a gradient in their forward pass."""
    N = B * T
    logits, hidden, weight = cuda(N, V, dtype=dtype), cuda(N, D, dtype=dtype), cuda(V, D, dtype=dtype)
    bias, targets = cuda(V, dtype=dtype), cuda(N, dtype=torch.long)
    row = cuda(N)
    assert describe([token_stats_backward_op(logits, targets, [row] * 3, [row, None, None], TRANSFORM.pack())]) == [
        ((N, V), dtype)
    ]
    head = [((N, D), dtype), ((V, D), dtype), ((V,), dtype)]
    wanted = [True] * 3
    assert describe(
        linear_token_stats_backward_op(
            hidden, weight, bias, targets, [row] * 3, [row, row, None], wanted, dtype, 0, TRANSFORM.pack(), None
        )
    ) == [*head, ((0,), dtype)]
    terms = TokenTerms(
        cuda(N, dtype=torch.bool),
        row,
        row,
    )
    records = (terms.pack(), LossRule.of(CONFIG).pack())
    loss = [((), torch.float32), ((len(METRICS),), torch.float32)]
    stats = [((N,), torch.float32)] * 2
    assert describe(token_loss_op(row, row, *records)) == [*loss, *stats]
    assert describe(grpo_loss_op(logits, targets, TRANSFORM.pack(), *records)) == [*loss, *stats, ((N, V), dtype)]
    made = linear_grpo_loss_op(hidden, weight, bias, targets, wanted, False, dtype, 0, TRANSFORM.pack(), *records)
    assert describe(made[:7]) == [*loss, *stats, *head]
    kept = linear_grpo_loss_op(hidden, weight, bias, targets, wanted, True, dtype, 0, TRANSFORM.pack(), *records)
    assert describe(kept[7:]) == [((N, V), dtype), ((N,), torch.bool)]
    assert describe(linear_grpo_loss_backward_op(kept[0], hidden, weight, bias, *kept[7:], wanted, dtype)) == head


def check_tracing() -> None:
    """``torch.compile`` makes one graph of a loss, with our ops in it."""
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    logits = cuda(B, T, V, dtype=torch.bfloat16, requires_grad=True)
    hidden = cuda(B, T, D, dtype=torch.bfloat16, requires_grad=True)
    weight = cuda(V, D, dtype=torch.bfloat16)
    targets, mask, advantages = cuda(B, T, dtype=torch.long), cuda(B, T, dtype=torch.bool), cuda(B)

    def from_logits() -> Tensor:
        return edge_grpo_loss(logits, targets, mask, advantages=advantages, config=CONFIG).loss

    def from_hidden() -> Tensor:
        return linear_edge_grpo_loss(hidden, weight, targets, mask, advantages=advantages, config=CONFIG).loss

    for function, op in (
        (from_logits, "edge_kernels.grpo_loss"),
        (from_hidden, "edge_kernels.linear_grpo_loss"),
    ):
        loss = torch.compile(function, fullgraph=True, backend=record)()
        assert describe([loss]) == [((), torch.float32)]
        assert loss.requires_grad
        assert any(str(node.target).startswith(op) for node in graphs.pop().graph.nodes), op


if __name__ == "__main__":
    if len(sys.argv) > 1:
        ctypes.CDLL(sys.argv[1])
    with FakeTensorMode():
        assert get_backend(cuda(1)) in ("cuda", "triton")
        for kind in (torch.float32, torch.bfloat16, torch.float16):
            with torch.no_grad():
                check_public_functions(kind)
                check_gradients(kind)
        check_tracing()
    print("traced")
