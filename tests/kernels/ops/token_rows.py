"""Rows of random logits with their targets, and a gradient that comes through all three statistics."""

from __future__ import annotations

import torch
from torch import Tensor


def make_rows(rows: int, vocab: int, dtype: torch.dtype, *, scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=generator) * scale).to(dtype)
    return logits, torch.randint(vocab, (rows,), generator=generator)


def gradients(stats, logits: Tensor, seed: int = 1) -> Tensor:
    """Return the logits' gradient of a random combination of the three statistics."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(stats[0].shape, generator=generator).to(stats[0].dtype) for _ in stats]
    return torch.autograd.grad(stats, logits, weights)[0]
