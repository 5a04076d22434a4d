"""Our GPU kernels' machine code and the peers', per element, against the GPU's limits; needs compilers, but no GPU.

Kernels that stream logits are counted per element of their main loop, matrix kernels per sum of a tile. Times are lower
bounds: what the busiest unit needs at its data-sheet rate, without latencies.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.harness import OURS, clean, explain
from benchmarks.machine_code import aot, cubin, ours, peers
from benchmarks.machine_code.aot import Compiled
from benchmarks.machine_code.instructions import BULK_LOADS, LOADS, STORES, WARP
from benchmarks.machine_code.loops import Loop
from benchmarks.machine_code.peers import HIDDEN, VOCAB
from edge_kernels.info import version_of

OURS_CUDA, OURS_TRITON, OURS_HEAD = f"{OURS}, CUDA", f"{OURS}, Triton", f"{OURS}, Triton, fused head"
Row = dict[str, Any]  # one main loop of one kernel, or one kernel that multiplies: JSON


class Machine(NamedTuple):
    """A GPU by its data sheet. An FMA counts as two flops there."""

    name: str
    bandwidth: float  # bytes/s
    fp32_flops: float  # without tensor cores
    fp32_lanes: int  # of a multiprocessor
    tensor_flops: float  # bfloat16, dense
    shared_bytes: int  # of a multiprocessor

    @property
    def multiprocessor_clocks(self) -> float:
        """Clocks per second, of all multiprocessors together: each does ``fp32_lanes`` FMAs in one."""
        return self.fp32_flops / 2 / self.fp32_lanes

    @property
    def instructions(self) -> float:
        """Instructions of one thread per second: four schedulers issue one for a warp in each clock."""
        return self.multiprocessor_clocks * 4 * WARP

    @property
    def mufu(self) -> float:
        """Special-function operations per second: 16 in each clock."""
        return self.multiprocessor_clocks * 16

    @property
    def products(self) -> float:
        """Multiply-adds per second on the tensor cores."""
        return self.tensor_flops / 2

    def budgets(self, num_bytes: float) -> tuple[float, float]:
        """Return the instructions and special-function operations that fit into moving ``num_bytes``."""
        return self.instructions / self.bandwidth * num_bytes, self.mufu / self.bandwidth * num_bytes


# NVIDIA's data sheets: A100 80GB SXM, H100 SXM, HGX B200 (per GPU, the lower of the published float32 rates).
MACHINES = {
    80: Machine("A100 80GB SXM", 2.039e12, 19.5e12, 64, 312e12, 164 << 10),
    90: Machine("H100 SXM", 3.35e12, 67e12, 128, 989e12, 228 << 10),
    100: Machine("B200", 8.0e12, 75e12, 128, 2250e12, 228 << 10),
}
WARPS, BLOCKS, REGISTERS = 64, 32, 65_536  # of a multiprocessor, on all three


def occupancy(compiled: Compiled) -> float:
    """Return the share of a multiprocessor's warp slots that fit; unknown shared memory does not count."""
    warps = math.ceil(compiled.threads / WARP)
    each = math.ceil(compiled.kernel.registers * WARP / 256) * 256
    by_registers = REGISTERS // each // 4 * 4 // warps
    shared = (compiled.shared_bytes or 0) + cubin.RESERVED_SHARED_BYTES
    by_shared = MACHINES[compiled.architecture].shared_bytes // shared
    return min(BLOCKS, WARPS // warps, by_registers, by_shared) * warps / WARPS


# --- rows of the tables -----------------------------------------------------------------------------------------------


def rows(owner: str, compiled: Compiled) -> list[Row]:
    """Return a row for each main loop of a kernel, or one for all of them if they multiply matrices."""
    kernel = compiled.kernel
    common = {
        "owner": owner,
        "kernel": kernel.name,
        "architecture": compiled.architecture,
        "registers": kernel.registers,
        "spills": kernel.num_spills,
        "shared_bytes": compiled.shared_bytes,
        "threads": compiled.threads,
        "occupancy": occupancy(compiled),
        "itemsize": compiled.itemsize,
        "uses_copy_engine": any(i.name in BULK_LOADS for i in kernel.instructions),
    }
    loops = kernel.main_loops
    if any(loop.matrices for loop in loops):
        return [common | _products(compiled, loops)]
    return [common | _stream(compiled, loop) for loop in loops]


def _stream(compiled: Compiled, loop: Loop) -> Row:
    machine = MACHINES[compiled.architecture]
    elements = loop.moved_bytes / compiled.itemsize  # of a thread, in one pass
    num_bytes = (loop.loaded_bytes + loop.stored_bytes) / elements
    instructions, mufu = loop.num_instructions / elements, loop.num_mufu / elements
    allowed = machine.budgets(num_bytes)
    seconds = {
        "memory": num_bytes / machine.bandwidth,
        "issue": instructions / machine.instructions,
        "MUFU": mufu / machine.mufu,
    }
    resident = occupancy(compiled) * WARPS * WARP
    return {
        "loop": "statistics" if not loop.stores else "gradient" if loop.loads else "gradient of what was kept",
        "is_loop": loop.depth > 0,
        "load_bits": loop.widths(LOADS),
        "store_bits": loop.widths(STORES),
        "elements": elements,
        "instructions_per_element": instructions,
        "mufu_per_element": mufu,
        "barriers": loop.num_barriers,
        "barriers_per_1024": loop.num_barriers * 1024 / (elements * compiled.threads),
        "shuffles_per_element": loop.num_shuffles / elements,
        "bytes_per_element": num_bytes,
        "instructions_allowed": allowed[0],
        "mufu_allowed": allowed[1],
        "bytes_in_flight": loop.loaded_bytes * resident,
        **_bound(seconds, "memory"),
    }


def _products(compiled: Compiled, loops: Sequence[Loop]) -> Row:
    """Per sum of the first loop's tile, with ``HIDDEN`` multiply-adds in each of the loops."""
    machine, threads = MACHINES[compiled.architecture], compiled.threads
    loops = [loop for loop in loops if loop.matrices]
    in_loops = sum(loop.num_instructions * threads / loop.products(threads) for loop in loops) * HIDDEN
    tile = loops[0].tile(threads)
    once = [i for loop in compiled.kernel.loops for i in loop.instructions if loop not in loops]
    counted: dict[str, float | None] = {"instructions_once": None, "mufu_once": None}
    if tile is not None:
        counted["instructions_once"] = sum(i.name != "NOP" for i in once) * threads / tile
        counted["mufu_once"] = sum(i.name == "MUFU" for i in compiled.kernel.instructions) * threads / tile
    seconds = {
        "tensor cores": len(loops) * HIDDEN / machine.products,
        "issue": (in_loops + (counted["instructions_once"] or 0)) / machine.instructions,
        "MUFU": (counted["mufu_once"] or 0) / machine.mufu,
    }
    first = loops[0].matrices[0]
    name = {WARP: "mma", 4 * WARP: "wgmma", None: "tcgen05"}[first.threads]
    return {
        "loop": "products",
        "matrix": f"{name} {first.m}x{first.n}x{first.k}",
        "num_products": len(loops),
        "tile": tile,
        "load_bits": sorted({bits for loop in loops for bits in loop.widths(LOADS)}),
        "store_bits": sorted({bits for loop in loops for bits in loop.widths(STORES)}),
        "barriers": sum(loop.num_barriers for loop in loops),
        **counted,
        **_bound(seconds, "tensor cores"),
    }


def _bound(seconds: dict[str, float], floor: str) -> Row:
    bound = max(seconds, key=lambda unit: seconds[unit])
    return {"seconds_per_element": seconds, "bound": bound, "times_floor": seconds[bound] / seconds[floor]}


# --- contenders -------------------------------------------------------------------------------------------------------


def contenders() -> dict[str, Callable[[int], list[Compiled]]]:
    """Return, by owner, what compiles the owner's kernels for an architecture."""

    def triton(launcher: Callable[[int], None]) -> Callable[[int], list[Compiled]]:
        return lambda architecture: aot.launches(lambda: launcher(architecture), architecture)

    kernels = {
        OURS_CUDA: ours.cuda_kernels,
        OURS_TRITON: triton(ours.triton_logits),
        OURS_HEAD: triton(ours.triton_head),
    }
    for name, (package, launch) in peers.PEERS.items():
        kernels[f"{name} ({version_of(package) or 'not installed'})"] = triton(launch)
    return kernels


def collect(architectures: Sequence[int]) -> tuple[list[Row], dict[str, str]]:
    """Return the rows of all kernels, and the reason for each owner that is missing."""
    found: list[Row] = []
    missing: dict[str, str] = {}
    for owner, kernels in contenders().items():
        for architecture in architectures:
            try:
                compiled = kernels(architecture)
            except Exception as error:  # a broken installation can raise anything
                missing[owner] = explain(error)
                break
            for row in (row for each in compiled for row in rows(owner, each)):
                if row not in found:  # the same code, for another value of an argument
                    found.append(row)
    return found, missing


# --- tables -----------------------------------------------------------------------------------------------------------


def balance() -> Iterator[str]:
    """Yield lines: what a loop bound by memory may spend per element, and why."""
    yield "Machine balance, from data sheets. A lane does 2 flops a clock: clocks/s of all multiprocessors together are"
    yield "float32 flops / 2 / lanes. In a clock each issues an instruction for 4 warps and does 16 special functions."
    for architecture, machine in MACHINES.items():
        instructions, mufu = machine.budgets(2)
        teras = [value / 1e12 for value in (machine.bandwidth, machine.fp32_flops, machine.tensor_flops)]
        yield (
            f"  sm_{architecture:<4}{machine.name:14} {teras[0]:5.2f} TB/s, {teras[1]:5.1f} Tflop/s float32 in"
            f" {machine.fp32_lanes:3} lanes, {teras[2]:5.0f} bfloat16: {instructions:4.1f} instructions and {mufu:4.2f}"
            f" MUFU per bfloat16 read, {machine.products / machine.instructions * WARP:3.0f} multiply-adds per"
            " instruction of a warp"
        )


STREAM = (
    f"{'':58} {'regs':>4} {'spill':>5} {'smem':>6} {'occ':>4} {'bits':>9} {'instr':>6} {'of':>5} {'MUFU':>5} {'of':>5}"
    f" {'barriers':>8} {'bytes':>5}  bound by, x memory"
)
PRODUCTS = (
    f"{'':58} {'regs':>4} {'spill':>5} {'smem':>6} {'occ':>4} {'bits':>9} {'shape':22} {'tile':>6} {'barriers':>8}"
    f" {'instr once':>10} {'MUFU':>5}  bound by, x tensor cores"
)


def tables(found: Sequence[Row]) -> Iterator[str]:
    """Yield lines: for each architecture a table of the loops over logits, then one of the products."""
    streams = [row for row in found if row["loop"] != "products"]
    for title, chosen, line in (
        ("Loops over memory: per element; barriers per 1,024 elements of a block", streams, _stream_line),
        (
            f"Products, D = {HIDDEN:,}: per sum of a tile; barriers per pass",
            [row for row in found if row["loop"] == "products"],
            _product_line,
        ),
    ):
        for architecture in dict.fromkeys(row["architecture"] for row in chosen):
            yield f"\n{title}, sm_{architecture}"
            yield STREAM if chosen is streams else PRODUCTS
            owner = ""
            for row in (row for row in chosen if row["architecture"] == architecture):
                if row["owner"] != owner:
                    owner = row["owner"]
                    yield f"  {owner}"
                yield line(row)


def _needs(row: Row) -> str:
    loads = [*map(str, row["load_bits"]), *(["TMA"] if row["uses_copy_engine"] else [])]
    bits = f"{','.join(loads) or '-'}/{','.join(map(str, row['store_bits'])) or '-'}"
    shared = "launch" if row["shared_bytes"] is None else f"{row['shared_bytes'] / 1024:.1f}K"
    return f"{row['registers']:4} {row['spills']:5} {shared:>6} {row['occupancy']:4.0%} {bits:>9}"


def _short(row: Row) -> str:
    return row["kernel"].replace("_kernel", "").replace("__nv_", "").replace("efficient_entropy_", "")


def _stream_line(row: Row) -> str:
    kind = f"{_short(row)[:38]}, {row['loop'] if row['is_loop'] else 'one tile'}"[:54]
    return (
        f"    {kind:54} {_needs(row)} {row['instructions_per_element']:6.2f} {row['instructions_allowed']:5.1f}"
        f" {row['mufu_per_element']:5.2f} {row['mufu_allowed']:5.2f} {row['barriers_per_1024']:8.2f}"
        f" {row['bytes_per_element']:5.1f}  {row['bound']}, {row['times_floor']:.2f}"
    )


def _product_line(row: Row) -> str:
    tile, once, mufu = "?", "?", "?"
    if row["tile"] is not None:
        tile, once, mufu = f"{row['tile']:,}", f"{row['instructions_once']:.1f}", f"{row['mufu_once']:.2f}"
    shape = f"{row['num_products']} x {row['matrix']}"
    return (
        f"    {_short(row)[:54]:54} {_needs(row)} {shape:22} {tile:>6} {row['barriers']:8} {once:>10} {mufu:>5}"
        f"  {row['bound']}, {row['times_floor']:.2f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_static", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--arch", type=int, choices=MACHINES, action="append", help="only this architecture, for example 90; repeatable"
    )
    options = parser.parse_args()
    found, missing = collect(options.arch or list(MACHINES))
    print(f"V = {VOCAB:,}, bfloat16; Triton {version_of('triton') or 'not installed'}")
    print("\n".join(balance()))
    print("\n".join(tables(found)))
    for owner, reason in missing.items():
        print(f"\n{owner} is left out: {reason}")
    about = {f"sm_{key}": machine._asdict() for key, machine in MACHINES.items()}
    print(json.dumps(clean({"machines": about, "kernels": found, "missing": missing})))
    return int(any(owner.startswith(OURS) for owner in missing))


if __name__ == "__main__":
    sys.exit(main())
