"""Triton's kernels without a GPU: their arithmetic under the interpreter, in a process of its own, and their machine
code for each architecture, as a GPU's launch would compile them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from backends import INTERPRETING
from paths import ROOT

triton = pytest.importorskip("triton", reason="needs the extra: pip install '.[triton]'")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(INTERPRETING, reason="is what runs the interpreter, or compiles"),
]


def test_under_the_interpreter() -> None:
    """The statistics pass the very tests that the other backends pass; the rest has tests of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/kernels/ops/test_token_stats.py",
        "tests/kernels/backends/interpreted",
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None, result.stdout
    assert int(passed[1]) > 200  # not that half of them was not collected


# --- machine code -----------------------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    address: int
    opcode: str
    operands: str


class MachineCode(NamedTuple):
    instructions: list[Instruction]
    text: str  # PTX, or AMD's assembly
    name: str

    def opcodes(self, *prefixes: str) -> list[str]:
        return [item.opcode for item in self.instructions if item.opcode.startswith(prefixes)]

    def main_loops(self) -> Iterator[list[str]]:
        """Yield the opcodes of each innermost loop that reads global memory."""
        for item in self.instructions:
            target = re.search(r"0x([0-9a-f]+)", item.operands) if item.opcode.startswith("BRA") else None
            if target and (start := int(target[1], 16)) < item.address:
                body = [i for i in self.instructions if start <= i.address <= item.address]
                inner = [i for i in body[:-1] if i.opcode.startswith("BRA") and i.operands != item.operands]
                if not inner and any(i.opcode.startswith("LDG") for i in body):
                    yield [i.opcode for i in body]


def compile_kernel(item, capability: int | str, folder: Path) -> MachineCode:  # type: ignore[no-untyped-def]
    target = GPUTarget("hip", "gfx942", 64) if capability == "hip" else GPUTarget("cuda", capability, 32)
    source = ASTSource(item.kernel, item.signature, item.constexprs, item.attributes)
    compiled = triton.compile(source, target=target, options=item.options)
    if capability == "hip":
        return MachineCode([], compiled.asm["amdgcn"], item.name)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listing = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    line = re.compile(r"\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
    found = [Instruction(int(m[1], 16), m[2], m[3]) for m in map(line.match, listing.splitlines()) if m]
    assert found, listing
    return MachineCode(found, compiled.asm["ptx"], item.name)


def chosen(capability: int | str) -> list:  # type: ignore[type-arg]
    """Every kernel for bfloat16, and for sm_90 those over rows for float32 too: a matrix product without matrix
    instructions takes half a minute to compile.
    """
    from edge_kernels.backends.triton import aot

    found = []
    for item in aot.kernels(capability):
        is_float32 = capability == 90 and item.name.endswith("fp32") and not item.name.startswith("linear")
        if item.name.endswith("bf16") or is_float32:
            found.append(item)
    return found


# With what a bfloat16 logit may cost in the loop of the forward pass: instructions, and special-function operations,
# of which sm_90 has 17.7 and 2.2 to spend while memory delivers it.
@pytest.mark.parametrize(("capability", "instructions"), [(80, 9.0), (90, 9.0), (100, 8.8), (120, 9.0)])
def test_budgets(capability: int, instructions: float, tmp_path: Path) -> None:
    matrix_instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}[capability]
    for item in chosen(capability):
        code = compile_kernel(item, capability, tmp_path)
        assert not code.opcodes("LDL", "STL"), f"{item.name} spills registers"
        if item.elements_per_iteration is not None:
            loops = list(code.main_loops())
            assert len(loops) == item.passes, item.name
            for loop in loops:
                assert all(".128" in op or ".256" in op for op in loop if op.startswith(("LDG", "STG"))), item.name
                assert not any(op.startswith(("BAR", "SHFL", "LDS", "STS")) for op in loop), item.name
            if item.name.startswith("token_stats_fwd") and "softcap" not in item.name and item.element_bytes == 2:
                (loop,) = loops
                assert len(loop) / item.elements_per_iteration <= instructions, item.name
                special = sum(op.startswith("MUFU") for op in loop)
                assert special / item.elements_per_iteration <= 1.13, item.name
        if item.name.startswith(("linear_fwd", "linear_bwd")) and item.element_bytes == 2:
            assert matrix_instruction in code.text, item.name


def test_every_option_compiles(tmp_path: Path) -> None:
    from edge_kernels.backends.triton import aot

    for item in aot.variants(90):
        compile_kernel(item, 90, tmp_path)


def test_compiles_for_rocm(tmp_path: Path) -> None:
    """Wide accesses, matrix instructions and no spills there too; nothing in the kernels is NVIDIA's."""
    for item in chosen("hip"):
        text = compile_kernel(item, "hip", tmp_path).text
        assert ".vgpr_spill_count: 0" in text, item.name
        if item.elements_per_iteration is not None:
            assert re.search(r"(global|buffer)_load_dwordx4", text), item.name
        if item.name.startswith(("linear_fwd", "linear_bwd")):
            assert "v_mfma" in text, item.name
