"""The head's matrix products and tiles: logits exist as one tile of some rows by V at a time.

Both ops with a head walk these tiles; what happens inside one is the backends' business. On a CPU a tile holds rows
that count. On a GPU it holds all rows of a span, since the host does not know which count and must not wait to learn
it; there head_plan.py says how high a tile is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from edge_kernels._checks import stats_dtype
from edge_kernels.backend import extension, get_backend, kernels, unavailable
from edge_kernels.contract import KernelStats, StatsGradients, Transform
from edge_kernels.ops import head_plan
from edge_kernels.ops.head_plan import COLUMNS, Plan, row_elements
from edge_kernels.ops.memory import fresh

Wanted = Sequence[bool]  # whether hidden states, weight and bias (and a factor) receive a gradient

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

    There float32 products of blocks converted on the fly are several times faster, and the logits are not rounded. A
    process that is told to do without AVX-512 (EDGE_KERNELS_ISA) is taken to run on such a CPU.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    if dtype == torch.float16 or unavailable("cpu") is not None or extension().instruction_set() != "avx512":
        return torch.float32
    return dtype if extension().cpu_features().get("avx512bf16") else torch.float32


class Head:
    """The linear map whose outputs are logits: weight (V, D), bias (V,) or None; products in the dtype ``products``.

    With ``factor`` (V, r) hidden states have D + r columns, and the last ones are multiplied by it: a weight of low
    rank beside the other, as an adapter has, without a sum of the two.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        plan: Plan | None = None,
        tile_bytes: int = 0,
        factor: Tensor | None = None,
    ) -> None:
        """``plan``: a GPU's; without one a tile of logits has at most ``tile_bytes`` (0: the default)."""
        self.products = dtype if plan is not None else product_dtype(dtype, weight.device)
        self.plan = plan
        self.height = rows_per_tile(weight, self.products, tile_bytes) if plan is None else plan.height
        self.block_bytes = BLOCK_BYTES if plan is None else head_plan.BLOCK_BYTES
        self._weight = weight
        self._bias = None if bias is None else self.convert(bias)
        self.factor = None if factor is None else self.convert(factor)
        self._block: Tensor | None = None

    def split(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the columns (n, D) that the weight multiplies, and those (n, r) that the factor does."""
        D = self._weight.shape[1]
        return hidden[:, :D], hidden[:, D:]

    def convert(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.products)

    def columns(self) -> list[slice]:
        """Return the parts of the vocabulary whose weight is converted at a time: one, where nothing is."""
        V, D = self._weight.shape
        if self._weight.dtype == self.products:
            return [slice(0, V)]
        return self.blocks(max(1, self.block_bytes // (D * self.products.itemsize)))

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
        states, low_rank = self.split(hidden)
        for part in self.columns() if columns is None else [columns]:
            target = out[:, part] if columns is None else out
            if self._bias is None:
                torch.mm(states, self.part(part).t(), out=target)
            else:
                torch.addmm(self._bias[part], states, self.part(part).t(), out=target)
            if self.factor is not None:
                target.addmm_(low_rank, self.factor[part].t())

    def count(self, active: Tensor) -> int:
        """Return how many rows the tiles of the rows where ``active`` (N,) holds have."""
        return int(active.sum()) if self.plan is None else len(active)

    def rows(self, active: Tensor, height: int) -> Iterator[Tensor | slice]:
        """Yield the rows of equal tiles of at most ``height`` rows: the active ones, or with a plan spans of all."""
        if self.plan is not None:
            for start in range(0, len(active), height):
                yield slice(start, min(start + height, len(active)))
            return
        rows = active.nonzero()[:, 0]
        if len(rows):
            num_tiles = -(-len(rows) // height)
            yield from rows.split(-(-len(rows) // num_tiles))

    def hidden_of(self, hidden: Tensor, rows: Tensor | slice, active: Tensor) -> Tensor:
        """Return the hidden states of some rows in the dtype of the products; 0 where a row is not active.

        Such a row's gradient of logits is 0, and 0 times a NaN would reach the whole weight's.
        """
        part = self.convert(hidden[rows])
        return part if self.plan is None else part.masked_fill(~active[rows, None], 0)

    def needs_column_pass(self, num_rows: int) -> bool:
        """Whether the weight's gradient takes a pass of its own, by columns instead of tiles of rows.

        A 16-bit gradient cannot be summed over tiles in place without losing digits to each rounding. On a CPU a
        float32 tensor of its size is more than all other memory together; on a GPU the plan weighs that.
        """
        if self.plan is not None:
            return self.plan.way == COLUMNS
        is_short = self._weight.dtype in (torch.bfloat16, torch.float16)
        return is_short and num_rows > self.height and get_backend(self._weight) == "cpu"


# --- tiles ------------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """Some rows of the batch. ``logits`` is a buffer that the next tile uses again; the gradient may overwrite it."""

    rows: Tensor | slice  # (n,), int64, or a span: positions of the tile's rows in the batch
    hidden: Tensor  # (n, D)
    logits: Tensor  # (n, V)


def rows_per_tile(weight: Tensor, products: torch.dtype, tile_bytes: int = 0) -> int:
    return max(1, (tile_bytes or TILE_BYTES) // (weight.shape[0] * products.itemsize))


def tile_buffer(weight: Tensor, head: Head, num_rows: int) -> Tensor:
    """Return memory for the logits of one of the tiles that ``num_rows`` rows take: few, and as even as they come."""
    V = weight.shape[0]
    if head.plan is not None:
        shape = min(head.height, num_rows), row_elements(V, head.products.itemsize)
        return fresh(shape, weight, head.products)[:, :V]
    num_tiles = max(1, -(-num_rows // head.height))
    return fresh((-(-num_rows // num_tiles), V), weight, head.products)


def tiles(hidden: Tensor, head: Head, active: Tensor, buffer: Tensor) -> Iterator[Tile]:
    """Yield the rows of ``hidden`` (N, D) where ``active`` (N,) holds, in tiles; others are not read, or have logits 0.

    The logits of each tile are the first rows of ``buffer``, (n, V).
    """
    for rows in head.rows(active, max(1, len(buffer))):
        tile_hidden = head.hidden_of(hidden, rows, active)
        logits = buffer[: len(tile_hidden)]
        head.multiply(tile_hidden, out=logits)
        yield Tile(rows, tile_hidden, logits)


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
        sums = weight.dtype if is_one_tile else stats_dtype(weight.dtype)
        self._into = into
        self._sums_apart = into is None or (head.plan is not None and sums != into.dtype)
        self._weight = into
        if self._sums_apart and wanted[1]:
            # Not zeroed: the first tile writes it, so that its pages are touched once.
            self._weight = fresh(weight.shape, weight, sums)
        self._bias = weight.new_zeros(weight.shape[0], dtype=stats_dtype(weight.dtype)) if wanted[2] else None
        self._has_weight = not self._sums_apart
        self._factor: Tensor | None = None
        if len(wanted) > 3 and wanted[3] and head.factor is not None:
            self._factor = head.factor.new_zeros(head.factor.shape, dtype=stats_dtype(weight.dtype))
        self._block: Tensor | None = None

    def add(self, tile: Tile, scale: Tensor | None = None) -> None:
        """Add the part of a tile whose logits have become their gradient, times a scalar: two matrix products."""
        grad_logits, hidden = tile.logits, tile.hidden
        if self._bias is not None:
            summed = grad_logits.sum(0, dtype=self._bias.dtype)
            self._bias += summed if scale is None else summed * scale
        states, low_rank = self._head.split(hidden if scale is None else hidden * scale)
        hidden_part = torch.empty_like(hidden) if self._hidden is not None else None
        for columns in self._head.columns():
            part = grad_logits[:, columns]
            if hidden_part is not None:
                target = self._head.split(hidden_part)[0]
                beta = 0 if columns.start == 0 else 1
                torch.addmm(target, part, self._head.part(columns), beta=beta, out=target)
            if self._weight is not None:
                self._add_to_weight(self._weight[columns], part.t(), states)
        if hidden_part is not None and self._head.factor is not None:
            torch.mm(grad_logits, self._head.factor, out=self._head.split(hidden_part)[1])
        if self._factor is not None:
            self._factor += torch.mm(grad_logits.t(), low_rank)
        if self._hidden is not None and hidden_part is not None:
            self._hidden[tile.rows] = (hidden_part if scale is None else hidden_part.mul_(scale)).to(self._hidden.dtype)
        self._has_weight = True

    def _add_to_weight(self, total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
        beta = 1 if self._has_weight else 0
        if total.dtype == hidden.dtype:
            total.addmm_(grad_logits, hidden, beta=beta)
            return
        if self._head.plan is not None:
            add_product(total, grad_logits, hidden, beta)
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
        if self._into is not None and self._sums_apart and self._weight is not None:
            self._into.add_(self._weight)
        weight = None if self._into is not None else self._weight
        parts = zip((self._hidden, weight, self._bias), self._inputs, strict=True)
        hidden, weight, bias = (like.new_empty(0) if part is None else part.to(like.dtype) for part, like in parts)
        return hidden, weight, bias

    def factor_result(self, factor: Tensor | None) -> Tensor:
        """Return the gradient of ``factor`` in its dtype, or an empty tensor."""
        if factor is None or self._factor is None:
            return self._inputs[0].new_empty(0)
        return self._factor.to(factor.dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """Write ``beta * total + a @ b`` into ``total``, whose dtype is that of the operands or float32.

    Where torch cannot add a product of 16-bit operands to a float32 matrix, it is rounded to 16 bits before.
    """
    if total.dtype == b.dtype:
        total.addmm_(a, b, beta=beta)
    elif head_plan.sums_in_place(b.device.type, b.dtype):
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    else:
        height = max(1, head_plan.BLOCK_BYTES // (b.shape[1] * b.itemsize))
        for part, rows in zip(total.split(height), a.split(height), strict=True):
            product = torch.mm(rows, b)
            _ = part.copy_(product) if beta == 0 else part.add_(product)


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
    into: Tensor | None = None,
) -> Tensor:
    """Return the gradient of the weight, each block of its rows summed over the whole batch and written once.

    The logits are made once more, a block of columns at a time: an element's gradient needs its row's statistics only.
    Where ``into`` is given, the gradient is added to it, and an empty tensor is returned.
    """
    D = weight.shape[1]
    backend = kernels(weight)
    out = fresh(weight.shape, weight) if into is None else into
    width = max(1, BLOCK_BYTES // (D * 4)) if head.plan is None else head.plan.width
    width = min(width, weight.shape[0], max(1, workspace.numel() // 64))  # a shorter block before fewer than 64 rows
    height = max(1, workspace.numel() // width)
    workspace = workspace.as_strided((workspace.numel(),), (1,))
    chunks = list(head.rows(active, height))
    sums = torch.empty(width, D, dtype=stats_dtype(head.products), device=weight.device)
    for columns in head.blocks(width):
        num_columns = columns.stop - columns.start
        total = sums[:num_columns].zero_()
        elsewhere = num_columns if transform.ignore_index != num_columns else num_columns + 1
        for chunk in chunks:
            chunk_hidden = head.hidden_of(hidden, chunk, active)
            logits = workspace[: len(chunk_hidden) * num_columns].view(len(chunk_hidden), num_columns)
            head.multiply(chunk_hidden, logits, columns)
            in_block = targets[chunk] - columns.start
            in_block = in_block.masked_fill((in_block < 0) | (in_block >= num_columns), elsewhere)
            parts = StatsGradients(*(None if gradient is None else gradient[chunk] for gradient in gradients))
            chunk_stats = KernelStats(*(value[chunk] for value in stats))
            backend.token_stats_backward(logits, in_block, chunk_stats, parts, transform, out=logits)
            add_product(total, logits.t(), head.split(chunk_hidden)[0], 1)
        if into is None:
            out[columns] = total
        else:
            out[columns] += total
    return out if into is None else out.new_empty(0)


def fake_head_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``HeadGradient.result`` would, without values."""
    inputs = (hidden, weight, weight[:, 0] if bias is None else bias)
    like = tuple(t.new_empty(t.shape) if w else t.new_empty(0) for t, w in zip(inputs, wanted, strict=True))
    return like[0], like[1], like[2]
