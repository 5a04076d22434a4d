"""Calls of the compiled kernels by address, as the ops make them, and their float64 oracle.

The tests: test_extension*.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edge_kernels import _extension

_C = _extension.load()
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
IGNORE = -100
INF, NAN = float("inf"), float("nan")

# Sums, exponentials and the rounding of the result, for statistics of size about 10; float64 through the C library.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6, torch.float64: 1e-13}


class Stats(NamedTuple):
    logprobs: Tensor
    entropy: Tensor
    logsumexp: Tensor
    maximum: Tensor
    total: Tensor


def poisoned(rows: int, like: torch.dtype) -> Tensor:
    return torch.full((rows,), NAN, dtype=torch.float64 if like == torch.float64 else torch.float32)


def transform(temperature: float = 1.0, softcap: float = 0.0, logit_scale: float = 1.0) -> dict[str, float]:
    return {"inv_temperature": 1 / temperature, "softcap": softcap, "logit_scale": logit_scale}


ROWS = (
    "dtype", "logits", "row_stride", "rows", "vocab", "targets", "ignore_index",
    "inv_temperature", "softcap", "logit_scale",
)  # fmt: skip


def call(function: Callable[..., None], *, threads: int = 1, **arguments: Any) -> None:
    """Call a kernel of rows with the fields of ``TokenRows`` and its other arguments."""
    rows = _C.TokenRows(**{name: arguments.pop(name) for name in ROWS})
    function(_C.CpuLaunch(threads=threads), rows, **arguments)


def forward(logits: Tensor, targets: Tensor | None, *, threads: int = 1, **options: float) -> Stats:
    """Statistics of (N, V) logits whose rows may lie at any stride."""
    rows, vocab = logits.shape
    stats = Stats(*(poisoned(rows, logits.dtype) for _ in Stats._fields))
    call(
        _C.token_stats_forward,
        dtype=CODES[logits.dtype],
        logits=logits.data_ptr(),
        row_stride=logits.stride(0),
        rows=rows,
        vocab=vocab,
        targets=0 if targets is None else targets.data_ptr(),
        ignore_index=IGNORE,
        **transform(**options),
        logprobs=0 if targets is None else stats.logprobs.data_ptr(),
        entropy=stats.entropy.data_ptr(),
        logsumexp=stats.logsumexp.data_ptr(),
        maximum=stats.maximum.data_ptr(),
        total=stats.total.data_ptr(),
        threads=threads,
    )
    return stats


def backward(
    logits: Tensor,
    targets: Tensor | None,
    stats: Stats,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    *,
    out: Tensor | None = None,
    threads: int = 1,
    **options: float,
) -> Tensor:
    """Gradient of the logits, into ``out`` or a poisoned tensor."""
    rows, vocab = logits.shape
    out = torch.full((rows, vocab), NAN, dtype=logits.dtype) if out is None else out
    addresses = [0 if grad is None else grad.data_ptr() for grad in grads]
    call(
        _C.token_stats_backward,
        dtype=CODES[logits.dtype],
        logits=logits.data_ptr(),
        row_stride=logits.stride(0),
        rows=rows,
        vocab=vocab,
        targets=0 if targets is None else targets.data_ptr(),
        ignore_index=IGNORE,
        **transform(**options),
        entropy=stats.entropy.data_ptr(),
        maximum=stats.maximum.data_ptr(),
        total=stats.total.data_ptr(),
        grad_logprobs=addresses[0],
        grad_entropy=addresses[1],
        grad_logsumexp=addresses[2],
        grad_logits=out.data_ptr(),
        grad_row_stride=out.stride(0),
        threads=threads,
    )
    return out


def oracle(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, softcap: float = 0.0, logit_scale: float = 1.0
) -> tuple[Tensor, list[Tensor]]:
    """Float64 leaves and their statistics by PyTorch's own log_softmax and logsumexp; finite logits only."""
    leaf = logits.double().requires_grad_()
    z = leaf * logit_scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    log_p = z.log_softmax(-1)
    logprobs = log_p.gather(-1, targets[:, None])[:, 0]
    return leaf, [logprobs, -(log_p.exp() * log_p).sum(-1), z.logsumexp(-1)]


def make(rows: int, vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 4.0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * scale).to(dtype)
    targets = torch.randint(vocab, (rows,), generator=generator)
    double = dtype == torch.float64
    grads = tuple(
        torch.randn(3, rows, generator=generator, dtype=torch.float64).to((double and dtype) or torch.float32)
    )
    return logits, targets, grads


def assert_stats(stats: Stats, expected: list[Tensor], dtype: torch.dtype, extra: float = 0.0) -> None:
    for got, wanted, name in zip(stats, expected, Stats._fields, strict=False):
        limit = TOLERANCE[dtype] * (1 + wanted.abs() / 10) + extra
        error = (got.double() - wanted).abs()
        assert (error <= limit).all(), f"{name}: off by {error.max():.2e}"


def assert_gradient(got: Tensor, wanted: Tensor, extra: float = 0.0) -> None:
    # The last term is float16's smallest step; the others are half a step of the type and the float32 arithmetic.
    spacing = torch.finfo(got.dtype).eps / 2 * wanted.abs() * 1.01
    arithmetic = 1e-12 if got.dtype == torch.float64 else 5e-6
    step = 2.0**-25 if got.dtype == torch.float16 else 0.0
    error = (got.double() - wanted).abs()
    assert (error <= spacing + arithmetic * wanted.abs().amax(-1, keepdim=True) + step + extra).all(), (
        f"off by {error.max():.2e}"
    )
