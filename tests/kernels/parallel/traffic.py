"""What the cases share: random tensors, comparisons to rounding, counted collectives, expected errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from edge_kernels.parallel import agreement

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 3.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def close(actual: Tensor, expected: Tensor, name: str, dtype: torch.dtype | None = None) -> None:
    """To rounding, of the largest magnitude of the expected values; special values in the same places."""
    assert actual.dtype == expected.dtype, name
    assert actual.shape == expected.shape, name
    finite = expected[expected.isfinite()]
    scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    tolerance = TOLERANCE[dtype or expected.dtype] * scale
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, equal_nan=True, msg=lambda m: f"{name}: {m}")


class Traffic(TorchDispatchMode):
    """The collectives that this process takes part in: their names, and the bytes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [value for value in tree_leaves(args[0]) if isinstance(value, Tensor)]
            self.seen.append((func._schema.name.split("::")[1], sum(value.nbytes for value in tensors)))
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(*expected: tuple[str, int]) -> Iterator[None]:
    with Traffic() as traffic:
        yield
    assert traffic.seen == list(expected), traffic.seen


@contextmanager
def without_reading() -> Iterator[None]:
    """As on a GPU, where no value is read if that can be helped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "reads", lambda device: False)
        yield


def refuses(words: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match=re.escape(words)):
        function(*arguments, **options)
