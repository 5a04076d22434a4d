"""Launches compiled without a GPU: with the types, the constants and the alignment that a launcher's tensors have."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu_static
from benchmarks.machine_code import aot, cubin

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = triton.language

pytestmark = pytest.mark.slow


@triton.jit
def copy_kernel(x, y, n, BLOCK: tl.constexpr):
    for start in range(0, n, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        mask = offset < n
        tl.store(y + offset, tl.load(x + offset, mask=mask), mask=mask)


def rows(first: int, n: int, architecture: int = 90) -> list[gpu_static.Row]:
    """What is launched for the copy of n elements from element ``first`` on."""
    try:
        aot.require_triton()
        cubin.tool("cuobjdump")
    except (RuntimeError, FileNotFoundError) as error:
        pytest.skip(str(error))

    def launch() -> None:
        x = torch.empty(2**20, dtype=torch.bfloat16, device="cuda")
        copy_kernel[(1,)](x[first:], torch.empty_like(x), n, BLOCK=1024, num_warps=4)

    return [row for each in aot.launches(launch, architecture) for row in gpu_static.rows("", each)]


def test_aligned_tensors_are_copied_16_bytes_at_a_time() -> None:
    (row,) = rows(first=0, n=4096)  # a multiple of 16: the mask is the same for a whole vector
    assert (row["load_bits"], row["store_bits"], row["bytes_per_element"]) == ([128], [128], 4)
    assert row["elements"] % (1024 / 128) == 0  # whole blocks, however often the compiler unrolls
    assert (row["kernel"], row["threads"], row["itemsize"]) == ("copy_kernel", 128, 2)


def test_a_tensor_that_begins_amid_a_vector_is_loaded_singly() -> None:
    (row,) = rows(first=1, n=4096)
    assert (row["load_bits"], row["store_bits"]) == ([16], [128])


def test_an_odd_size_is_masked_singly() -> None:
    (row,) = rows(first=0, n=4097)
    assert row["load_bits"] == [16]


def test_architectures_are_kept_apart() -> None:
    assert {row["architecture"] for row in rows(0, 4096, 80)} == {80}
    assert {row["architecture"] for row in rows(0, 4096, 100)} == {100}


def test_nothing_stays_behind() -> None:
    from triton.runtime.jit import JITFunction

    before = JITFunction.run, torch.cuda.get_device_properties, torch.version.hip
    rows(first=0, n=4096)
    aot.triton_kernels(lambda: None, aot.ROCM)
    assert (JITFunction.run, torch.cuda.get_device_properties, torch.version.hip) == before
