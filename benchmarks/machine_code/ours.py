"""Our GPU kernels: launches of the Triton ones by their own launchers, in the shapes of peers.py; the CUDA ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.machine_code import aot
from benchmarks.machine_code.peers import HIDDEN, SEQUENCES, TEMPERATURE, TOKENS, VOCAB
from edge_kernels.config import GRPOLossConfig
from edge_kernels.ops.token_loss import LossRule, TokenTerms
from edge_kernels.ops.token_stats import StatsGradients, Transform

ROWS = SEQUENCES * TOKENS
TRANSFORM = Transform(TEMPERATURE, None, 1.0, -100)


def _per_token(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(ROWS, dtype=dtype, device="cuda")


@contextmanager
def _triton_backend() -> Iterator[Any]:
    """The backend's module, that has looked at no device yet and will not remember the fake one."""
    from edge_kernels.backends import triton as backend
    from edge_kernels.backends.triton import tuning

    tuning._gpu.cache_clear()
    try:
        yield backend
    finally:
        tuning._gpu.cache_clear()


def triton_logits(architecture: int) -> None:
    """The statistics and their gradient, the one-sweep loss, and the statistics of too few rows for the GPU."""
    logits, targets = torch.empty(ROWS, VOCAB, dtype=torch.bfloat16, device="cuda"), _per_token(torch.int64)
    terms = TokenTerms(
        mask=_per_token(torch.bool),
        weight=torch.empty((), device="cuda").expand(ROWS),
        advantages=_per_token(),
        old_logprobs=_per_token(),
        ref_logprobs=None,
        sampler_ratio=None,
        sampling_logprobs=None,
        injected=None,
        entropy_threshold=None,
        bonus_weight=None,
    )
    gradients = StatsGradients(_per_token(), _per_token(), None)
    with _triton_backend() as backend:
        stats = backend.token_stats_forward(logits, targets, TRANSFORM)
        backend.token_stats_backward(logits, targets, stats, gradients, TRANSFORM, out=logits)
        backend.grpo_sweep(logits, targets, terms, LossRule.of(GRPOLossConfig()), TRANSFORM, out=logits)
        backend.token_stats_forward(logits.narrow(0, 0, 8), targets.narrow(0, 0, 8), TRANSFORM)


def triton_head(architecture: int) -> None:
    """The fused head, forward and backward."""
    hidden = torch.empty(ROWS, HIDDEN, dtype=torch.bfloat16, device="cuda")
    weight = torch.empty(VOCAB, HIDDEN, dtype=torch.bfloat16, device="cuda")
    inputs = hidden, weight, None, _per_token(torch.int64)
    gradients, wanted = StatsGradients(_per_token(), _per_token(), None), (True, True, False)
    with _triton_backend() as backend:
        stats = backend.linear_forward(*inputs, hidden.dtype, TRANSFORM)
        backend.linear_backward(*inputs, stats, gradients, wanted, hidden.dtype, TRANSFORM, None)


def cuda_kernels(architecture: int, names: str = "*") -> list[aot.Compiled]:
    """The kernels of the CUDA sources of these names: those for bfloat16, and those that have no element type."""
    sources = sorted(aot.CUDA_SOURCES.glob(f"{names}.cu"))
    compiled = aot.cuda_kernels(sources, architecture)
    return [each for each in compiled if not re.search(r"<(float|__half)\b", each.kernel.name)]
