"""What the machine allows, by PyTorch's own loops and products: the floors that times are held against."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness import Result, Run

SQUARE = 2048  # rows and columns of the square product


def bandwidth(buffer: Tensor) -> dict[str, Run]:
    """A pure read of ``buffer``, an in-place read-write of it, and one after the other.

    Its bytes are taken as float32 whatever they mean: PyTorch's loops over 16-bit numbers convert, and are slower.
    """
    words = buffer.view(-1).view(torch.uint8)[: buffer.nbytes // 4 * 4].view(torch.float32)

    def read_then_update() -> None:
        words.sum()
        words.mul_(1.0000001)

    return {
        "read": Run(words.sum),
        "in-place read-write": Run(lambda: words.mul_(1.0000001)),
        "read, then in-place read-write": Run(read_then_update),
    }


def first_touch(num_bytes: int) -> dict[str, Run]:
    """Fresh memory, written once."""
    return {"first touch": Run(lambda: torch.empty(num_bytes // 4).fill_(1.0), own_bytes=num_bytes)}


def products(hidden: Tensor, weight: Tensor) -> dict[str, Run]:
    """The head's three products, logits, d hidden and d weight, into outputs allocated beforehand.

    For 16-bit inputs the same in float32 too: a machine without instructions for them does those several times faster.
    """
    return {
        f"3 products{'' if dtype == hidden.dtype else ', ' + str(dtype).removeprefix('torch.')}": _three(
            hidden.detach().to(dtype), weight.detach().to(dtype)
        )
        for dtype in dict.fromkeys((hidden.dtype, torch.float32))
    }


def _three(hidden: Tensor, weight: Tensor) -> Run:
    logits = torch.zeros(len(hidden), len(weight), dtype=hidden.dtype)
    d_hidden, d_weight = torch.zeros_like(hidden), torch.zeros_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.t(), hidden, out=d_weight)

    return Run(run)


def square_product(dtype: torch.dtype) -> dict[str, Run]:
    a, b, out = (torch.ones(SQUARE, SQUARE, dtype=dtype) for _ in range(3))
    return {f"square product, {SQUARE:,}": Run(lambda: torch.mm(a, b, out=out))}


def rates(limits: dict[str, Result], num_bytes: int = 0, num_flops: float = 0) -> dict[str, Result]:
    """Add GB/s (bytes read plus bytes written) or GF/s to the times of limits; ``num_flops`` are three products'."""
    moved = {"read": 1, "in-place read-write": 2, "read, then in-place read-write": 3, "first touch": 1}
    for name, row in limits.items():
        if "median_ms" not in row:
            continue
        row.pop("extra_bytes")  # their memory is allocated beforehand, or all they are about
        if name in moved:
            row["gigabytes_per_second"] = moved[name] * num_bytes / row["median_ms"] / 1e6
        if "product" in name:
            flops = 2 * SQUARE**3 if name.startswith("square") else num_flops
            row["gigaflops"] = flops / row["median_ms"] / 1e6
    return limits
