"""The backends "cpu" and "cuda": the contract (contract.py) by the compiled extension, through one call path.

The kernels are csrc's; no arithmetic happens here. On a GPU every function puts its kernels on torch's current stream
of the tensors' device and returns. Memory comes from torch's allocator, and nothing waits, so that all of it can be
captured into a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from edge_kernels import _extension
from edge_kernels._checks import stats_dtype
from edge_kernels.backends.rows import row_blocks, with_unit_stride
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
from edge_kernels.reference import MAX_KL_LOG_RATIO, MAX_LOG_RATIO

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


# --- the contract -----------------------------------------------------------------------------------------------------


def token_stats_forward(logits: Tensor, targets: Tensor | None, transform: Transform) -> KernelStats:
    out = KernelStats(*(new_stats(logits) for _ in KernelStats._fields))
    if targets is None:
        out.logprobs.zero_()
    for start, rows, launch in _row_calls(with_unit_stride(logits), targets, transform):
        _extension.load().token_stats_forward(
            launch,
            rows,
            logprobs=_address(None if targets is None else out.logprobs, start),
            entropy=_address(out.entropy, start),
            logsumexp=_address(out.logsumexp, start),
            maximum=_address(out.maximum, start),
            total=_address(out.total, start),
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
    dtype = stats_dtype(logits.dtype)
    gradients = StatsGradients(*(None if g is None else g.to(dtype).contiguous() for g in gradients))
    source = out if out is logits else with_unit_stride(logits)
    calls = _row_calls(source, targets, transform, needs_workspace=False)
    for (start, rows, launch), (_, out_block) in zip(calls, row_blocks(out, like=source), strict=True):
        _extension.load().token_stats_backward(
            launch,
            rows,
            entropy=_address(stats.entropy, start),
            maximum=_address(stats.maximum, start),
            total=_address(stats.total, start),
            grad_logprobs=_address(gradients.logprobs, start),
            grad_entropy=_address(gradients.entropy, start),
            grad_logsumexp=_address(gradients.logsumexp, start),
            grad_logits=out_block.data_ptr(),
            grad_row_stride=out_block.stride(0),
        )


def units_per_nat(transform: Transform, device: torch.device) -> tuple[float, float]:
    product = transform.logit_scale / transform.temperature
    slope = product if transform.softcap is None and product > 0 else 1 / transform.temperature
    if device.type == "cpu":
        return 1 / slope, 1 / slope
    gain = slope * math.log2(math.e)
    fine = float(torch.tensor(gain, dtype=torch.float32, device="cpu"))
    return fine / slope, 2.0 ** math.ceil(math.log2(gain)) / slope


def grpo_sweep(
    logits: Tensor, targets: Tensor, terms: TokenTerms, rule: LossRule, transform: Transform, *, out: Tensor
) -> tuple[Tensor, Tensor]:
    logprobs, entropy = new_stats(logits), new_stats(logits)
    extension, tensors = _extension.load(), _contiguous(terms, logprobs.dtype)
    calls = _row_calls(logits, targets, transform)
    for (start, rows, launch), (_, out_block) in zip(calls, row_blocks(out, like=logits), strict=True):
        extension.grpo_sweep(
            launch,
            rows,
            _pack_terms(tensors, start),
            _pack_rule(rule, extension),
            logprobs=_address(logprobs, start),
            entropy=_address(entropy, start),
            grad_logits=out_block.data_ptr(),
            grad_row_stride=out_block.stride(0),
        )
    return logprobs, entropy


def token_loss(logprobs: Tensor, entropy: Tensor, terms: TokenTerms, rule: LossRule) -> TokenLoss:
    logprobs, entropy = logprobs.contiguous(), entropy.contiguous()
    tensors = _contiguous(terms, logprobs.dtype)
    loss, metrics = logprobs.new_empty(()), logprobs.new_empty(len(METRICS))
    out = TokenLoss(loss, metrics, torch.empty_like(logprobs), torch.empty_like(entropy))
    sequences, length = math.prod(logprobs.shape[:-1]), logprobs.shape[-1]
    extension, launch = _extension.load(), _launch(logprobs)
    if num_bytes := extension.token_loss_workspace_bytes(launch, sequences=sequences, length=length):
        workspace = _workspace(logprobs, num_bytes)
        launch.use_workspace(workspace.data_ptr(), workspace.numel())
    extension.token_loss(
        launch,
        _pack_terms(tensors),
        _pack_rule(rule, extension),
        dtype=_DTYPE_CODES[logprobs.dtype],
        sequences=sequences,
        length=length,
        logprobs=_address(logprobs),
        entropy=_address(entropy),
        loss=_address(out.loss),
        metrics=_address(out.metrics),
        d_logprobs=_address(out.d_logprobs),
        d_entropy=_address(out.d_entropy),
    )
    return out


# --- the records of csrc/calls.h --------------------------------------------------------------------------------------


def _row_calls(
    logits: Tensor, targets: Tensor | None, transform: Transform, *, needs_workspace: bool = True
) -> Iterator[tuple[int, Any, Any]]:
    """Yield for each block of rows the number of its first row, its ``TokenRows``, and where its call runs."""
    extension, launch = _extension.load(), _launch(logits)
    targets = None if targets is None else targets.contiguous()
    for start, block in row_blocks(logits):
        rows = extension.TokenRows(
            dtype=_DTYPE_CODES[block.dtype],
            logits=block.data_ptr(),
            row_stride=block.stride(0),
            rows=block.shape[0],
            vocab=block.shape[1],
            targets=_address(targets, start),
            ignore_index=transform.ignore_index,
            inv_temperature=1 / transform.temperature,
            softcap=transform.softcap or 0.0,
            logit_scale=transform.logit_scale,
        )
        if needs_workspace and (num_bytes := extension.row_workspace_bytes(launch, rows)):
            workspace = _workspace(logits, num_bytes)  # held by this frame until the call has returned
            launch.use_workspace(workspace.data_ptr(), workspace.numel())
        yield start, rows, launch


@lru_cache(maxsize=16)  # a training run has one or two rules, and each has 14 fields to convert
def _pack_rule(rule: LossRule, extension: ModuleType) -> Any:
    """Return the rule as a ``LossRule`` of the extension."""
    return extension.LossRule(**rule._asdict(), max_log_ratio=MAX_LOG_RATIO, max_kl_log_ratio=MAX_KL_LOG_RATIO)


def _contiguous(terms: TokenTerms, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Return the terms as kernels read them: contiguous, of the statistics' dtype or bool."""
    return {
        name: None if value is None else (value if value.dtype is torch.bool else value.to(dtype)).contiguous()
        for name, value in terms._asdict().items()
    }


def _pack_terms(terms: dict[str, Tensor | None], start: int = 0) -> Any:
    """Return the terms from token ``start`` on."""
    return _extension.load().TokenTensors(**{name: _address(value, start) for name, value in terms.items()})


def _address(tensor: Tensor | None, start: int = 0) -> int:
    """Return the address of a contiguous tensor from element ``start`` on (a scalar's own), or 0 for an absent one."""
    if tensor is None:
        return 0
    return tensor.data_ptr() + (start * tensor.element_size() if start and tensor.dim() else 0)


def _launch(like: Tensor) -> Any:
    """Return where a call on such tensors runs: ``CpuLaunch`` or ``CudaLaunch``."""
    if like.is_cpu:
        return _extension.load().CpuLaunch(threads=torch.get_num_threads())
    stream = torch.cuda.current_stream(like.device).cuda_stream
    return _extension.load().CudaLaunch(device=like.device.index, stream=stream)


def _workspace(like: Tensor, num_bytes: int) -> Tensor:
    """Return scratch memory; once freed, torch reuses it only for later work of the same stream."""
    return torch.empty(num_bytes, dtype=torch.uint8, device=like.device)
