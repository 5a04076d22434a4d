"""How a GPU makes the head's products: the rates of devices, what each way costs and needs, and the choice.

No tensor is made here, and nothing is asked of a device but what it is. docs/kernels.md derives the formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from edge_kernels._checks import stats_dtype
from edge_kernels.backend import fused_head, get_backend

# --- constants: every one may be replaced by a measured one, which `make gpu` prints ----------------------------------


class Rates(NamedTuple):
    """What a device reaches on large sizes, in flop/s and bytes/s; the share is of the library's products."""

    products: float  # 16-bit
    float32_products: float  # without TF32
    memory: float
    fused_share: float  # what kernels around tl.dot reach


# sm_90: 0.81 and 0.90 of an H100's data sheet; the others: the same shares of an A100's, a B200's, an RTX 5090's and an
# MI300X's. No GPU has measured any of them. The shares of fused kernels are the middle of what is known of other
# people's; on sm_100 their instructions, not the tensor cores, are the bound (`make gpu-static`).
RATES = {
    "sm_80": Rates(252e12, 15.7e12, 1.8e12, 0.75),
    "sm_90": Rates(798e12, 54e12, 3.0e12, 0.75),
    "sm_100": Rates(1816e12, 60e12, 7.2e12, 0.6),
    "sm_120": Rates(169e12, 84e12, 1.6e12, 0.75),
    "hip": Rates(1055e12, 132e12, 4.7e12, 0.6),
}

# On a GPU an op takes at most this much memory besides its results, unless the caller says otherwise.
MEMORY_BUDGET = 3 * 2**30

# What is converted, or summed for a block of columns, at a time: enough for a product at full rate.
BLOCK_BYTES = 64 * 2**20

# The rows of a product's block; a tile of fewer or of odd rows leaves multiprocessors idle.
ROWS_OF_BLOCK = 128

# Statistics, coefficients and masks: float32 and bool numbers of each token.
BYTES_OF_TOKEN = 128

# The fused kernels' buffer, TILE_BYTES of backends/triton/tuning.py, which does not load without Triton.
FUSED_BUFFER_BYTES = 256 * 2**20

ROW_ALIGNMENT = 16  # bytes: the widest access, of the library's fast products too

# --- the ways ---------------------------------------------------------------------------------------------------------

FUSED, TILES, COLUMNS = "fused", "tiles", "columns"
WAYS = (FUSED, TILES, COLUMNS)


class Problem(NamedTuple):
    """What the choice depends on besides the device."""

    rows: int  # N, whether they count or not: the host does not know
    hidden: int  # D
    vocab: int  # V
    itemsize: int  # of an element of the products
    weight_itemsize: int
    advantages_known: bool  # one sweep; else the statistics of all rows first
    wants_weight: bool  # its gradient
    sums_in_place: bool  # whether the library adds 16-bit products to a float32 matrix
    fuses: bool  # whether there are fused kernels
    takes_statistics: bool  # whether a gradient of some columns is that of the whole row's statistics


class Plan(NamedTuple):
    """A way and its sizes; ``fused``: logits in registers. Both others make tiles of logits by the library's products.

    ``tiles``: d weight is summed over tiles. ``columns``: it takes a pass of its own by blocks of columns.
    """

    way: str
    height: int  # rows of a tile of logits
    width: int  # columns of a block of the pass by columns
    extra_bytes: int  # besides the results
    seconds: float  # predicted


_forced: str | None = None


@contextmanager
def use_way(way: str | None) -> Iterator[None]:
    """Make every head op in a ``with`` block go one way, on CPU tensors too: for tests and benchmarks."""
    global _forced
    if way is not None and way not in WAYS:
        raise ValueError(f"way must be one of {', '.join(map(repr, WAYS))}, or None; got {way!r}")
    previous, _forced = _forced, way
    try:
        yield
    finally:
        _forced = previous


def selects_rows(tensor: Tensor) -> bool:
    """Whether tiles hold only the rows that count: on a CPU. On a GPU the host would have to wait for their number."""
    return tensor.device.type == "cpu" and _forced is None


