"""The inspector of machine code: on listings written by hand, and on small CUDA kernels whose counts are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import gpu_static
from benchmarks.machine_code import aot, cubin, instructions


def parse(*lines: str) -> cubin.Kernel:
    """A kernel from a listing as cuobjdump prints it, one instruction each 16 bytes."""
    text = "\n".join(f"        /*{16 * n:04x}*/  {line} ;  /* 0x0 */" for n, line in enumerate(lines))
    code = instructions.parse(f"\t\tFunction : kernel\n{text}\n")["kernel"]
    return cubin.Kernel("kernel", code, registers=32, shared_bytes=0, local_bytes=0, max_threads=128)


# A row's loop with a packet's loop in it; before it a scalar that is the same for all threads; after it a store by
# thread, and the branch to itself that pads every kernel.
NESTED = (
    "S2R R0, SR_TID.X",  # 00
    "LDC.64 R2, c[0x0][0x210]",  # 10
    "LDG.E R9, desc[UR4][R2.64]",  # 20: a scalar
    "IMAD.WIDE R4, R0, 0x10, R2",  # 30
    "LDG.E.128 R12, desc[UR4][R4.64]",  # 40: both loops begin here
    "MUFU.EX2 R8, R12",  # 50
    "@!P1 FADD R10, R10, R8",  # 60
    "IADD3 R4, P0, R4, 0x800, RZ",  # 70
    "@P0 BRA 0x40",  # 80
    "BAR.SYNC.DEFER_BLOCKING 0x0",  # 90
    "@P2 BRA 0x30",  # a0
    "STG.E desc[UR4][R4.64], R10",  # b0
    "EXIT",  # c0
    "BRA 0xd0",  # d0
    "NOP",  # e0
)


def test_the_main_loop_is_the_innermost_one_that_streams() -> None:
    kernel = parse(*NESTED)
    (loop,) = kernel.main_loops
    assert [i.address for i in loop.instructions] == [0x40, 0x50, 0x60, 0x70, 0x80]
    assert (loop.num_instructions, loop.num_mufu, loop.num_barriers, loop.depth) == (5, 1, 0, 2)
    assert (loop.loaded_bytes, loop.stored_bytes, loop.widths(instructions.LOADS)) == (16, 0, [128])
    outer = next(loop for loop in kernel.loops if loop.depth == 1 and loop.num_barriers)
    assert [i.address for i in outer.instructions] == [0x30, 0x90, 0xA0]


def test_what_the_scheduler_was_told_is_no_operand() -> None:
    kernel = parse(*(f"{line}      &req={{0}} &wr=0x1     ?WAIT5_END_GROUP" for line in NESTED))
    assert kernel.instructions == parse(*NESTED).instructions


def test_a_load_that_is_the_same_for_all_threads_is_no_stream() -> None:
    (loop, *_) = [loop for loop in parse(*NESTED).loops if not loop.depth]
    assert loop.loads == []
    assert [i.address for i in loop.stores] == [0xB0]


def test_a_marked_register_that_is_overwritten_is_no_longer_of_the_thread() -> None:
    code = ("S2R R2, SR_TID.X", "MOV R2, UR4", "LDG.E R4, desc[UR6][R2.64]", "EXIT")
    assert parse(*code).loops[-1].loads == []
    maybe = ("S2R R2, SR_TID.X", "@P0 MOV R2, UR4", "LDG.E R4, desc[UR6][R2.64]", "EXIT")
    assert len(parse(*maybe).loops[-1].loads) == 1


def test_what_is_loaded_is_not_of_the_thread() -> None:
    """A target's logit: its index was loaded from the row's place in another tensor."""
    code = ("S2R R0, SR_CTAID.X", "LDG.E R2, desc[UR6][R0.64]", "LDG.E.U16 R4, desc[UR6][R2.64]", "EXIT")
    assert parse(*code).loops[-1].loads == []


def test_threads_that_meet_go_on_where_their_own_region_ends() -> None:
    """Two regions with one barrier register: mixed up, the second would lie in a loop with the first."""
    code = (
        "BSSY B0, 0x40",  # 00
        "@P0 BRA 0x30",  # 10
        "NOP",  # 20
        "BSYNC B0",  # 30
        "S2R R0, SR_TID.X",  # 40
        "BSSY B0, 0x80",  # 50: from here on a loop
        "LDG.E R4, desc[UR6][R0.64]",  # 60
        "BSYNC B0",  # 70
        "@P1 BRA 0x50",  # 80
        "EXIT",  # 90
    )
    (loop,) = parse(*code).main_loops
    assert [i.address for i in loop.instructions] == [0x50, 0x60, 0x70, 0x80]


def test_a_loop_that_is_left_by_a_call_lies_in_the_loop_around_it() -> None:
    """As compilers for sm_80 leave loops; without it the outer loop would be taken for an innermost one."""
    code = (
        "S2R R0, SR_TID.X",  # 00
        "LDG.E.U16 R2, desc[UR6][R0.64]",  # 10: the outer loop begins
        "LDG.E.128 R4, desc[UR6][R0.64]",  # 20: the inner loop begins
        "@P1 CALL.REL.NOINC 0x50",  # 30
        "BRA 0x20",  # 40
        "BAR.SYNC.DEFER_BLOCKING 0x0",  # 50
        "@P0 BRA 0x10",  # 60
        "EXIT",  # 70
    )
    (loop,) = parse(*code).main_loops
    assert [i.address for i in loop.instructions] == [0x20, 0x30, 0x40]


def test_a_kernel_of_one_tile_a_block_is_all_of_it() -> None:
    (loop,) = parse("S2R R0, SR_TID.X", "LDG.E.64 R2, desc[UR4][R0.64]", "MUFU.EX2 R2, R2", "EXIT", "NOP").main_loops
    assert (loop.depth, loop.num_instructions, loop.moved_bytes) == (0, 4, 8)


def test_matrix_instructions_say_their_shape() -> None:
    kernel = parse(
        "UMOV UR8, 0x8200490",  # bfloat16, M = 8 << 4, N = 16 << 3
        "UMOV UR9, UR8",
        "HMMA.16816.F32.BF16 R4, R8, R10, R4",
        "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",
        "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR11], tmem[UR14], idesc[UR9], !UPT",
        "EXIT",
    )
    shapes = [(m.m, m.n, m.k, m.threads) for m in kernel.loops[-1].matrices]
    assert shapes == [(16, 8, 16, 32), (64, 256, 16, 128), (128, 128, 16, None)]
    one = 16 * 8 * 16 * 8 + 64 * 256 * 16 * 2 + 128 * 128 * 16  # of 8 warps, of 2 warp groups, of the block
    assert kernel.loops[-1].products(256) == one


def test_a_tile_is_counted_once_however_deep_its_products() -> None:
    """Two steps of two accumulators each, as a loop over K unrolled twice has them."""
    code = [f"HMMA.16816.F32.BF16 R{d}, R2, R3, R{d}" for d in (8, 12, 8, 12)]
    assert parse(*code, "EXIT").loops[-1].tile(32) == 2 * 16 * 8
    spilled = (code[0], "STL [R1], R8", *code[1:], "EXIT")
    assert parse(*spilled).loops[-1].tile(32) is None


# --- compiled kernels -------------------------------------------------------------------------------------------------

SOURCE = r"""
#include <cstdint>
__device__ float exp2_approx(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }

