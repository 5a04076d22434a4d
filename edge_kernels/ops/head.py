"""The head's matrix products and tiles: logits exist as one tile of some rows by V at a time.

Both ops with a head walk these tiles; what happens inside one is the backends' business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from edge_kernels._checks import check_float, check_like, describe, stats_dtype
from edge_kernels.backend import extension, get_backend, kernels, unavailable
from edge_kernels.contract import KernelStats, StatsGradients, Transform
from edge_kernels.ops.memory import fresh

Wanted = Sequence[bool]  # whether hidden states, weight and bias receive a gradient

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

    rows: Tensor  # (n,), int64: positions of the tile's rows in the batch
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

    What is not wanted costs nothing and is returned as an empty tensor, which is how an op returns "none". The weight's
    may be added to a tensor that exists, ``into``, and an empty one is returned then too.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        wanted: Wanted,
        *,
        is_one_tile: bool,
        into: Tensor | None = None,
    ) -> None:
        self._inputs = (hidden, weight, weight if bias is None else bias)
        self._head = head
        self._hidden = hidden.new_zeros(hidden.shape) if wanted[0] else None
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
        scaled_hidden = hidden if scale is None else hidden * scale
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

    A 16-bit gradient cannot be summed over tiles in place without losing digits to each rounding, and a float32 tensor
    of its size is more than all other memory together.
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
    backend = kernels(weight)
    rows = active.nonzero()[:, 0]
    out = fresh(weight.shape, weight)
    width = max(1, BLOCK_BYTES // (D * 4))
    width = min(width, weight.shape[0], max(1, workspace.numel() // 64))  # a shorter block before fewer than 64 rows
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
            backend.token_stats_backward(logits, in_block, chunk_stats, parts, transform, out=logits)
            if total.dtype == logits.dtype:
                total.addmm_(logits.t(), chunk_hidden)
            else:
                total += torch.mm(logits.t(), chunk_hidden)
        out[columns] = total
    return out


def fake_head_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``HeadGradient.result`` would, without values."""
    inputs = (hidden, weight, weight[:, 0] if bias is None else bias)
    like = tuple(t.new_empty(t.shape) if w else t.new_empty(0) for t, w in zip(inputs, wanted, strict=True))
    return like[0], like[1], like[2]


@torch.compiler.assume_constant_result  # torch.compile of torch 2.9 does not trace what it calls
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


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
