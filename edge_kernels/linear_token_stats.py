"""Token statistics from hidden states and the LM head's weight: logits exist as one tile of some rows by V at a time.

Here live the tiles, which the one-sweep loss in grpo_loss.py walks too, and the op on top of them. What happens inside
a tile is token_stats.py's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edge_kernels._checks import (
    IGNORE_INDEX,
    check_float,
    check_like,
    check_targets_in_range,
    check_transform,
    describe,
    stats_dtype,
)
from edge_kernels.token_stats import (
    KernelStats,
    StatsGradients,
    Transform,
    refuse_second_derivative,
    run_backward,
    run_forward,
)
from edge_kernels.types import TokenStats

# The logits of one tile take at most this many bytes, counted in float32 at least: a CPU without 16-bit products
# converts the tile to multiply it. Each tile reads the whole weight, so fewer rows cost bandwidth: V = 151,936 leaves
# 110 rows, at which the products are still bound by arithmetic.
TILE_BYTES = 64 * 2**20

# --- tiles ------------------------------------------------------------------------------------------------------------


class Head(NamedTuple):
    """The linear map whose outputs are logits, in the dtype of its products."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)

    @classmethod
    def cast(cls, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Head:
        return cls(weight.to(dtype), None if bias is None else bias.to(dtype))


class Tile(NamedTuple):
    """Some rows of the batch. ``logits`` is a buffer that the next tile uses again; the gradient may overwrite it."""

    rows: Tensor  # (n,), int64: where the tile's rows stand in the batch
    hidden: Tensor  # (n, D)
    logits: Tensor  # (n, V)


def tiles(hidden: Tensor, head: Head, active: Tensor) -> Iterator[Tile]:
    """Yield the rows of ``hidden`` (N, D) where ``active`` (N,) holds, in equal tiles; others are not touched."""
    rows = active.nonzero()[:, 0]
    if len(rows) == 0:
        return
    vocab = head.weight.shape[0]
    most = max(1, TILE_BYTES // (vocab * max(4, head.weight.element_size())))
    size = -(-len(rows) // -(-len(rows) // most))  # the fewest tiles, then as even as they come
    buffer = head.weight.new_empty(size, vocab)
    for tile_rows in rows.split(size):
        tile_hidden = hidden[tile_rows].to(head.weight.dtype)
        logits = buffer[: len(tile_rows)]
        if head.bias is None:
            torch.mm(tile_hidden, head.weight.t(), out=logits)
        else:
            torch.addmm(head.bias, tile_hidden, head.weight.t(), out=logits)
        yield Tile(tile_rows, tile_hidden, logits)


class HeadGradient:
    """Gradients of hidden states, weight and bias, summed over tiles, in float32 at least.

    What is not wanted costs nothing and comes out as an empty tensor, which is how an op returns "none".
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, wanted: tuple[bool, bool, bool]
    ) -> None:
        self._inputs = (hidden, weight, weight if bias is None else bias)
        self._head = head
        sums = stats_dtype(head.weight.dtype)
        self._hidden = torch.zeros_like(hidden) if wanted[0] else None
        # Not zeroed: the first tile writes it, so that its pages are touched once less.
        self._weight = weight.new_empty(weight.shape, dtype=sums) if wanted[1] else None
        self._bias = weight.new_zeros(weight.shape[0], dtype=sums) if wanted[2] else None
        self._is_first = True

    def add(self, tile: Tile, grad_logits: Tensor) -> None:
        """Add a tile's part: two matrix products. A tile whose gradient was 0 throughout need not be added."""
        if self._hidden is not None:
            self._hidden[tile.rows] = torch.mm(grad_logits, self._head.weight).to(self._hidden.dtype)
        if self._bias is not None:
            self._bias += grad_logits.sum(0, dtype=self._bias.dtype)
        if self._weight is not None:
            self._add_to_weight(self._weight, grad_logits.t(), tile.hidden)
        self._is_first = False

    def _add_to_weight(self, total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
        if total.dtype == hidden.dtype:
            total.addmm_(grad_logits, hidden, beta=0 if self._is_first else 1)
            return
        # The product comes out in 16 bits; a block of it at a time keeps that from being another whole weight.
        block = max(1, TILE_BYTES // (hidden.shape[1] * total.element_size()))
        for part, grad_part in zip(total.split(block), grad_logits.split(block), strict=True):
            product = torch.mm(grad_part, hidden)
            if self._is_first:
                part.copy_(product)
            else:
                part += product

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of hidden states, weight and bias in the dtypes of these."""
        if self._is_first and self._weight is not None:
            self._weight.zero_()
        parts = zip((self._hidden, self._weight, self._bias), self._inputs, strict=True)
        hidden, weight, bias = (like.new_empty(0) if part is None else part.to(like.dtype) for part, like in parts)
        return hidden, weight, bias


def fake_head_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``HeadGradient.result`` would, without values."""
    inputs = (hidden, weight, weight[:, 0] if bias is None else bias)
    like = tuple(t.new_empty(t.shape) if w else t.new_empty(0) for t, w in zip(inputs, wanted, strict=True))
    return like[0], like[1], like[2]


def none_if_unwanted(
    gradients: tuple[Tensor, ...], wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    hidden, weight, bias = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    return hidden, weight, bias


# --- ops --------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("edge_kernels::linear_token_stats", mutates_args=())
def linear_token_stats_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    dtype: torch.dtype,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_targets_in_range(targets, weight.shape[0], ignore_index)
    transform = Transform(temperature, softcap, logit_scale, ignore_index)
    out = KernelStats(*(torch.zeros_like(targets, dtype=stats_dtype(dtype)) for _ in KernelStats._fields))
    for tile in tiles(hidden, Head.cast(weight, bias, dtype), targets != ignore_index):
        for whole, part in zip(out, run_forward(tile.logits, targets[tile.rows], transform), strict=True):
            whole[tile.rows] = part
    return out


@linear_token_stats_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b, c, d = (torch.empty_like(targets, dtype=stats_dtype(dtype)) for _ in KernelStats._fields)
    return a, b, c, d


@torch.library.custom_op("edge_kernels::linear_token_stats_backward", mutates_args=())
def linear_token_stats_backward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    entropy: Tensor,
    logsumexp: Tensor,
    logsumexp_low: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logsumexp: Tensor | None,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    dtype: torch.dtype,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    transform = Transform(temperature, softcap, logit_scale, ignore_index)
    stats = KernelStats(entropy, entropy, logsumexp, logsumexp_low)
    gradients = StatsGradients(grad_logprobs, grad_entropy, grad_logsumexp)
    head = Head.cast(weight, bias, dtype)
    total = HeadGradient(hidden, weight, bias, head, (want_hidden, want_weight, want_bias))
    # Besides ignored rows, those without a gradient are left out: clipped tokens, and groups of equal rewards.
    active = torch.zeros_like(targets, dtype=torch.bool)
    for gradient in gradients:
        if gradient is not None:
            active |= gradient != 0
    for tile in tiles(hidden, head, active & (targets != ignore_index)):
        parts = StatsGradients(*(None if gradient is None else gradient[tile.rows] for gradient in gradients))
        tile_stats = KernelStats(*(value[tile.rows] for value in stats))
        run_backward(tile.logits, targets[tile.rows], tile_stats, parts, transform, out=tile.logits)
        total.add(tile, tile.logits)
    return total.result()


@linear_token_stats_backward_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return fake_head_gradient(hidden, weight, bias, rest[7:10])


linear_token_stats_backward_op.register_autograd(refuse_second_derivative)

# --- autograd ---------------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, *options = inputs
    _, entropy, logsumexp, logsumexp_low = output
    ctx.save_for_backward(hidden, weight, bias, targets, entropy, logsumexp, logsumexp_low)
    ctx.mark_non_differentiable(logsumexp_low)
    ctx.set_materialize_grads(False)
    ctx.options = options


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients: tuple[Tensor | None, ...] = (None, None, None)
    if any(g is not None for g in grads[:3]):
        wanted = tuple(ctx.needs_input_grad[:3])
        gradients = linear_token_stats_backward_op(*ctx.saved_tensors, *grads[:3], *wanted, *ctx.options)
        gradients = none_if_unwanted(gradients, wanted)  # type: ignore[arg-type]
    return *gradients, None, None, None, None, None, None


linear_token_stats_op.register_autograd(_backward, setup_context=_setup_context)

# --- public -----------------------------------------------------------------------------------------------------------


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
) -> TokenStats:
    """Return ``token_stats(F.linear(hidden, weight, bias), targets, ...)`` without ever holding all the logits.

    hidden   (..., D): float32, bfloat16, float16 or float64.
    weight   (V, D), in the dtype of ``hidden``.
    bias     (V,), in the same dtype, or None.
    targets  (...), int64, in [0, V) or ``ignore_index``: such rows are left out before the first product.

    Options, results and special values as ``token_stats``. Differentiable once in hidden, weight and bias; only what
    requires a gradient is computed. The backward pass makes the logits again, tile by tile (four products in all), for
    the rows that have a gradient. The weight's is summed in float32 for 16-bit inputs.

    Extra memory: one tile of logits (``TILE_BYTES``, 64 MiB) and O(N). Products are in the inputs' dtype; under
    autocast in autocast's, as ``F.linear``, and the gradient of a float32 weight then stays float32 throughout. Raises
    TypeError or ValueError for wrong dtypes, shapes and targets.
    """
    dtype = check_head(hidden, weight, bias)
    remedy = "pass one token id per row of hidden"
    check_like("targets", targets, {"hidden.shape[:-1]": tuple(hidden.shape[:-1])}, "int64", hidden, remedy=remedy)
    check_transform(temperature, softcap)
    options = (dtype, temperature, softcap, logit_scale, ignore_index)
    stats = linear_token_stats_op(hidden.flatten(0, -2), weight, bias, targets.flatten(), *options)
    return TokenStats(*(value.view(targets.shape) for value in stats[:3]))


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """Require hidden states, weight and bias to fit together; return the dtype of their products."""
    check_float("hidden", hidden, least_dims=2)
    check_float("weight", weight, least_dims=2)
    V, D = weight.shape[0], hidden.shape[-1]
    remedy = "pass the LM head's weight and bias, as nn.Linear holds them"
    check_like("weight", weight, {"(V, D)": (V, D)}, "floating point", hidden, remedy=remedy)
    if V == 0:
        raise ValueError(f"weight must have at least one row, V >= 1; got {describe(weight)}; {remedy}")
    if bias is not None:
        check_like("bias", bias, {"(V,)": (V,)}, "floating point", hidden, remedy=remedy)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(
                f"{name} must have the dtype of hidden, {hidden.dtype}; got {tensor.dtype}; "
                "convert one of them, or run under torch.autocast"
            )
    return hidden.dtype
