"""The learning rate of an optimizer step: a function of its number, so that there is nothing to save."""

from __future__ import annotations

import torch

from edge_grpo.config import OptimConfig


def learning_rate_factor(update: int, optim: OptimConfig, updates: int) -> float:
    """Return what the peak rate is multiplied by at an optimizer step (0-based) of a run of ``updates`` steps."""
    if update < optim.warmup_steps:
        return (update + 1) / optim.warmup_steps
    progress = min(1.0, (update - optim.warmup_steps) / max(updates - optim.warmup_steps, 1))
    if optim.schedule == "linear":
        return 1.0 - progress
    if optim.schedule == "cosine":
        return 0.5 * (1.0 + float(torch.cos(torch.tensor(progress * torch.pi))))
    return 1.0
