"""The backend "cpu": the kernels' contract (kernels.py) by the compiled extension; csrc/cpu."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from edge_kernels._checks import stats_dtype
from edge_kernels.backend import extension
from edge_kernels.backends.rows import (
    DTYPE_CODES,
    address,
    describe_rows,
    row_blocks,
    rule_options,
    transform_options,
    with_unit_stride,
)
from edge_kernels.contract import (
    METRICS,
    KernelStats,
    LossRule,
    StatsGradients,
    TokenLoss,
    TokenTerms,
    Transform,
    new_stats,
)


def _options(transform: Transform) -> dict[str, Any]:
    return transform_options(transform) | {"threads": torch.get_num_threads()}


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
    per_token, targets, numbers = _per_token(terms, dtype), targets.contiguous(), _numbers(terms)
    for (start, block), (_, out_block) in zip(row_blocks(logits), row_blocks(out, like=logits), strict=True):
        extension().grpo_sweep(
            **describe_rows(block, targets, start),
            logprobs=address(logprobs, start),
            entropy=address(entropy, start),
            grad_logits=out_block.data_ptr(),
            grad_row_stride=out_block.stride(0),
            **{name: address(value, start) for name, value in per_token.items()},
            **rule_options(rule),
            **numbers,
            **_options(transform),
        )
    return logprobs, entropy


def token_loss(logprobs: Tensor, entropy: Tensor, terms: TokenTerms, rule: LossRule) -> TokenLoss:
    logprobs, entropy, mask = logprobs.contiguous(), entropy.contiguous(), terms.mask.contiguous()
    loss, metrics = logprobs.new_empty(()), logprobs.new_empty(len(METRICS))
    out = TokenLoss(loss, metrics, torch.empty_like(logprobs), torch.empty_like(entropy))
    per_token = _per_token(terms, logprobs.dtype)
    extension().token_loss(
        dtype=DTYPE_CODES[logprobs.dtype],
        sequences=math.prod(logprobs.shape[:-1]),
        length=logprobs.shape[-1],
        ratio_of_sequence=rule.ratio_of_sequence,
        sampler_of_sequence=rule.sampler_of_sequence,
        logprobs=address(logprobs),
        entropy=address(entropy),
        mask=address(mask),
        **{name: address(value) for name, value in per_token.items()},
        **rule_options(rule),
        **_numbers(terms),
        loss=address(out.loss),
        metrics=address(out.metrics),
        d_logprobs=address(out.d_logprobs),
        d_entropy=address(out.d_entropy),
    )
    return out


def _per_token(terms: TokenTerms, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Return the tensors of one element per token, contiguous and of the types that the extension reads."""
    return {
        name: None if value is None else value.to(torch.uint8 if name == "injected" else dtype).contiguous()
        for name, value in terms._asdict().items()
        if name not in ("mask", "entropy_threshold", "bonus_weight")
    }


def _numbers(terms: TokenTerms) -> dict[str, float]:
    return {
        "entropy_threshold": -math.inf if terms.entropy_threshold is None else float(terms.entropy_threshold),
        "bonus_weight": 0.0 if terms.bonus_weight is None else float(terms.bonus_weight),
    }
