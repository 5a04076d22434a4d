"""The machine's limits, measured by PyTorch's own loops and products: the floors that times are compared with."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.harness import Result, Run, name_of

SQUARE = 2048  # rows and columns of the square product
SQUARE_PRODUCT, THREE_PRODUCTS = f"square product, {SQUARE:,}", "3 products"
SQUARE_FLOPS = 2 * SQUARE**3
PROBE_SECONDS = 0.2


def bandwidth(buffer: Tensor) -> dict[str, Run]:
    """Return a pure read of ``buffer``, an in-place read-write of it, and one after the other.

    Its bytes are read as float32 whatever its dtype: PyTorch's loops over 16-bit numbers convert, and are slower.
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
    """Return a first write to fresh memory."""
    return {"first touch": Run(lambda: torch.empty(num_bytes // 4).fill_(1.0), own_bytes=num_bytes)}


def products(hidden: Tensor, weight: Tensor) -> dict[str, Run]:
    """Return the head's three products, logits, d hidden and d weight, into outputs allocated beforehand.

    For 16-bit inputs also in float32, which is several times faster on a CPU without 16-bit instructions.
    """
    return {
        f"{THREE_PRODUCTS}{'' if dtype == hidden.dtype else ', ' + name_of(dtype)}": _three(
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
    return {SQUARE_PRODUCT: Run(lambda: torch.mm(a, b, out=out))}


def too_slow(flops: Mapping[str, float], dtype: torch.dtype, max_seconds: float | None) -> dict[str, str]:
    """Return what to leave out and why: whose products alone would take longer than ``max_seconds`` (None: nothing).

    A CPU without instructions for bfloat16 multiplies it a hundred times slower than float32.
    """
    if max_seconds is None or not flops:
        return {}
    rate = _product_rate(dtype, enough=max(flops.values()) / max_seconds)
    return {
        work: f"{count / rate:.1f} s for its products alone, {name_of(dtype)} at {rate / 1e9:.1f} GF/s"
        for work, count in flops.items()
        if count / rate > max_seconds
    }


def _product_rate(dtype: torch.dtype, enough: float) -> float:
    """Return flops/s of a square product: of a small one, or of larger ones until it is ``enough`` or takes a while.

    A small product alone would not do: where other processes want the cores, starting the threads can take most of it.
    """
    rate = 0.0
    for size in (256, 512, 1024, 2048):
        a, b, out = (torch.ones(size, size, dtype=dtype) for _ in range(3))
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        seconds = time.perf_counter() - start
        rate = max(rate, 2 * size**3 / seconds)
        if rate >= enough or seconds > PROBE_SECONDS:
            break
    return rate


def rates(limits: dict[str, Result], num_bytes: int = 0, num_flops: float = 0) -> dict[str, Result]:
    """Add GB/s (bytes read plus bytes written) or GF/s to the times of limits; ``num_flops`` are three products'."""
    moved = {"read": 1, "in-place read-write": 2, "read, then in-place read-write": 3, "first touch": 1}
    for name, row in limits.items():
        if "median_ms" not in row:
            continue
        row.pop("extra_bytes")  # their memory is allocated beforehand, or is what they measure
        if name in moved:
            row["gigabytes_per_second"] = moved[name] * num_bytes / row["median_ms"] / 1e6
        if "product" in name:
            flops = SQUARE_FLOPS if name == SQUARE_PRODUCT else num_flops
            row["gigaflops"] = flops / row["median_ms"] / 1e6
    return limits
