"""Matrices of logits in memory that holds more, the devices that see them, and the comparison with float64.

Every output starts as NaN, and so does what lies between the rows of a matrix with a stride, and around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cuda_on_cpu.harness import Buffer, Call, Device

IGNORED = -100
NAN, INF = float("nan"), float("inf")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

HUGE = 2**31  # a stride from which on the memory between rows is not filled

# One row over many blocks; whole rows, one block after the other; whole rows of which shared memory holds all, or a
# part, or nothing.
MANY = Device(multiprocessors=64)
ONE = Device(multiprocessors=1)
KEEPS_ALL = Device(multiprocessors=1, shared_bytes_per_block=160 << 10, shared_bytes_per_multiprocessor=160 << 10)
KEEPS_SOME = Device(multiprocessors=1, shared_bytes_per_block=12 << 10, shared_bytes_per_multiprocessor=16 << 10)
KEEPS_NONE = Device(multiprocessors=1, shared_bytes_per_block=1 << 10, shared_bytes_per_multiprocessor=16 << 10)
CACHELESS = replace(KEEPS_SOME, l2_bytes=0)  # the hints for matrices that exceed the cache, and no split of the rest


@dataclass
class Case:
    name: str
    call: Call
    check: Callable[[dict[str, Tensor]], None]  # of the buffers after the call
    dtype: torch.dtype | None = None  # of the logits


@dataclass
class Matrix:
    """Logits (rows, V) in memory that holds more: ``offset`` elements before, ``stride`` from row to row."""

    logits: Tensor
    targets: Tensor | None
    stride: int
    offset: int
    transform: dict[str, Any]
    ignore_index: int = IGNORED

    @property
    def exact(self) -> Tensor:
        return self.logits.double()

    def buffer(self, *, filled: bool = True, stride: int | None = None, offset: int | None = None) -> Buffer:
        """Return the memory, with NaN wherever no logit is."""
        stride = self.stride if stride is None else stride
        offset = self.offset if offset is None else offset
        rows, vocab = self.logits.shape
        if stride >= HUGE:
            content = self.logits if filled else torch.full_like(self.logits, NAN)
            return Buffer(content, spread=stride * self.logits.element_size())
        memory = torch.full((max(0, (rows - 1) * stride + vocab),), NAN, dtype=self.logits.dtype)
        for i, row in enumerate(self.logits if filled else []):
            memory[i * stride : i * stride + vocab] = row
        return Buffer(memory, offset * self.logits.element_size())

    def rows_of(self, memory: Tensor, stride: int | None = None) -> Tensor:
        """Return the matrix in such memory, and check that between its rows nothing was written."""
        stride = self.stride if stride is None else stride
        if stride >= HUGE:
            return memory
        rows, vocab = self.logits.shape
        matrix = memory.as_strided((rows, vocab), (stride, 1)).clone()
        rest = memory.clone()
        rest.as_strided((rows, vocab), (stride, 1)).fill_(NAN)
        assert rest.isnan().all(), "written between the rows"
        return matrix

    def integers(self) -> list[int]:
        return [DTYPES[self.logits.dtype], self.stride, *self.logits.shape, self.ignore_index]

    def numbers(self) -> list[float]:
        softcap = self.transform["softcap"] or 0.0
        return [1 / self.transform["temperature"], softcap, self.transform["logit_scale"]]

    def reference(self) -> dict[str, Any]:
        return {**self.transform, "ignore_index": self.ignore_index}


def matrix(
    dtype: torch.dtype,
    rows: int,
    vocab: int,
    *,
    seed: int,
    stride: int | None = None,
    offset: int = 0,
    scale: float = 4.0,
    shift: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    targets: bool = True,
) -> Matrix:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * scale + shift).to(dtype)
    chosen = torch.randint(vocab, (rows,), generator=generator) if targets else None
    transform = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    return Matrix(logits, chosen, vocab if stride is None else stride, offset, transform)


def special(dtype: torch.dtype, vocab: int, *, seed: int = 0, **options: Any) -> Matrix:
    """Rows that each have something: forbidden tokens, a forbidden target, NaN, infinity, certainty, no row at all."""
    out = matrix(dtype, 12, vocab, seed=seed, **options)
    assert out.targets is not None
    x, targets = out.logits, out.targets
    x[0, ::3] = -INF
    targets[0] = 1
    x[1] = -INF  # nothing is allowed
    x[2] = -INF
    x[2, vocab // 2] = 1.0  # one token is
    targets[2] = vocab // 2
    targets[3] = IGNORED
    x[3] = NAN
    x[4, vocab - 1] = NAN
    x[5, vocab // 3] = INF
    x[6] = -1e4 if dtype != torch.float16 else -1e3
    x[6, 0] = 1e4 if dtype != torch.float16 else 1e3  # one-hot
    targets[6] = 0
    x[7] = 0.0  # uniform
    x[8, 5] = -INF
    targets[8] = 5
    targets[9] = vocab  # out of range, as row 10's
    targets[10] = -1
    x[11] = x[11, 0]
    return out


def some(number: int, seed: int) -> Tensor:
    return torch.randn(number, generator=torch.Generator().manual_seed(seed))


def fresh(*shape: int, dtype: torch.dtype = torch.float32) -> Buffer:
    return Buffer(torch.full(shape, NAN, dtype=dtype))


def per_row(tensor: Tensor | None) -> Buffer | None:
    return None if tensor is None else Buffer(tensor)


def repeated(dtype: torch.dtype, rows: int, vocab: int) -> Matrix:
    given = matrix(dtype, rows, vocab, seed=9, stride=0)
    given.logits[:] = given.logits[-1]
    return given


def close(actual: Tensor, exact: Tensor, *, rtol: float, atol: float | Tensor, name: str) -> None:
    """Compare in float64, NaN with NaN and infinities with themselves."""
    actual, exact = actual.double(), exact.double()
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}"
    same_special = torch.where(exact.isnan(), actual.isnan(), actual == exact)
    is_close = (actual - exact).abs() <= atol + rtol * exact.abs()
    fine = torch.where(exact.isfinite(), is_close, same_special)
    if not fine.all():
        at = tuple(int(i) for i in (~fine).nonzero()[0])
        count = int((~fine).sum())
        raise AssertionError(
            f"{name}: {count} of {fine.numel()} wrong, first at {at}: {actual[at].item()} for {exact[at].item()}"
        )
