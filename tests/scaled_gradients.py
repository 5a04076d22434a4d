"""A float16 batch as a gradient scaler sees it: one of 2^17 tokens, its loss times 65,536. What its gradient may be.

The tests of each backend: kernels/ops/test_grpo_loss_scaled.py, kernels/backends/interpreted/test_triton_losses.py and
kernels/backends/test_cuda.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from error_budget import assert_within_budget
from torch import Tensor

from edge_kernels import GRPOLossConfig, edge_grpo_loss, linear_edge_grpo_loss, reference

# Odd, and so large that an unscaled element, 2^-17 / V, is below float16's smallest number.
B, T, D, V = 2, 4, 8, 1003
NUM_ITEMS = 2**17
SCALES = (65536.0, 65536 * 0.37)  # a scaler's, and one that is no power of two: the loss was divided as well
HALF_STEP, SMALLEST = 2.0**-11, 2.0**-24


def make_batch(dtype: torch.dtype = torch.float16) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).half().to(dtype)

    hidden, weight, bias = normal(B, T, D), normal(V, D), normal(V)
    logits = F.linear(hidden.double(), weight.double()).half().to(dtype)
    targets = torch.randint(V, (B, T), generator=generator)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, -1] = False
    old = reference.token_stats(logits.float(), targets).logprobs + 0.1 * torch.randn(B, T, generator=generator)
    options = {
        "advantages": torch.tensor([[1.0, -0.5, 1e-3, 30.0], [-2.0, 0.0, 0.7, 1.0]]),  # far apart
        "old_logprobs": old,
        "num_items": NUM_ITEMS,
    }
    return SimpleNamespace(
        logits=logits, hidden=hidden, weight=weight, bias=bias, targets=targets, mask=mask, options=options
    )


def logits_gradient(of: Any, batch: SimpleNamespace, scale: float, **options: Any) -> Tensor:
    leaf = batch.logits.clone().requires_grad_()
    out = of(leaf * 1, batch.targets, batch.mask, **batch.options, **options)
    return torch.autograd.grad(out.loss * scale, leaf)[0]


def head_gradients(of: Any, batch: SimpleNamespace, scale: float, **options: Any) -> tuple[Tensor, ...]:
    leaves = [value.clone().requires_grad_() for value in (batch.hidden, batch.weight, batch.bias)]
    hidden, weight, bias = leaves
    out = of(hidden, weight, batch.targets, batch.mask, bias, **batch.options, **options)
    return torch.autograd.grad(out.loss * scale, leaves)


def check_logits_gradient(scale: float, config: GRPOLossConfig, *, inplace: bool) -> None:
    """Every element is its exact value rounded once, so that 0 is what float16 has no number for, and rows sum to 0."""
    half, wide = make_batch(), make_batch(torch.float64)
    actual = logits_gradient(edge_grpo_loss, half, scale, config=config, inplace=inplace)
    exact = logits_gradient(reference.edge_grpo_loss, wide, scale, config=config)
    assert actual.dtype == torch.float16
    error = (actual.double() - exact).abs()
    assert (error <= 1.02 * HALF_STEP * exact.abs() + 0.51 * SMALLEST).all(), error.max()
    assert (actual == 0).sum() <= (exact.abs() < 0.51 * SMALLEST).sum()
    own = exact.abs().amax(-1)
    learning = own > 0
    assert learning.sum() >= 5  # the masked token and that of advantage 0 have no gradient, nor has a clipped one
    sums = actual.double().sum(-1).abs()[learning]
    assert (sums <= 2 * HALF_STEP * own[learning] + V * SMALLEST / 8).all(), sums / own[learning]


def check_head_gradients(scale: float, config: GRPOLossConfig) -> None:
    half, wide = make_batch(), make_batch(torch.float64)
    actual = head_gradients(linear_edge_grpo_loss, half, scale, config=config)
    plain = head_gradients(reference.linear_edge_grpo_loss, half, scale, config=config)
    exact = head_gradients(reference.linear_edge_grpo_loss, wide, scale, config=config)
    for name, *values in zip(("hidden", "weight", "bias"), actual, plain, exact, strict=True):
        assert values[0].dtype == torch.float16
        largest = values[2].abs().max()  # the budget's tolerance is relative to 1 at least
        assert_within_budget(*(v.double() / largest for v in values), tolerance=HALF_STEP, name=name)
        zeros = [(value.half() == 0).double().mean() for value in values]
        assert zeros[0] <= max(zeros[1:]) + 1e-3, f"{name}: {zeros}"


def check_overflow() -> None:
    """What float16 has no number for is infinite, as a scaler expects, and only that."""
    half, wide = make_batch(), make_batch(torch.float64)
    actual = logits_gradient(edge_grpo_loss, half, 2.0**34)
    exact = logits_gradient(reference.edge_grpo_loss, wide, 2.0**34)
    assert 0 < actual.isinf().sum() < actual.numel() // 2
    assert not actual.isnan().any()
    sure = (exact.abs() - 65520).abs() > 100
    torch.testing.assert_close(actual.isinf()[sure], (exact.abs() > 65520)[sure])