extern "C" __global__ void __launch_bounds__(256) copy(const uint4* x, uint4* y, int n) {
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += 256) y[i] = x[i];
}

// Four loads of 16 bytes in a pass of the main loop, 16 exponentials; what is left over goes one by one.
extern "C" __global__ void __launch_bounds__(512) sum_exp(const float4* x, float* out, const float* scale, int n) {
    float sum = 0;
    int i = threadIdx.x;
    const float factor = *scale;
    for (; i + 3 * 512 < n; i += 4 * 512) {
        float4 v[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) v[k] = x[i + k * 512];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            sum += exp2_approx(v[k].x * factor) + exp2_approx(v[k].y * factor);
            sum += exp2_approx(v[k].z * factor) + exp2_approx(v[k].w * factor);
        }
    }
#pragma unroll 1
    for (; i < n; i += 512) sum += exp2_approx(x[i].x);
    out[threadIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(128) barriers(const float* x, float* out, int n) {
    __shared__ float shared[128];
    float sum = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += 128) {
        shared[threadIdx.x] = x[i];
        __syncthreads();
        sum += shared[127 - threadIdx.x];
        __syncthreads();
    }
    out[threadIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(1024, 2) spills(const float* x, float* out, int n) {  // 32 registers each
    float v[64];
#pragma unroll
    for (int k = 0; k < 64; ++k) v[k] = x[k * 1024 + threadIdx.x];
#pragma unroll 1
    for (int i = 0; i < n; ++i)
#pragma unroll
        for (int k = 0; k < 64; ++k) v[k] = v[k] * v[(k + 7) % 64] + 1.0f;
#pragma unroll
    for (int k = 0; k < 64; ++k) out[k * 1024 + threadIdx.x] = v[k];
}

extern "C" __global__ void __launch_bounds__(64) products(const uint4* a, const uint2* b, float4* out, int n) {
    float4 c[2] = {};
#pragma unroll 1
    for (int i = 0; i < n; ++i) {
        const uint4 x = a[i * 64 + threadIdx.x];
        const uint2 y = b[i * 64 + threadIdx.x];
#pragma unroll
        for (int k = 0; k < 2; ++k)
            asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                         "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                         : "+f"(c[k].x), "+f"(c[k].y), "+f"(c[k].z), "+f"(c[k].w)
                         : "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(y.x + k), "r"(y.y));
    }
    out[threadIdx.x] = c[0];
    out[64 + threadIdx.x] = c[1];
}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, aot.Compiled]:
    try:
        aot.nvcc(), cubin.tool("cuobjdump")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    source = tmp_path_factory.mktemp("cuda") / "kernels.cu"
    source.write_text(SOURCE)
    return {kernel.kernel.name: kernel for kernel in aot.cuda_kernels([source], 90)}


@pytest.mark.slow
def test_a_copy_moves_16_bytes_each_way(compiled: dict[str, aot.Compiled]) -> None:
    (row,) = gpu_static.rows("", compiled["copy"])
    assert (row["load_bits"], row["store_bits"], row["elements"], row["bytes_per_element"]) == ([128], [128], 4, 8)
    assert (row["mufu_per_element"], row["barriers"], row["spills"], row["threads"]) == (0, 0, 0, 256)
    assert row["bound"] == "memory"


@pytest.mark.slow
def test_the_unrolled_loop_is_the_main_one(compiled: dict[str, aot.Compiled]) -> None:
    (row,) = gpu_static.rows("", compiled["sum_exp"])
    assert (row["load_bits"], row["elements"], row["mufu_per_element"]) == ([128], 16, 1)
    # A multiplication, an exponential and an addition each; beyond them 4 loads and the loop's own few.
    assert 3 + 4 / 16 <= row["instructions_per_element"] <= 4
    assert row["loop"] == "statistics"  # what is stored once, at the end, is no gradient


@pytest.mark.slow
def test_barriers_are_seen(compiled: dict[str, aot.Compiled]) -> None:
    (row,) = gpu_static.rows("", compiled["barriers"])
    assert (row["barriers"], row["elements"], row["load_bits"]) == (2, 1, [32])
    assert row["barriers_per_1024"] == 2 * 1024 / 128
    assert row["shared_bytes"] == 512


@pytest.mark.slow
def test_spills_are_seen(compiled: dict[str, aot.Compiled]) -> None:
    assert compiled["spills"].kernel.num_spills > 0
    assert compiled["spills"].kernel.registers == 32
    assert {name for name, kernel in compiled.items() if kernel.kernel.num_spills} == {"spills"}


@pytest.mark.slow
def test_products_are_counted_for_the_block(compiled: dict[str, aot.Compiled]) -> None:
    (loop,) = compiled["products"].kernel.main_loops
    assert loop.products(64) == 2 * 2 * 16 * 8 * 16  # two instructions, two warps
    assert loop.tile(64) == 2 * 2 * 16 * 8
    (row,) = gpu_static.rows("", compiled["products"])
    assert (row["matrix"], row["num_products"]) == ("mma 16x8x16", 1)


# --- the machines -----------------------------------------------------------------------------------------------------


def test_budgets_follow_from_the_data_sheets() -> None:
    """By hand: 67 Tflop/s are 33.5 T lanes a second, as many as are issued; 3.35 TB/s are 1.675 T elements a second."""
    assert gpu_static.MACHINES[90].budgets(2) == pytest.approx((20.0, 2.5))
    # 64 lanes: twice as many instructions are issued; 19.5 / 2 * 2 / (2.039 / 2)
    assert gpu_static.MACHINES[80].budgets(2) == pytest.approx((19.127, 2.391), rel=1e-3)
    assert gpu_static.MACHINES[100].budgets(2) == pytest.approx((9.375, 1.172), rel=1e-3)


# By hand: 64 registers are 2,048 a warp, 32 warps; 40 are 1,280, 51 warps, in fours 48; 100 KB of shared memory fit
# twice into 228; blocks of a warp are limited to 32; a block of 24 warps fits twice.
@pytest.mark.parametrize(
    ("registers", "threads", "shared", "expected"),
    [(64, 256, 0, 0.5), (40, 128, 0, 0.75), (32, 128, 100 << 10, 8 / 64), (32, 32, 0, 0.5), (32, 768, 0, 48 / 64)],
)
def test_occupancy(registers: int, threads: int, shared: int, expected: float) -> None:
    kernel = cubin.Kernel("", (), registers, shared, 0, threads)
    assert gpu_static.occupancy(aot.Compiled(kernel, 90, threads, shared, 2)) == expected


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cubin.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(Path("/nowhere")))
    with pytest.raises(FileNotFoundError, match="pip install triton"):
        cubin.tool("cuobjdump")
