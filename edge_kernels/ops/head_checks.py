"""What the arguments of an op with a head must be: hidden states, weight, bias, a low-rank part, a memory budget."""

from __future__ import annotations

import torch
from torch import Tensor

from edge_kernels._checks import check_float, check_like, describe

LowRank = tuple[Tensor, Tensor]  # states (..., r) and factor (V, r) of a part of the logits, states @ factor.T


@torch.compiler.assume_constant_result  # torch.compile of torch 2.9 does not trace what it calls
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, may_be_empty: bool = False) -> torch.dtype:
    """Require hidden states, weight and bias to fit together; return the dtype of their products.

    ``may_be_empty``: whether the weight may have no rows, as a shard of one.
    """
    check_float("hidden", hidden, least_dims=2)
    check_float("weight", weight, least_dims=2)
    V, D = weight.shape[0], hidden.shape[-1]
    remedy = "pass the LM head's weight and bias, as nn.Linear holds them"
    check_like("weight", weight, {"(V, D)": (V, D)}, "floating point", hidden, remedy=remedy)
    if V == 0 and not may_be_empty:
        raise ValueError(f"weight must have at least one row, V >= 1; got {describe(weight)}; {remedy}")
    if bias is not None:
        check_like("bias", bias, {"(V,)": (V,)}, "floating point", hidden, remedy=remedy)
    device = hidden.device.type
    autocasts = _has_autocast(device) and torch.is_autocast_enabled(device)
    if autocasts and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(
                f"{name} must have the dtype of hidden, {hidden.dtype}; got {tensor.dtype}; "
                + ("convert one of them" if autocasts else "convert one of them, or run under torch.autocast")
            )
    return hidden.dtype


def check_low_rank(low_rank: LowRank | None, hidden: Tensor, weight: Tensor) -> None:
    """Require the two factors of a low-rank part to fit to hidden states and weight."""
    if low_rank is None:
        return
    remedy = "pass low_rank=(states, factor) with logits += states @ factor.T"
    if not isinstance(low_rank, tuple) or len(low_rank) != 2:
        raise TypeError(f"low_rank must be a pair of tensors; got {describe(low_rank)}; {remedy}")
    states, factor = low_rank
    check_float("low_rank[1]", factor, least_dims=2)
    V, r = weight.shape[0], factor.shape[-1]
    check_like("low_rank[1]", factor, {"(V, r)": (V, r)}, "floating point", hidden, remedy=remedy)
    shape = (*hidden.shape[:-1], r)
    check_like("low_rank[0]", states, {"(*hidden.shape[:-1], r)": shape}, "floating point", hidden, remedy=remedy)


def check_memory_budget(memory_budget: int | None) -> int:
    """Require a positive number of bytes or None; return it as an op's argument, 0 for None."""
    if memory_budget is None:
        return 0
    is_number = isinstance(memory_budget, int | torch.SymInt) and not isinstance(memory_budget, bool)
    if not is_number or memory_budget <= 0:
        raise ValueError(f"memory_budget must be a positive number of bytes; got {memory_budget!r}; or leave it out")
    return memory_budget
