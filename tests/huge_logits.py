"""Rows whose logits are so large that float32 holds no fraction of them, and float64 hardly: what must come out.

Each backend's tests run it: kernels/ops/test_token_stats.py, kernels/backends/test_cuda.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edge_kernels import GRPOLossConfig, edge_grpo_loss, token_stats

V = 301
TARGETS = torch.tensor([0, 5, V - 1, 17, 43, 1, 9])


def make_rows(dtype: torch.dtype) -> Tensor:
    """(7, V): equal logits of 1e8, 1e16, -1e16, 1e30 and 1.5e9; equal ones of 1e16 above others; 1e16 among small ones.

    1.5e9 is where the backends of GPUs change to coarser arithmetic (2^30, in powers of two).
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(TARGETS), V, generator=generator, dtype=torch.float64)
    uniform = torch.rand(V, generator=generator, dtype=torch.float64)
    for row, value in enumerate((1e8, 1e16, -1e16, 1e30)):
        x[row] = value
    x[4] = 1e16 * (0.5 + 0.4 * uniform)
    x[4, ::43] = 1e16
    x[5, :2] = 1e16
    x[6] = torch.tensor([7.4e8, 7.5e8])[(uniform > 0.5).long()]
    x[6, 9] = 7.5e8
    return x.to(dtype)


def check(dtype: torch.dtype, temperature: float) -> None:
    """The largest logits share the probability, whatever they are, and every gradient sums to 0 over its row."""
    logits = make_rows(dtype).requires_grad_()
    is_largest = logits.detach() == logits.detach().amax(-1, keepdim=True)
    count = is_largest.sum(-1).double()
    p = is_largest.double() / count[:, None]
    one = torch.zeros_like(p).scatter(-1, TARGETS[:, None], 1.0)
    assert is_largest.gather(-1, TARGETS[:, None]).all()
    expected = (one - p) / temperature  # the gradient of a log-probability

    stats = token_stats(logits, TARGETS, temperature=temperature)
    close = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(stats.logprobs.double(), -count.log(), **close)
    torch.testing.assert_close(stats.entropy.double(), count.log(), **close)
    largest = logits.detach().double().amax(-1) / temperature
    torch.testing.assert_close(stats.logsumexp.double(), largest + count.log(), rtol=3e-7, atol=0)

    step = torch.finfo(dtype).eps
    close = {"rtol": step, "atol": 1e-6 if dtype != torch.float64 else 1e-12}
    (gradient,) = torch.autograd.grad(stats.logprobs.sum(), logits, retain_graph=True)
    torch.testing.assert_close(gradient.double(), expected, **close)
    assert (gradient.double().sum(-1).abs() < 4 * step + close["atol"]).all(), gradient.double().sum(-1)
    # Equal logits have the largest entropy there is.
    (gradient,) = torch.autograd.grad(stats.entropy.sum(), logits)
    torch.testing.assert_close(gradient.double(), torch.zeros_like(p), rtol=0, atol=close["atol"])

    mask = torch.ones(1, len(TARGETS), dtype=torch.bool)
    for coefficient in (0.0, 0.01):
        config = GRPOLossConfig(temperature=temperature, entropy_coef=coefficient)
        options = {"advantages": torch.full((1,), -float(len(TARGETS))), "config": config}
        out = edge_grpo_loss(logits[None], TARGETS[None], mask, **options)
        (gradient,) = torch.autograd.grad(out.loss, logits)
        torch.testing.assert_close(gradient.double(), expected, **close)
