"""Block sizes by architecture, and how much work a program gets. Chosen from data sheets; none was timed on a GPU yet.

A streaming kernel wants 16 bytes a lane and as many of them in flight as fit the registers; a matrix kernel the tile
shape of the architecture's instruction (sm_90 and sm_100: 64 rows by a warp group) and as many stages as fit the shared
memory. An unknown architecture gets the entry for sm_80, which every CUDA and ROCm device since can run.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

VECTOR_BYTES = 16  # the widest access that every architecture has

# Programs of a streaming kernel that a multiprocessor should have, to have loads under way while others compute.
PROGRAMS_PER_MULTIPROCESSOR = 4

# The gradient of logits between its making and its two products, in bytes; larger tiles read and write the sums of
# d hidden less often.
TILE_BYTES = 256 * 2**20


class Device(NamedTuple):
    """What the launchers ask of a device."""

    architecture: str  # "sm_90", "hip", "interpreter"
    warp_size: int
    multiprocessors: int
    cache_bytes: int  # L2


class Stream(NamedTuple):
    """A kernel over rows of logits: every lane takes ``unroll`` vectors per iteration."""

    num_warps: int
    unroll: int


class Tile(NamedTuple):
    """What a streaming kernel takes of a row in one iteration, as the kernel's argument; every field is constant."""

    LANES: tl.constexpr
    VEC: tl.constexpr  # elements of 16 bytes
    UNROLL: tl.constexpr  # vectors of a lane

    @property
    def columns(self) -> int:
        return int(self.LANES.value * self.VEC.value * self.UNROLL.value)


class Matrix(NamedTuple):
    """A kernel around ``tl.dot``."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


_STREAM = {"interpreter": Stream(1, 2)}
_STREAM_DEFAULT = Stream(num_warps=8, unroll=2)

# One program a row, few rows at a time, so that they are still in L2 when they are read again: more bytes in flight
# each.
_SWEEP = {"interpreter": Stream(1, 2)}
_SWEEP_DEFAULT = Stream(num_warps=8, unroll=4)

# By architecture and element size.
_MATRIX = {
    ("interpreter", 2): Matrix(16, 32, 16, 1, 1),
    ("interpreter", 4): Matrix(16, 32, 16, 1, 1),
    ("sm_80", 2): Matrix(128, 128, 32, 8, 4),
    ("sm_80", 4): Matrix(64, 64, 32, 8, 3),
    ("sm_90", 2): Matrix(128, 128, 64, 8, 4),
    ("sm_90", 4): Matrix(64, 64, 32, 8, 3),
    ("sm_100", 2): Matrix(128, 128, 64, 8, 4),
    ("sm_100", 4): Matrix(64, 64, 32, 8, 3),
    ("sm_120", 2): Matrix(128, 64, 64, 4, 3),  # 100 KB of shared memory
    ("hip", 2): Matrix(128, 128, 32, 8, 2),  # 64 KB
    ("hip", 4): Matrix(64, 64, 32, 4, 2),
}


@cache
def _gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    cache_bytes = getattr(properties, "L2_cache_size", 0) or 4 * 2**20
    if torch.version.hip is not None:
        return Device("hip", getattr(properties, "warp_size", 64), properties.multi_processor_count, cache_bytes)
    architecture = f"sm_{properties.major}{properties.minor}"
    return Device(architecture, 32, properties.multi_processor_count, cache_bytes)


def device_of(tensor: Tensor) -> Device:
    """Return what a tensor's device is; a CPU tensor is the interpreter's, with so few lanes that tests meet loops."""
    if tensor.device.type == "cpu":
        return Device("interpreter", 16, 1, 0)
    return _gpu(tensor.device.index if tensor.device.index is not None else torch.cuda.current_device())


def stream(device: Device, element_size: int) -> tuple[Tile, int]:
    """Return the tile and the number of warps of a kernel with one or more programs per row."""
    return _tile(device, _STREAM.get(device.architecture, _STREAM_DEFAULT), element_size)


def sweep(device: Device, element_size: int) -> tuple[Tile, int]:
    """Return the tile and the number of warps of the kernel that keeps its rows in L2."""
    return _tile(device, _SWEEP.get(device.architecture, _SWEEP_DEFAULT), element_size)


def _tile(device: Device, choice: Stream, element_size: int) -> tuple[Tile, int]:
    unroll = choice.unroll * element_size // 2  # as many elements of 4 bytes as of 2
    numbers = choice.num_warps * device.warp_size, VECTOR_BYTES // element_size, unroll
    return Tile(*map(tl.constexpr, numbers)), choice.num_warps


def matrix(device: Device, element_size: int) -> Matrix:
    """Return the block sizes of a matrix kernel."""
    known = _MATRIX.get((device.architecture, element_size))
    return known or _MATRIX["sm_80", element_size]


def programs_per_row(device: Device, rows: int, tiles: int) -> int:
    """Return over how many programs to split a row of ``tiles`` tiles, so that every multiprocessor has some."""
    wanted = device.multiprocessors * PROGRAMS_PER_MULTIPROCESSOR
    return max(1, min(tiles, -(-wanted // max(rows, 1))))


def rows_in_cache(device: Device, row_bytes: int) -> int:
    """Return how many rows to sweep at a time, so that the second read of each finds it in L2."""
    held = int(0.7 * device.cache_bytes) // max(row_bytes, 1)  # the rest is for what is written
    return max(device.multiprocessors, min(held, device.multiprocessors * PROGRAMS_PER_MULTIPROCESSOR))
