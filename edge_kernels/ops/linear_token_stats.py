"""Token statistics from hidden states and the LM head's weight: logits exist as one tile of some rows by V at a time.

Here live the head's matrix products and tiles, which the one-sweep loss in linear_grpo_loss.py walks too, and the op on
top of them. What happens inside a tile is token_stats.py's.
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
from edge_kernels.backend import extension, fused_head, get_backend, unavailable
from edge_kernels.memory import fresh, grad_to_add_to
from edge_kernels.ops.token_stats import (
    KernelStats,
    StatsGradients,
    Transform,
    refuse_second_derivative,
    run_backward,
    run_forward,
)
from edge_kernels.types import TokenStats

# The logits of one tile take at most this many bytes. Each tile reads the whole weight and reads and writes its whole
# gradient, so that fewer rows leave the cores waiting for memory: with V = 151,936 this is 276 rows in bfloat16 and 138
# in float32, on which three products run at 0.9 of the rate that 512 rows reach. More rows would gain that tenth at
# most, and cost the memory that the op exists to save.
TILE_BYTES = 80 * 2**20

# Where the weight's elements must be converted for a product, this many bytes of it exist converted: they stay in cache
# until the product has read them.
BLOCK_BYTES = 8 * 2**20

# --- products ---------------------------------------------------------------------------------------------------------


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return what products of ``dtype`` are computed in: a CPU without bfloat16 instructions emulates them slowly.

    There float32 products of blocks converted on the fly are several times faster, and the logits are not rounded.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    is_native = dtype == torch.bfloat16 and unavailable("cpu") is None and extension().cpu_features().get("avx512bf16")
    return dtype if is_native else torch.float32


class Head:
    """The linear map whose outputs are logits: weight (V, D), bias (V,) or None; products in the dtype ``products``."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.products = product_dtype(dtype, weight.device)
        self._weight = weight
        self._bias = None if bias is None else self.convert(bias)
        self._block: Tensor | None = None

    def convert(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.products)

    def columns(self) -> list[slice]:
        """Return the parts of the vocabulary whose weight is converted at a time: one, where nothing is."""
        V, D = self._weight.shape
        if self._weight.dtype == self.products:
            return [slice(0, V)]
        return self.blocks(max(1, BLOCK_BYTES // (D * self.products.itemsize)))

    def blocks(self, size: int) -> list[slice]:
        V = self._weight.shape[0]
        return [slice(start, min(start + size, V)) for start in range(0, V, size)]

    def part(self, columns: slice) -> Tensor:
        """Return the weight of some columns of the logits as the products take it; valid until the next call."""
        part = self._weight[columns]
        if part.dtype == self.products:
            return part
        if self._block is None or len(part) > len(self._block):
            self._block = torch.empty(part.shape, dtype=self.products, device=part.device)
        return self._block[: len(part)].copy_(part)

    def multiply(self, hidden: Tensor, out: Tensor, columns: slice | None = None) -> None:
        """Write the logits (n, V) of ``hidden`` (n, D), or those of one block of columns, into ``out``."""
        for part in self.columns() if columns is None else [columns]:
            target = out[:, part] if columns is None else out
            if self._bias is None:
                torch.mm(hidden, self.part(part).t(), out=target)
            else:
                torch.addmm(self._bias[part], hidden, self.part(part).t(), out=target)


# --- tiles ------------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """Some rows of the batch. ``logits`` is a buffer that the next tile uses again; the gradient may overwrite it."""

    rows: Tensor  # (n,), int64: where the tile's rows stand in the batch
    hidden: Tensor  # (n, D)
    logits: Tensor  # (n, V)


def rows_per_tile(weight: Tensor, products: torch.dtype) -> int:
    return max(1, TILE_BYTES // (weight.shape[0] * products.itemsize))


def tile_buffer(weight: Tensor, head: Head, num_rows: int) -> Tensor:
    """Return memory for the logits of one of the tiles that ``num_rows`` rows take: few, and as even as they come."""
    num_tiles = max(1, -(-num_rows // rows_per_tile(weight, head.products)))
    return fresh((-(-num_rows // num_tiles), weight.shape[0]), weight, head.products)


def tiles(hidden: Tensor, head: Head, active: Tensor, buffer: Tensor) -> Iterator[Tile]:
    """Yield the rows of ``hidden`` (N, D) where ``active`` (N,) holds, in equal tiles; others are not touched.

    The logits of each tile are the first rows of ``buffer``, (n, V).
    """
    rows = active.nonzero()[:, 0]
    if len(rows) == 0:
        return
    num_tiles = -(-len(rows) // len(buffer))
    for tile_rows in rows.split(-(-len(rows) // num_tiles)):
        tile_hidden = head.convert(hidden[tile_rows])
        logits = buffer[: len(tile_rows)]
        head.multiply(tile_hidden, out=logits)
        yield Tile(tile_rows, tile_hidden, logits)


class HeadGradient:
    """Gradients of hidden states, weight and bias, summed over tiles, in float32 at least.

    What is not wanted costs nothing and comes out as an empty tensor, which is how an op returns "none". The weight's
    may be added to a tensor that exists, ``into``, and then comes out as an empty one too.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        wanted: tuple[bool, bool, bool],
        *,
        is_one_tile: bool,
        into: Tensor | None = None,
    ) -> None:
        self._inputs = (hidden, weight, weight if bias is None else bias)
        self._head = head
        self._hidden = torch.zeros_like(hidden) if wanted[0] else None
        self._into = into
        self._weight = into
        if into is None and wanted[1]:
            # Not zeroed: the first tile writes it, so that its pages are touched once.
            sums = weight.dtype if is_one_tile else stats_dtype(weight.dtype)
            self._weight = fresh(weight.shape, weight, sums)
        self._bias = weight.new_zeros(weight.shape[0], dtype=stats_dtype(weight.dtype)) if wanted[2] else None
        self._has_weight = into is not None
        self._block: Tensor | None = None

    def add(self, tile: Tile, scale: Tensor | None = None) -> None:
        """Add the part of a tile whose logits have become their gradient, times a scalar: two matrix products."""
        grad_logits, hidden = tile.logits, tile.hidden
        if self._bias is not None:
            summed = grad_logits.sum(0, dtype=self._bias.dtype)
            self._bias += summed if scale is None else summed * scale
        scaled_hidden = hidden if scale is None else hidden * scale.to(hidden.dtype)
        hidden_part = torch.empty_like(hidden) if self._hidden is not None else None
        for columns in self._head.columns():
            part = grad_logits[:, columns]
            if hidden_part is not None:
                beta = 0 if columns.start == 0 else 1
                torch.addmm(hidden_part, part, self._head.part(columns), beta=beta, out=hidden_part)
            if self._weight is not None:
                self._add_to_weight(self._weight[columns], part.t(), scaled_hidden)
        if self._hidden is not None and hidden_part is not None:
            self._hidden[tile.rows] = (hidden_part if scale is None else hidden_part.mul_(scale)).to(self._hidden.dtype)
        self._has_weight = True

    def _add_to_weight(self, total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
        beta = 1 if self._has_weight else 0
        if total.dtype == hidden.dtype:
            total.addmm_(grad_logits, hidden, beta=beta)
            return
        if self._block is None:  # of the first part, which no other exceeds
            self._block = torch.empty(total.shape, dtype=hidden.dtype, device=total.device)
        block = self._block[: len(total)]
        if block.itemsize < total.itemsize:  # a sum that passed through the block would lose what it is longer for
            torch.mm(grad_logits, hidden, out=block)
            if self._has_weight:
                total += block
            else:
                total.copy_(block)
            return
        if self._has_weight:
            block.copy_(total)
        total.copy_(block.addmm_(grad_logits, hidden, beta=beta))

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of hidden states, weight and bias in the dtypes of these."""
        if not self._has_weight and self._weight is not None:
            self._weight.zero_()
        weight = None if self._into is not None else self._weight
        parts = zip((self._hidden, weight, self._bias), self._inputs, strict=True)
        hidden, weight, bias = (like.new_empty(0) if part is None else part.to(like.dtype) for part, like in parts)
        return hidden, weight, bias


def needs_column_pass(weight: Tensor, products: torch.dtype, num_rows: int) -> bool:
    """Whether the weight's gradient takes a pass of its own, by columns instead of tiles of rows.

    A 16-bit gradient cannot be summed over tiles where it lies without losing digits to each rounding, and a float32
    tensor of its size is more than all other memory together.
    """
    is_short = weight.dtype in (torch.bfloat16, torch.float16)
    return is_short and num_rows > rows_per_tile(weight, products) and get_backend(weight) == "cpu"


def weight_gradient_by_columns(
    hidden: Tensor,  # (N, D)
    weight: Tensor,
    head: Head,
    active: Tensor,  # (N,): rows that have a gradient
    targets: Tensor,
    stats: KernelStats,
    gradients: StatsGradients,
    transform: Transform,
    workspace: Tensor,  # for logits
) -> Tensor:
    """Return the gradient of the weight, each block of its rows summed over the whole batch and written once.

    The logits are made once more, a block of columns at a time: an element's gradient needs its row's statistics only.
    """
    D = weight.shape[1]
    rows = active.nonzero()[:, 0]
    out = fresh(weight.shape, weight)
    width = max(1, BLOCK_BYTES // (D * 4))
    width = min(width, weight.shape[0], max(1, workspace.numel() // 64))  # rather 64 rows than a long block
    height = max(1, workspace.numel() // width)
    workspace = workspace.view(-1)
    sums = torch.empty(width, D, dtype=stats_dtype(head.products), device=weight.device)
    for columns in head.blocks(width):
        num_columns = columns.stop - columns.start
        total = sums[:num_columns].zero_()
        elsewhere = num_columns if transform.ignore_index != num_columns else num_columns + 1
        for chunk in rows.split(height):
            chunk_hidden = head.convert(hidden[chunk])
            logits = workspace[: len(chunk) * num_columns].view(len(chunk), num_columns)
            head.multiply(chunk_hidden, logits, columns)
            in_block = targets[chunk] - columns.start
            in_block = in_block.masked_fill((in_block < 0) | (in_block >= num_columns), elsewhere)
            parts = StatsGradients(*(None if gradient is None else gradient[chunk] for gradient in gradients))
            chunk_stats = KernelStats(*(value[chunk] for value in stats))
            run_backward(logits, in_block, chunk_stats, parts, transform, out=logits)
            if total.dtype == logits.dtype:
                total.addmm_(logits.t(), chunk_hidden)
            else:
                total += torch.mm(logits.t(), chunk_hidden)
        out[columns] = total
    return out


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
    if (fused := fused_head(hidden)) is not None:
        return fused.linear_forward(hidden, weight, bias, targets, dtype, transform)
    out = KernelStats(*(torch.zeros_like(targets, dtype=stats_dtype(dtype)) for _ in KernelStats._fields))
    head, active = Head(weight, bias, dtype), targets != ignore_index
    buffer = tile_buffer(weight, head, int(active.sum()))
    for tile in tiles(hidden, head, active, buffer):
        for whole, part in zip(out, run_forward(tile.logits, targets[tile.rows], transform), strict=True):
            whole[tile.rows] = part
    return out


@linear_token_stats_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b, c, d = (torch.empty_like(targets, dtype=stats_dtype(dtype)) for _ in KernelStats._fields)
    return a, b, c, d


def _backward_of_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    stats: KernelStats,
    gradients: StatsGradients,
    wanted: tuple[bool, bool, bool],
    dtype: torch.dtype,
    transform: Transform,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if (fused := fused_head(hidden)) is not None:
        inputs = (hidden, weight, bias, targets)
        return fused.linear_backward(*inputs, stats, gradients, wanted, dtype, transform, into)
    head = Head(weight, bias, dtype)
    # Besides ignored rows, those without a gradient are left out: clipped tokens, and groups of equal rewards.
    active = torch.zeros_like(targets, dtype=torch.bool)
    for gradient in gradients:
        if gradient is not None:
            active |= gradient != 0
    active &= targets != transform.ignore_index
    num_rows = int(active.sum())
    by_columns = wanted[1] and into is None and needs_column_pass(weight, head.products, num_rows)
    in_tiles = (wanted[0], wanted[1] and not by_columns, wanted[2])
    is_one_tile = num_rows <= rows_per_tile(weight, head.products)
    total = HeadGradient(hidden, weight, bias, head, in_tiles, is_one_tile=is_one_tile, into=into)
    buffer = tile_buffer(weight, head, num_rows)
    for tile in tiles(hidden, head, active, buffer) if any(in_tiles) else ():
        parts = StatsGradients(*(None if gradient is None else gradient[tile.rows] for gradient in gradients))
        tile_stats = KernelStats(*(value[tile.rows] for value in stats))
        run_backward(tile.logits, targets[tile.rows], tile_stats, parts, transform, out=tile.logits)
        total.add(tile)
    d_hidden, d_weight, d_bias = total.result()
    if by_columns:
        d_weight = weight_gradient_by_columns(
            hidden, weight, head, active, targets, stats, gradients, transform, buffer
        )
    return d_hidden, d_weight, d_bias


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
    stats = KernelStats(entropy, entropy, logsumexp, logsumexp_low)
    gradients = StatsGradients(grad_logprobs, grad_entropy, grad_logsumexp)
    transform = Transform(temperature, softcap, logit_scale, ignore_index)
    wanted = (want_hidden, want_weight, want_bias)
    return _backward_of_stats(hidden, weight, bias, targets, stats, gradients, wanted, dtype, transform)


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
    none = (None,) * 9
    if all(g is None for g in grads[:3]):
        return none
    saved = ctx.saved_tensors  # once: checkpointing makes them anew at each access
    hidden, weight, bias, targets, entropy, logsumexp, logsumexp_low = saved
    hidden_wanted, weight_wanted, bias_wanted = ctx.needs_input_grad[:3]
    wanted = (hidden_wanted, weight_wanted, bias_wanted)
    into = grad_to_add_to(weight) if weight_wanted else None
    if into is None:
        gradients = linear_token_stats_backward_op(*saved, *grads[:3], *wanted, *ctx.options)
        return *none_if_unwanted(gradients, wanted), *none[3:]
    dtype, *transform = ctx.options
    stats = KernelStats(entropy, entropy, logsumexp, logsumexp_low)
    arguments = (hidden, weight, bias, targets, stats, StatsGradients(*grads[:3]), wanted, dtype)
    gradients = _backward_of_stats(*arguments, Transform(*transform), into)
    return *none_if_unwanted(gradients, (hidden_wanted, False, bias_wanted)), *none[3:]


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
    the rows that have a gradient, and adds to an existing ``weight.grad`` where it lies. The weight's gradient is
    summed in float32 at least; for a 16-bit weight and more than one tile by a pass of its own (a fifth product)
    instead of in a float32 tensor of the weight's size.

    Extra memory: one tile of logits (``TILE_BYTES``, 80 MiB) and O(N). Products are in the inputs' dtype, under
    autocast in autocast's, as ``F.linear``'s; 16-bit ones on a CPU without instructions for them are made in float32,
    from blocks of the weight converted on the fly, and their logits are not rounded. Raises TypeError or ValueError for
    wrong dtypes, shapes and targets.
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
