"""Rows of logits as kernels take them: blocks with one row stride."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


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
