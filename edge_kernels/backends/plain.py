"""The backend "reference": the kernels' contract (kernels.py) in plain PyTorch, on any device and in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from edge_kernels import reference
from edge_kernels.ops.token_loss import LossRule, TokenTerms, token_loss
from edge_kernels.ops.token_stats import KernelStats, StatsGradients, Transform

__all__ = ["grpo_sweep", "token_loss", "token_stats_backward", "token_stats_forward"]


def token_stats_forward(logits: Tensor, targets: Tensor | None, transform: Transform) -> KernelStats:
    stats = reference.token_stats(logits, targets, **transform._asdict())
    return KernelStats(*stats, torch.zeros_like(stats.logsumexp))


def token_stats_backward(
    logits: Tensor,
    targets: Tensor | None,
    stats: KernelStats,
    gradients: StatsGradients,
    transform: Transform,
    *,
    out: Tensor,
) -> None:
    out.copy_(reference.token_stats_backward(logits, targets, *gradients, **transform._asdict()))


def grpo_sweep(
    logits: Tensor, targets: Tensor, terms: TokenTerms, rule: LossRule, transform: Transform, *, out: Tensor
) -> tuple[Tensor, Tensor]:
    stats = token_stats_forward(logits, targets, transform)
    part = token_loss(stats.logprobs, stats.entropy, terms, rule)
    d_entropy = None if terms.bonus_weight is None else part.d_entropy
    gradients = StatsGradients(part.d_logprobs, d_entropy, None)
    token_stats_backward(logits, targets, stats, gradients, transform, out=out)
    return stats.logprobs, stats.entropy
