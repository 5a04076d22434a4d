"""The backend "cpu": the kernels' contract (kernels.py) by the compiled extension; csrc/cpu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edge_kernels._checks import stats_dtype
from edge_kernels.backend import extension
from edge_kernels.rows import address, describe_rows, row_blocks, with_unit_stride
from edge_kernels.token_loss import LossRule, TokenTerms, token_loss
from edge_kernels.token_stats import KernelStats, StatsGradients, Transform, new_stats

__all__ = ["grpo_sweep", "token_loss", "token_stats_backward", "token_stats_forward"]


def _options(transform: Transform) -> dict[str, Any]:
    return {
        "inv_temperature": 1 / transform.temperature,
        "softcap": transform.softcap or 0.0,
        "logit_scale": transform.logit_scale,
        "ignore_index": transform.ignore_index,
        "threads": torch.get_num_threads(),
    }


def token_stats_forward(logits: Tensor, targets: Tensor | None, transform: Transform) -> KernelStats:
    out = KernelStats(*(new_stats(logits) for _ in KernelStats._fields))
    if targets is None:
        out.logprobs.zero_()
    targets = None if targets is None else targets.contiguous()
    for start, block in row_blocks(with_unit_stride(logits)):
        extension().token_stats_forward(
            **describe_rows(block, targets, start),
            logprobs=address(None if targets is None else out.logprobs, start),
            entropy=address(out.entropy, start),
            logsumexp=address(out.logsumexp, start),
            logsumexp_low=address(out.logsumexp_low, start),
            **_options(transform),
        )
    return out


def token_stats_backward(
    logits: Tensor,
    targets: Tensor | None,
    stats: KernelStats,
    gradients: StatsGradients,
    transform: Transform,
    *,
    out: Tensor,
) -> None:
    targets = None if targets is None else targets.contiguous()
    dtype = stats_dtype(logits.dtype)
    gradients = StatsGradients(*(None if g is None else g.to(dtype).contiguous() for g in gradients))
    source = out if out is logits else with_unit_stride(logits)
    for (start, block), (_, out_block) in zip(row_blocks(source), row_blocks(out, like=source), strict=True):
        extension().token_stats_backward(
            **describe_rows(block, targets, start),
            entropy=address(stats.entropy, start),
            logsumexp=address(stats.logsumexp, start),
            logsumexp_low=address(stats.logsumexp_low, start),
            grad_logprobs=address(gradients.logprobs, start),
            grad_entropy=address(gradients.entropy, start),
            grad_logsumexp=address(gradients.logsumexp, start),
            grad_logits=out_block.data_ptr(),
            grad_row_stride=out_block.stride(0),
            **_options(transform),
        )


def grpo_sweep(
    logits: Tensor, targets: Tensor, terms: TokenTerms, rule: LossRule, transform: Transform, *, out: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = stats_dtype(logits.dtype)
    logprobs, entropy = (torch.empty(targets.shape, dtype=dtype) for _ in range(2))
    per_token = {
        name: None if value is None else value.to(torch.uint8 if name == "injected" else dtype).contiguous()
        for name, value in terms._asdict().items()
        if name not in ("mask", "entropy_threshold", "bonus_weight")
    }
    targets = targets.contiguous()
    numbers = {
        "entropy_threshold": -float("inf") if terms.entropy_threshold is None else float(terms.entropy_threshold),
        "bonus_weight": 0.0 if terms.bonus_weight is None else float(terms.bonus_weight),
    }
    for (start, block), (_, out_block) in zip(row_blocks(logits), row_blocks(out, like=logits), strict=True):
        extension().grpo_sweep(
            **describe_rows(block, targets, start),
            logprobs=address(logprobs, start),
            entropy=address(entropy, start),
            grad_logits=out_block.data_ptr(),
            grad_row_stride=out_block.stride(0),
            **{name: address(value, start) for name, value in per_token.items()},
            **rule.for_extension(),
            **numbers,
            **_options(transform),
        )
    return logprobs, entropy
