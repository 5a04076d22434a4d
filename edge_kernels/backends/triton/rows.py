"""How kernels walk over a row of logits: where vectors of 16 bytes lie in it, its sums, and the gradient written there.

A row may begin at any element. Its vectors begin at the next multiple of 16 bytes; the elements before and behind them
are the row's edges, fewer than a vector each, taken one by a lane. Inside a loop there is no mask and no communication:
a lane has its own sums (m, s, t), rescaled once per iteration, and lanes are merged once, at the end. ``tile`` is
tuning.Tile, ``transform`` launch.LogitTransform.
"""

from __future__ import annotations

import triton
import triton.language as tl

from edge_kernels.backends.triton.arithmetic import LOWEST, absorb, gradient, merged, oriented


@triton.jit
def vectors(start, V, VEC: tl.constexpr):
    """(shift, aligned start, first and last column of the vectors) of a row at element ``start``; columns from there.

    A column c of the logits is column c + shift of the aligned row.
    """
    shift = (start % VEC).to(tl.int32)
    begin = tl.where(shift > 0, VEC, 0)
    end = (V + shift) // VEC * VEC
    return shift, tl.multiple_of(start - shift, VEC), begin, tl.maximum(begin, end)


@triton.jit
def edges(shift, end, V, tile):
    """(columns, mask) of a row's elements outside its vectors, one a lane."""
    VEC: tl.constexpr = tile.VEC
    lane = tl.arange(0, tile.LANES)
    column = tl.where(lane < VEC, lane, end + lane - VEC)
    head = tl.where(shift > 0, shift, VEC)
    in_head = (lane >= head) & (lane < tl.minimum(V + shift, VEC))
    in_tail = (lane >= VEC) & (column < V + shift)
    return column, in_head | in_tail


@triton.jit
def part_mask(i, end, tile, W: tl.constexpr):
    """Which elements (LANES, W) of a part lie before column ``end``; both it and i are at the beginning of a vector."""
    return tl.broadcast_to((tl.arange(0, tile.LANES) * tile.VEC < end - i)[:, None], (tile.LANES, W))


@triton.jit
def load_tile(row, i, end, transform, tile):
    """The oriented logits of a tile from column i, float32 tensors (LANES, W); -inf from ``end`` on, unless it is None.

    Of bfloat16 there are two for each part of a tile, the lower and upper halves of 32-bit words, which costs an
    instruction less per pair than the compiler's own conversion.
    """
    IS_BF16: tl.constexpr = row.dtype.element_ty == tl.bfloat16
    W: tl.constexpr = tile.VEC // 2 if IS_BF16 else tile.VEC
    offsets = tl.arange(0, tile.LANES)[:, None] * W + tl.arange(0, W)[None, :]
    mask = None
    xs = ()
    for part in tl.static_range(tile.UNROLL):
        first = i + part * tile.LANES * tile.VEC
        if end is not None:
            mask = part_mask(first, end, tile, W)
        if IS_BF16:
            word = tl.load((row + first).to(tl.pointer_type(tl.uint32)) + offsets, mask=mask)
            xs += (
                present((word << 16).to(tl.float32, bitcast=True), mask, transform),
                present((word & 0xFFFF0000).to(tl.float32, bitcast=True), mask, transform),
            )
        else:
            xs += (present(tl.load(row + first + offsets, mask=mask), mask, transform),)
    return xs


@triton.jit
def present(x, mask, transform):
    """The oriented logits of x, -inf outside of the mask, if there is one."""
    if mask is None:
        return oriented(x, transform)
    else:
        return tl.where(mask, oriented(x, transform), float("-inf"))


