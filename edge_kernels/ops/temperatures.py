"""Rows of different temperatures: a backend's functions called once for each run of responses of one temperature.

So a kernel knows one temperature, each row is still read once, and every backend has this alike.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from edge_kernels.contract import Kernels, KernelStats, LossRule, StatsGradients, TokenTerms, Transform


def _runs(transform: Transform) -> Iterator[tuple[slice, Transform]]:
    """Yield the stretches of the first dimension that have one temperature, and the transform of each."""
    temperatures, start = transform.temperature, 0
    for stop in range(1, len(temperatures) + 1):
        if stop == len(temperatures) or temperatures[stop] != temperatures[start]:
            yield slice(start, stop), transform._replace(temperature=temperatures[start])
            start = stop


def token_stats_forward(backend: Kernels, logits: Tensor, targets: Tensor | None, transform: Transform) -> KernelStats:
    if not isinstance(transform.temperature, tuple):
        return backend.token_stats_forward(logits, targets, transform)
    parts = [
        backend.token_stats_forward(logits[span], None if targets is None else targets[span], own)
        for span, own in _runs(transform)
    ]
    return KernelStats(*(torch.cat(values) for values in zip(*parts, strict=True)))


def token_stats_backward(
    backend: Kernels,
    logits: Tensor,
    targets: Tensor | None,
    stats: KernelStats,
    gradients: StatsGradients,
    transform: Transform,
    *,
    out: Tensor,
) -> None:
    if not isinstance(transform.temperature, tuple):
        backend.token_stats_backward(logits, targets, stats, gradients, transform, out=out)
        return
    for span, own in _runs(transform):
        part, part_out = _parts(logits, out, span)
        backend.token_stats_backward(
            part,
            None if targets is None else targets[span],
            KernelStats(*(value[span] for value in stats)),
            StatsGradients(*(None if value is None else value[span] for value in gradients)),
            own,
            out=part_out,
        )


def grpo_sweep(
    backend: Kernels,
    logits: Tensor,
    targets: Tensor,
    terms: TokenTerms,
    rule: LossRule,
    transform: Transform,
    *,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    if not isinstance(transform.temperature, tuple):
        return backend.grpo_sweep(logits, targets, terms, rule, transform, out=out)
    results = []
    for span, own in _runs(transform):
        part, part_out = _parts(logits, out, span)
        results.append(backend.grpo_sweep(part, targets[span], terms.select(span), rule, own, out=part_out))
    logprobs, entropy = (torch.cat(values) for values in zip(*results, strict=True))
    return logprobs, entropy


def _parts(logits: Tensor, out: Tensor, span: slice) -> tuple[Tensor, Tensor]:
    """Return both parts, one object where both are one: backends ask whether they write in place."""
    part = logits[span]
    return part, part if out is logits else out[span]