def plan_of(
    hidden: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    memory_budget: int,  # 0: the default
    *,
    advantages_known: bool,
    wants_weight: bool = True,
    may_fuse: bool = True,
) -> Plan | None:
    """Return what to do for ``hidden`` (N, D) and ``weight`` (V, D); None where ``selects_rows``, which needs no plan.

    Raises ValueError if no way fits the budget.
    """
    if selects_rows(hidden):
        return None
    N, (V, D) = len(hidden), weight.shape
    problem = Problem(
        rows=N,
        hidden=D,
        vocab=V,
        itemsize=dtype.itemsize,
        weight_itemsize=weight.itemsize,
        advantages_known=advantages_known,
        wants_weight=wants_weight,
        sums_in_place=sums_in_place(hidden.device.type, dtype),
        fuses=may_fuse and fused_head(hidden) is not None,
        takes_statistics=get_backend(weight) != "reference",
    )
    return choose(problem, memory_budget or MEMORY_BUDGET, rates_of(hidden.device))


def choose(problem: Problem, memory_budget: int, rates: Rates) -> Plan:
    """Return the fastest plan of at most ``memory_budget`` bytes; raises ValueError if there is none."""
    plans = [plan for plan in every_plan(problem, memory_budget, rates) if _forced in (None, plan.way)]
    if not plans:
        raise ValueError(f"there is no way {_forced!r} for this head, backend and dtype; take another")
    fitting = [plan for plan in plans if plan.extra_bytes <= memory_budget]
    if not fitting:
        least = min(plan.extra_bytes for plan in plans)
        raise ValueError(
            f"memory_budget must be at least {least:,} bytes for N = {problem.rows:,} rows, D = {problem.hidden:,}, "
            f"V = {problem.vocab:,}; got {memory_budget:,}; raise it, or split the batch"
        )
    return min(fitting, key=lambda plan: plan.seconds)


def rates_of(device: torch.device) -> Rates:
    """Return a device's rates: an unknown one's, and a CPU's under a test, are those of sm_90."""
    if device.type != "cuda":
        return RATES["sm_90"]
    if torch.version.hip is not None:
        return RATES["hip"]
    properties = torch.cuda.get_device_properties(device)
    return RATES.get(f"sm_{properties.major}{properties.minor}", RATES["sm_90"])


_sums_in_place: dict[tuple[str, torch.dtype], bool] = {}


def sums_in_place(device: str, dtype: torch.dtype) -> bool:
    """Whether torch adds products of ``dtype`` to a float32 matrix where it lies; it says so by taking a call."""
    if stats_dtype(dtype) == dtype:
        return True
    key = device, dtype
    if key not in _sums_in_place:
        total, one = torch.zeros(1, 1, device=device), torch.zeros(1, 1, dtype=dtype, device=device)
        try:
            torch.addmm(total, one, one, out_dtype=torch.float32, out=total)
            _sums_in_place[key] = True
        except (RuntimeError, TypeError):  # a CPU; ROCm; a release that wants the sum in 16 bits
            _sums_in_place[key] = False
    return _sums_in_place[key]


# --- memory and time --------------------------------------------------------------------------------------------------


def every_plan(problem: Problem, memory_budget: int, rates: Rates) -> Iterator[Plan]:
    """Yield each way with the highest tile that the budget allows, of one block of rows where it allows none."""
    if problem.fuses:
        yield _fused(problem, rates)
    yield _tiles(problem, memory_budget, rates)
    if problem.takes_statistics and problem.wants_weight and problem.weight_itemsize < 4:  # else the sums are it
        yield _columns(problem, memory_budget, rates)


