"""Rows of logits as kernels take them: blocks with one row stride, and the addresses of what belongs to each row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from edge_kernels.contract import LossRule, Transform
from edge_kernels.reference import MAX_LOG_RATIO

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def with_unit_stride(logits: Tensor) -> Tensor:
    """Return the logits, copied only if a row's elements are not next to each other."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def row_blocks(logits: Tensor, start: int = 0, like: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
    """Yield (number of the first row, (rows, V) view) of blocks with one row stride each, without copying.

    ``logits[:, :-1]`` of (B, T, V) is B such blocks: its sequences do not follow each other. ``like`` gives another
    tensor's division into blocks.
    """
    like = logits if like is None else like
    if like.numel() == 0:
        return
    if like.dim() == 1:
        yield start, logits[None]
    elif like.dim() == 2:
        yield start, logits
    elif _is_one_block(like):
        yield start, logits.view(-1, logits.shape[-1])
    else:
        rows = like[0, ..., 0].numel()
        for i in range(like.shape[0]):
            yield from row_blocks(logits[i], start + i * rows, like[i])


def _is_one_block(logits: Tensor) -> bool:
    try:
        logits.view(-1, logits.shape[-1])
    except RuntimeError:
        return False
    return True


def describe_rows(block: Tensor, targets: Tensor | None, start: int) -> dict[str, Any]:
    return {
        "dtype": DTYPE_CODES[block.dtype],
        "logits": block.data_ptr(),
        "row_stride": block.stride(0),
        "rows": block.shape[0],
        "vocab": block.shape[1],
        "targets": address(targets, start),
    }


def address(tensor: Tensor | None, start: int = 0) -> int:
    """Return the address of row ``start`` of a contiguous per-row tensor, or 0 for an absent one."""
    return 0 if tensor is None else tensor.data_ptr() + start * tensor.element_size()


def transform_options(transform: Transform) -> dict[str, Any]:
    """Return the transform as the compiled kernels take it."""
    return {
        "inv_temperature": 1 / transform.temperature,
        "softcap": transform.softcap or 0.0,
        "logit_scale": transform.logit_scale,
        "ignore_index": transform.ignore_index,
    }


def rule_options(rule: LossRule) -> dict[str, Any]:
    """Return the rule as the compiled kernels take it; ratios of whole sequences are not among it."""
    options = rule._asdict()
    del options["ratio_of_sequence"], options["sampler_of_sequence"]
    cispo, treatment = bool(options.pop("objective")), int(options.pop("injected"))
    return {**options, "cispo": cispo, "injected_treatment": treatment, "max_log_ratio": MAX_LOG_RATIO}
