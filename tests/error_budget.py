"""How exact a kernel has to be: no worse than plain PyTorch in the same dtype against float64, plus a tolerance."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_budget(actual: Tensor, plain: Tensor, exact: Tensor, *, tolerance: float, name: str = "") -> None:
    """Compare two results with the exact one: NaN and infinities in the same places, errors by the budget.

    ``tolerance`` is relative to the largest finite magnitude of the exact result, and at least absolute.
    """
    actual, plain, exact = actual.detach().double(), plain.detach().double(), exact.detach().double()
    finite = exact.isfinite()
    torch.testing.assert_close(actual[~finite], exact[~finite], equal_nan=True, msg=f"{name}: special values differ")
    if not finite.any():
        return
    scale = max(1.0, exact[finite].abs().max().item())
    error = (actual - exact)[finite].abs().max().item()
    allowed = (plain - exact)[finite].abs().nan_to_num(nan=0.0, posinf=0.0).max().item() + tolerance * scale
    assert error <= allowed, f"{name}: error {error:.3g} exceeds the budget {allowed:.3g}"