def row_elements(vocab: int, itemsize: int) -> int:
    """Return the distance of two rows of a tile, so that each begins where the widest access may."""
    unit = max(1, ROW_ALIGNMENT // itemsize)
    return -(-vocab // unit) * unit


def _row_bytes(problem: Problem) -> int:
    """Of a tile: logits; the row of hidden states, and its gradient or its conversion."""
    of_logits = row_elements(problem.vocab, problem.itemsize) * problem.itemsize
    return of_logits + 2 * problem.hidden * problem.itemsize


def _always_bytes(problem: Problem) -> int:
    """Of every way with tiles: numbers of each token, the bias's sums, and a block of a weight of another dtype."""
    converted = problem.vocab * problem.hidden * problem.itemsize
    converts = problem.weight_itemsize != problem.itemsize
    return problem.rows * BYTES_OF_TOKEN + 8 * problem.vocab + (min(converted, BLOCK_BYTES) if converts else 0)


def _enough_rows(rates: Rates) -> int:
    """Return the height from which a higher tile gains nothing, where no sums pass through memory for each.

    A tile's product takes as long as eight bytes a weight through memory; it reads two or four of them.
    """
    return -(-int(4 * rates.products / rates.memory) // ROWS_OF_BLOCK) * ROWS_OF_BLOCK


def _height(problem: Problem, room: int, most: int | None = None) -> int:
    """Return the rows of each of the fewest equal tiles of at most ``room`` bytes, whole blocks if it has one."""
    most = max(1, min(room // _row_bytes(problem), problem.rows if most is None else most))
    if most >= problem.rows:
        return max(1, problem.rows)
    unit = ROWS_OF_BLOCK if most >= ROWS_OF_BLOCK else 1
    most -= most % unit
    count = -(-problem.rows // most)
    return -(-problem.rows // (count * unit)) * unit


def _product_seconds(problem: Problem, rates: Rates, tiles: int) -> float:
    """Return the time of one product of all rows with the weight, in so many tiles, each of which reads the weight."""
    N, D, V, itemsize = problem[:4]
    flops = 2 * N * D * V / (rates.products if itemsize == 2 else rates.float32_products)
    return max(flops, itemsize * (tiles * V * D + N * D + N * V) / rates.memory)


def _tiles(problem: Problem, memory_budget: int, rates: Rates) -> Plan:
    N, D, V, itemsize = problem[:4]
    always = _always_bytes(problem)
    most = None if problem.wants_weight else _enough_rows(rates)
    height, sums = _height(problem, memory_budget - always, most), 0
    if height < N and problem.wants_weight:
        sums = 4 * V * D if problem.weight_itemsize < 4 else 0
        sums += 0 if problem.sums_in_place else min(V * D * itemsize, BLOCK_BYTES)
        height = _height(problem, memory_budget - always - sums)
    tiles = -(-N // height)
    products, passes = (3, 2) if problem.advantages_known else (4, 3)
    traffic = passes * N * V * itemsize
    if tiles > 1 and problem.wants_weight:  # in the epilogue of a product, which nothing overlaps
        traffic += V * D * ((8 if problem.sums_in_place else 12) * tiles - 4)
        traffic += V * D * (4 + problem.weight_itemsize) if problem.weight_itemsize < 4 else 0
    seconds = products * _product_seconds(problem, rates, tiles) + traffic / rates.memory
    return Plan(TILES, height, V, always + sums + height * _row_bytes(problem), seconds)


def _columns(problem: Problem, memory_budget: int, rates: Rates) -> Plan:
    N, D, V, itemsize = problem[:4]
    width = max(1, min(V, BLOCK_BYTES // (4 * D)))
    always = _always_bytes(problem) + 2 * N * D * itemsize + width * D * (4 if problem.sums_in_place else 4 + itemsize)
    height = _height(problem, memory_budget - always, _enough_rows(rates))
    tiles, chunks = -(-N // height), -(-N * width // (height * V))
    products, passes = (4, 5) if problem.advantages_known else (5, 5)
    traffic = passes * N * V * itemsize + V * D * (8 * chunks + 4 + problem.weight_itemsize)
    traffic += -(-V // width) * N * D * itemsize  # each block reads all hidden states
    seconds = products * _product_seconds(problem, rates, tiles) + traffic / rates.memory
    return Plan(COLUMNS, height, width, always + height * _row_bytes(problem), seconds)


def _fused(problem: Problem, rates: Rates) -> Plan:
    N, D, V, itemsize = problem[:4]
    blocks = -(-N * V * itemsize // FUSED_BUFFER_BYTES)
    sums = 8 * N * D * (blocks - 1) + 6 * N * D  # of d hidden
    seconds = 4 * _product_seconds(problem, rates, 1) / rates.fused_share + sums / rates.memory
    buffer = min(FUSED_BUFFER_BYTES, N * V * itemsize)
    return Plan(FUSED, 0, 0, N * BYTES_OF_TOKEN + buffer + (4 * N * D if itemsize < 4 else 0), seconds)
