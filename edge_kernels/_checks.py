"""Argument checks that the ops share: shapes and dtypes of tensors, and targets in range.

What a configuration contains is checked by the configuration itself, in ``config.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

IGNORE_INDEX = -100  # F.cross_entropy's default, and what the losses put where no loss is taken


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics and of their gradients: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def describe(value: object) -> str:
    """Return a tensor's dtype and shape, or the type of what is not one, for an error message."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__


def check_float(name: str, value: object, *, least_dims: int, may_be_empty: bool = False) -> None:
    """Require a floating-point tensor of a supported dtype with enough dimensions and a last one that is not empty."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {describe(value)}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64; got {describe(value)}; convert it with .float()"
        )
    if value.dim() < least_dims:
        raise ValueError(f"{name} must have at least {least_dims} dimension(s); got {describe(value)}")
    if not may_be_empty and value.shape[-1] == 0:
        raise ValueError(f"the last dimension of {name} must not be empty; got {describe(value)}")


def check_like(
    name: str, value: object, shapes: Mapping[str, tuple[int, ...]], dtype: str, like: Tensor, *, remedy: str
) -> None:
    """Require a tensor of one of ``shapes`` (by their symbolic name) and of a kind of dtype, on the device of ``like``.

    ``dtype`` is "bool", "int64" or "floating point".
    """
    kind_is_right = isinstance(value, Tensor) and (
        value.is_floating_point() if dtype == "floating point" else value.dtype == getattr(torch, dtype)
    )
    if not isinstance(value, Tensor) or not kind_is_right:
        raise TypeError(f"{name} must be {dtype} with shape {_either(shapes)}; got {describe(value)}; {remedy}")
    if not any(value.shape == shape for shape in shapes.values()):
        raise ValueError(f"{name} must be {dtype} with shape {_either(shapes)}; got {describe(value)}; {remedy}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}; got {value.device}; move it with .to({str(like.device)!r})")


def _either(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return " or ".join(f"{symbol} = {shape}" for symbol, shape in shapes.items())


def check_finite(name: str, value: Tensor, counts: Tensor | None = None, *, remedy: str) -> None:
    """Refuse NaN and infinity, where ``counts`` (a mask, None for everywhere) holds. Reads the values.

    Only of an ordinary tensor on a CPU: on a GPU it would wait for all work queued before, and compiled code cannot
    decide by a value. There such a number goes on into whatever is computed from it.
    """
    if value.device.type != "cpu" or torch.compiler.is_compiling() or type(value) is not Tensor:
        return
    wrong = ~value.detach().isfinite()
    if counts is not None:
        wrong = wrong & counts
    if bool(wrong.any()):
        position = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(f"{name} must be finite; got {float(value[position])} at {position}; {remedy}")


def check_temperature(temperature: Any, count: int) -> Any:
    """Return a positive number as it is, a tensor of ``count`` in float64 on the CPU."""
    if not isinstance(temperature, Tensor):
        return temperature
    if temperature.dim() == 0 or not temperature.is_floating_point() or temperature.shape != (count,):
        raise ValueError(
            f"temperature must be a number, or floating point with shape (B,) = ({count},); got "
            f"{describe(temperature)}; pass one per entry of the first dimension"
        )
    values = temperature.detach().to(device="cpu", dtype=torch.float64)
    if not torch.compiler.is_compiling() and not bool(((values > 0) & values.isfinite()).all()):
        raise ValueError(f"temperature must be finite and greater than 0; got {values.tolist()}")
    return values


def check_transform(temperature: Any, softcap: float | None) -> None:
    """Require a positive temperature and a positive soft cap, or none."""
    if not isinstance(temperature, Tensor) and not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number greater than 0; got {temperature!r}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be a number greater than 0, or None; got {softcap!r}")


def check_targets_in_range(targets: Tensor, vocab: int, ignore_index: int) -> None:
    """Require every target to index the vocabulary or to be ``ignore_index``. Reads the values: for use inside ops.

    Not on a GPU, where reading them would wait for all work queued before: there such a target has logprob NaN.
    """
    if targets.device.type == "cuda":
        return
    wrong = ((targets < 0) | (targets >= vocab)) & (targets != ignore_index)
    if bool(wrong.any()):
        position = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"targets must lie in [0, V) = [0, {vocab}) or equal ignore_index = {ignore_index}; got "
            f"{int(targets[position])} at {position}; check that the tokenizer belongs to the model"
        )
