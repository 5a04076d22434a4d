"""A batch of a few tokens, and the ways to take its loss: from logits, in place, from hidden states, the reference.

The tests: test_grpo_loss*.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edge_kernels import GRPOLossConfig, GRPOLossOutput, edge_grpo_loss, linear_edge_grpo_loss, reference
from edge_kernels.config import LossType

B, T, D, V = 4, 6, 5, 13
LOSS_TYPES = LossType.__args__
MODULE = sys.modules["edge_kernels.ops.grpo_loss"]
LINEAR = sys.modules["edge_kernels.ops.linear_grpo_loss"]


def make_batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = normal(B, T, D), normal(V, D), normal(V)
    targets = torch.randint(V, (B, T), generator=generator)
    mask = torch.arange(T) < torch.tensor([T, 4, 0, 2])[:, None]  # one response is masked throughout
    targets[~mask] = 99  # padding need not be a token of the vocabulary
    stats = reference.linear_token_stats(hidden, weight, targets.masked_fill(~mask, -100), bias)
    injected = torch.rand(B, T, generator=generator) < 0.3
    injected[1, 1] = True
    old, ref = stats.logprobs + 0.4 * normal(B, T), stats.logprobs + 0.4 * normal(B, T)
    sampling = old + 0.4 * normal(B, T)
    old[1, 1] = sampling[1, 1] = math.nan  # an injected token without a record
    advantages = normal(B)
    advantages[3] = 0
    return SimpleNamespace(
        hidden=hidden.to(dtype).requires_grad_(),
        weight=weight.to(dtype).requires_grad_(),
        bias=bias.to(dtype).requires_grad_(),
        targets=targets,
        mask=mask,
        injected=injected,
        truncated=torch.tensor([False, True, True, False]),
        advantages=advantages,
        old=old,
        ref=ref,
        sampling=sampling,
        rewards=torch.tensor([1.0, 0.0, 0.5, 1.0], dtype=torch.float64),
        groups=torch.tensor([4, 4, 1, 1]),
    )


def config_of(loss_type: str = "dapo", **options: Any) -> GRPOLossConfig:
    return GRPOLossConfig(**{"loss_type": loss_type, "max_completion_length": 7, "epsilon_high": 0.28, **options})


def variant_of(loss_type: str, variant: int, **options: Any) -> GRPOLossConfig:
    """One of four (0 to 3) configurations that together take every option which sums over a response."""
    defaults = {
        "importance_sampling_level": ("token", "sequence")[variant % 2],
        "injected": ("credit", "mask", "sft", "shaped")[variant],
        "beta": 0.04 * (variant > 1),
        "entropy_coef": 0.02 * (variant != 1),
        "top_entropy_quantile": (1.0, 0.5)[variant % 2],
        "sampler_ratio_cap": None if variant == 2 else 1.2,
        "off_policy_mask_threshold": 0.1 if variant == 3 else None,
        "mask_truncated_completions": variant == 1,
    }
    return config_of(loss_type, **defaults | options)


def inputs_for(batch: SimpleNamespace, config: GRPOLossConfig, *, with_old: bool = True) -> dict[str, Any]:
    return {
        "advantages": batch.advantages,
        "old_logprobs": batch.old if with_old else None,
        "ref_logprobs": batch.ref if config.beta else None,
        "sampling_logprobs": batch.sampling if config.sampler_ratio_cap is not None else None,
        "injected_mask": batch.injected,
        "truncated_mask": batch.truncated,
        "config": config,
    }


def from_logits(batch: SimpleNamespace, **options: Any) -> GRPOLossOutput:
    return edge_grpo_loss(F.linear(batch.hidden, batch.weight, batch.bias), batch.targets, batch.mask, **options)


def from_logits_inplace(batch: SimpleNamespace, **options: Any) -> GRPOLossOutput:
    return from_logits(batch, inplace=True, **options)


def from_hidden(batch: SimpleNamespace, **options: Any) -> GRPOLossOutput:
    return linear_edge_grpo_loss(batch.hidden, batch.weight, batch.targets, batch.mask, batch.bias, **options)


def from_reference(batch: SimpleNamespace, **options: Any) -> GRPOLossOutput:
    return reference.linear_edge_grpo_loss(batch.hidden, batch.weight, batch.targets, batch.mask, batch.bias, **options)


Path = Callable[..., GRPOLossOutput]
ALL_PATHS = (from_logits, from_logits_inplace, from_hidden)


def gradients(out: GRPOLossOutput, batch: SimpleNamespace) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.loss, (batch.hidden, batch.weight, batch.bias))