@triton.jit
def row_sums(
    logits,
    start,  # of the row, in elements
    V,
    part,  # this program's share of the vectors is number ``part``, of ``chunk`` columns
    chunk,
    transform,
    tile,
):
    """(m, s, t) of a share of a row."""
    LANES: tl.constexpr = tile.LANES
    VEC: tl.constexpr = tile.VEC
    STEP: tl.constexpr = tile.UNROLL * LANES * VEC
    shift, aligned, first, last = vectors(start, V, VEC)
    row = logits + aligned
    begin = tl.multiple_of(first + part * chunk, VEC)
    end = tl.multiple_of(tl.minimum(begin + chunk, last), VEC)
    m = tl.full((LANES,), LOWEST, tl.float32)
    s = tl.zeros((LANES,), tl.float32)
    t = tl.zeros((LANES,), tl.float32)
    whole = tl.multiple_of(begin + tl.maximum(end - begin, 0) // STEP * STEP, VEC)
    for i in range(begin, whole, STEP):
        m, s, t = absorb(load_tile(row, tl.multiple_of(i, VEC), None, transform, tile), m, s, t, transform)
    if whole < end:  # whole vectors, too few for every lane
        m, s, t = absorb(load_tile(row, whole, end, transform, tile), m, s, t, transform)
    if part == 0:
        column, mask = edges(shift, last, V, tile)
        x = present(tl.load(row + column, mask=mask), mask, transform)
        m, s, t = absorb((x[:, None],), m, s, t, transform)
    return merged(m, s, t, 0)


@triton.jit
def write_tile(row, out_row, i, end, own_column, factors, transform, tile):
    """Write the gradient of a tile from column i, up to ``end`` unless it is None; all reads before the first write."""
    VEC: tl.constexpr = tile.VEC
    PART: tl.constexpr = tile.LANES * VEC
    dtype = out_row.dtype.element_ty
    starts = tl.arange(0, tile.LANES)[:, None] * VEC
    element = tl.arange(0, VEC)[None, :]
    offsets = starts + element
    mask = None
    xs = ()
    if factors is not None:
        for part in tl.static_range(tile.UNROLL):
            if end is not None:
                mask = part_mask(i + part * PART, end, tile, VEC)
            xs += (tl.load(row + i + part * PART + offsets, mask=mask),)
    for part in tl.static_range(tile.UNROLL):
        if end is not None:
            mask = part_mask(i + part * PART, end, tile, VEC)
        g = tl.zeros((tile.LANES, VEC), dtype)
        if factors is not None:
            is_target = element == own_column - (i + part * PART + starts)  # one subtraction a vector
            g = gradient(xs[part], factors, is_target, transform).to(dtype)
        tl.store(out_row + i + part * PART + offsets, g, mask=mask)


@triton.jit
def write_gradient(
    logits,
    start,
    out,
    out_start,
    target,  # column, or -1 for none
    V,
    part,
    chunk,
    factors,  # gradient_factors; None: zeros are written and nothing is read
    transform,
    SAME_SHIFT: tl.constexpr,  # the output's vectors lie where the logits' do
    tile,
):
    """Write the gradient of a share of a row, from its end to its beginning: what was read last is cached best."""
    VEC: tl.constexpr = tile.VEC
    STEP: tl.constexpr = tile.UNROLL * tile.LANES * VEC
    shift, aligned, first, last = vectors(start, V, VEC)
    row = logits + aligned
    out_aligned = out_start - shift
    if SAME_SHIFT:
        out_aligned = tl.multiple_of(out_aligned, VEC)
    out_row = out + out_aligned
    begin = tl.multiple_of(first + part * chunk, VEC)
    end = tl.multiple_of(tl.minimum(begin + chunk, last), VEC)
    own_column = tl.where(target >= 0, target + shift, -1)
    num_whole = tl.maximum(end - begin, 0) // STEP
    whole = begin + num_whole * STEP
    if whole < end:
        i = tl.multiple_of(whole, VEC)
        write_tile(row, out_row, i, end, own_column, factors, transform, tile)
    for step in range(num_whole):
        i = tl.multiple_of(whole - (step + 1) * STEP, VEC)
        write_tile(row, out_row, i, None, own_column, factors, transform, tile)
    if part == 0:
        column, mask = edges(shift, last, V, tile)
        g = tl.zeros((tile.LANES,), out.dtype.element_ty)
        if factors is not None:
            x = tl.load(row + column, mask=mask, other=0.0)
            g = gradient(x, factors, column == own_column, transform).to(out.dtype.element_ty)
        tl.store(out_row + column, g, mask=mask)
