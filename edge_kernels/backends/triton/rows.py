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
def vector_starts(tile, UNROLL: tl.constexpr):
    """Where a tile's vectors begin, (UNROLL, LANES, 1); neighbouring lanes have neighbouring vectors."""
    u = tl.arange(0, UNROLL)[:, None, None] * (tile.LANES * tile.VEC)
    return u + tl.arange(0, tile.LANES)[None, :, None] * tile.VEC


@triton.jit
def pair_masks(i, end, IS_BF16: tl.constexpr, tile):
    """Which elements of ``load_pair`` at column i lie before column ``end``; both are at the beginning of a vector."""
    if IS_BF16:
        mask = tl.broadcast_to(i + vector_starts(tile, tile.UNROLL) < end, (tile.UNROLL, tile.LANES, tile.VEC // 2))
        return mask, mask
    else:
        HALF: tl.constexpr = tile.UNROLL // 2
        starts = i + vector_starts(tile, HALF)
        shape: tl.constexpr = (HALF, tile.LANES, tile.VEC)
        return tl.broadcast_to(starts < end, shape), tl.broadcast_to(starts + HALF * tile.LANES * tile.VEC < end, shape)


@triton.jit
def load_pair(row, i, mask0, mask1, tile):
    """The elements of a tile from column i as two float32 tensors; masks of None for a whole tile.

    Of bfloat16 these are the lower and upper halves of 32-bit words, which costs an instruction less per pair than the
    compiler's own conversion; of other types the first and second half of the unrolled vectors.
    """
    if row.dtype.element_ty == tl.bfloat16:
        words = (row + i).to(tl.pointer_type(tl.uint32))
        starts = vector_starts(tile, tile.UNROLL) // 2
        word = tl.load(words + (starts + tl.arange(0, tile.VEC // 2)[None, None, :]), mask=mask0)
        return (word << 16).to(tl.float32, bitcast=True), (word & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        HALF: tl.constexpr = tile.UNROLL // 2
        half = row + i + vector_starts(tile, HALF) + tl.arange(0, tile.VEC)[None, None, :]
        x0 = tl.load(half, mask=mask0)
        x1 = tl.load(half + HALF * tile.LANES * tile.VEC, mask=mask1)
        return x0.to(tl.float32), x1.to(tl.float32)


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
        x0, x1 = load_pair(row, tl.multiple_of(i, VEC), None, None, tile)
        m, s, t = absorb(oriented(x0, transform), oriented(x1, transform), m, s, t, transform)
    if whole < end:  # whole vectors, too few for every lane
        mask0, mask1 = pair_masks(whole, end, logits.dtype.element_ty == tl.bfloat16, tile)
        x0, x1 = load_pair(row, whole, mask0, mask1, tile)
        x0 = tl.where(mask0, oriented(x0, transform), float("-inf"))
        x1 = tl.where(mask1, oriented(x1, transform), float("-inf"))
        m, s, t = absorb(x0, x1, m, s, t, transform)
    if part == 0:
        column, mask = edges(shift, last, V, tile)
        x = oriented(tl.load(row + column, mask=mask), transform)
        x = tl.where(mask, x, float("-inf"))[None, :, None]
        m, s, t = absorb(x, tl.full((1, LANES, 1), float("-inf"), tl.float32), m, s, t, transform)
    return merged(m, s, t, 0)


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
    SHAPE: tl.constexpr = (tile.UNROLL, tile.LANES, VEC)
    STEP: tl.constexpr = tile.UNROLL * tile.LANES * VEC
    shift, aligned, first, last = vectors(start, V, VEC)
    row = logits + aligned
    out_aligned = out_start - shift
    if SAME_SHIFT:
        out_aligned = tl.multiple_of(out_aligned, VEC)
    out_row = out + out_aligned
    begin = tl.multiple_of(first + part * chunk, VEC)
    end = tl.multiple_of(tl.minimum(begin + chunk, last), VEC)
    starts = vector_starts(tile, tile.UNROLL)
    offsets = starts + tl.arange(0, VEC)[None, None, :]
    own_column = tl.where(target >= 0, target + shift, -1)
    dtype = out.dtype.element_ty
    zeros = tl.zeros(SHAPE, dtype)
    num_whole = tl.maximum(end - begin, 0) // STEP
    whole = begin + num_whole * STEP
    if whole < end:
        i = tl.multiple_of(whole, VEC)
        mask = tl.broadcast_to(i + starts < end, SHAPE)
        g = zeros
        if factors is not None:
            x = tl.load(row + i + offsets, mask=mask, other=0.0)
            g = gradient(x, factors, i + offsets == own_column, transform).to(dtype)
        tl.store(out_row + i + offsets, g, mask=mask)
    for step in range(num_whole):
        i = tl.multiple_of(whole - (step + 1) * STEP, VEC)
        g = zeros
        if factors is not None:
            x = tl.load(row + i + offsets)
            g = gradient(x, factors, i + offsets == own_column, transform).to(dtype)
        tl.store(out_row + i + offsets, g)
    if part == 0:
        column, mask = edges(shift, last, V, tile)
        g = tl.zeros((tile.LANES,), dtype)
        if factors is not None:
            x = tl.load(row + column, mask=mask, other=0.0)
            g = gradient(x, factors, column == own_column, transform).to(dtype)
        tl.store(out_row + column, g, mask=mask)
