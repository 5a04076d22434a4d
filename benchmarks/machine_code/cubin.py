"""The kernels of a cubin: the machine code of each, what it needs of a multiprocessor, and its main loops.

Nothing is compiled or run here, and nothing is known about a kernel beforehand; aot.py makes the cubins.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.machine_code.instructions import Instruction, matrix, parse
from benchmarks.machine_code.loops import Loop, blocks_of, natural_loops, streams_of

RESERVED_SHARED_BYTES = 1024  # per block, from sm_80 on, for the system


def tool(name: str) -> str:
    """Return the path of cuobjdump or nvdisasm: the one on PATH, else Triton's own; raises FileNotFoundError."""
    spec = importlib.util.find_spec("triton")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    candidates = [shutil.which(name) or "", *(f"{folder}/backends/nvidia/bin/{name}" for folder in folders)]
    path = next((path for path in candidates if Path(path).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{name} was not found; it comes with the CUDA toolkit and with: pip install triton")
    return path


@dataclass(frozen=True)
class Kernel:
    """A kernel's machine code, and what it needs of a multiprocessor."""

    name: str  # without namespaces and arguments
    instructions: tuple[Instruction, ...]
    registers: int
    shared_bytes: int  # known to the compiler, without the system's
    local_bytes: int  # stack included: where spilled registers go
    max_threads: int | None  # that it may be launched with, where it says

    @property
    def num_spills(self) -> int:
        """Instructions that write registers to local memory or read them back."""
        return sum(i.name in ("STL", "LDL") for i in self.instructions)

    @cached_property
    def loops(self) -> list[Loop]:
        """Every loop, outer ones without what inner ones do; last, at depth 0, what is in no loop."""
        blocks = blocks_of(self.instructions)
        found, streams = natural_loops(blocks), streams_of(blocks)
        all_ = self.instructions
        shapes = {i.address: m for n, i in enumerate(all_) if (m := matrix(i, all_[:n])) is not None}
        reached, waiting = {0}, [0]
        while waiting:
            for other in blocks[waiting.pop()].next:
                if other not in reached:
                    reached.add(other)
                    waiting.append(other)
        loops = []
        for head, body in {**found, -1: reached}.items():
            inside = [other for h, other in found.items() if h != head and other <= body and other != body]
            own = sorted(body.difference(*inside))
            depth = sum(body <= other for other in found.values())
            instructions = tuple(i for b in own for i in blocks[b].instructions)
            matrices = tuple(shapes[i.address] for i in instructions if i.address in shapes)
            enclosed = frozenset(i.address for b in body.difference(own) for i in blocks[b].instructions)
            loops.append(Loop(instructions, streams, matrices, depth, enclosed))
        return loops

    @property
    def main_loops(self) -> list[Loop]:
        """The innermost loops, where the time is spent.

        All that multiply matrices; where there are none, the widest that only reads and the widest that also writes. A
        loop of the same kind with narrower accesses handles the remainder. A kernel whose blocks do one tile each has
        no loop: then it is the whole kernel.
        """
        loops = [loop for loop in self.loops if loop.depth]
        products = _innermost([loop for loop in loops if loop.matrices])
        if products:
            return sorted(products, key=_address)
        streaming = _innermost([loop for loop in loops if loop.moved_bytes])
        chosen: list[Loop] = []
        for writes in (False, True):
            kind = [loop for loop in streaming if bool(loop.stores) == writes]
            chosen += sorted((loop for loop in kind if _weight(loop) == max(map(_weight, kind))), key=_address)
        return chosen or [loop for loop in self.loops if not loop.depth and loop.moved_bytes]


def _address(loop: Loop) -> int:
    return loop.instructions[0].address


def _innermost(loops: Sequence[Loop]) -> list[Loop]:
    """Those of some loops that enclose no other of them: outer ones go over rows, or have a first pass peeled off."""
    heads = {_address(loop) for loop in loops}
    return [loop for loop in loops if not loop.encloses & heads]


def _weight(loop: Loop) -> tuple[int, int, int]:
    """Of two loops of one kind, the one with exponentials, then wider accesses, then more of them, is the main one."""
    accesses = (*loop.loads, *loop.stores)
    return min(loop.num_mufu, 1), min((i.num_bytes for i in accesses), default=0), loop.moved_bytes


def _readable(mangled: str) -> str:
    """Return "token_stats_fwd_kernel<__nv_bfloat16, Linear>" for what a C++ compiler made of it."""
    program = shutil.which("c++filt")  # a part of binutils, as the linker that nvcc needs
    if program is None or not mangled.startswith("_Z"):
        return mangled
    name = _run(program, mangled).strip().replace("(anonymous namespace)", "anonymous")
    name = re.sub(r"\(.*\)$", "", name).removeprefix("void ")
    return re.sub(r"\w+::", "", name)


def _run(*arguments: str) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments[:2])}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def read(cubin: bytes) -> list[Kernel]:
    """Return the kernels of a cubin; raises RuntimeError where the tool cannot read it."""
    program = tool("cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        code = parse(_run(program, "-sass", str(path)))
        usage = _run(program, "-res-usage", str(path))
        sections = _run(program, "-elf", str(path))
    found = re.search(r"\bsm=(\d+)", sections)
    if found is None:
        raise RuntimeError("cuobjdump -elf names no architecture; a cubin of one architecture is needed")
    architecture, kernels = int(found[1]), []
    for name, line in re.findall(r"Function (\S+):\s*\n\s*(.*)", usage):
        needs = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        shared = needs["SHARED"] - (RESERVED_SHARED_BYTES if architecture >= 90 else 0)  # counted in from there on
        local = max(needs["STACK"], needs["LOCAL"])
        threads = _max_threads(sections, name)
        kernels.append(Kernel(_readable(name), code[name], needs["REG"], max(shared, 0), local, threads))
    return kernels


def _max_threads(sections: str, name: str) -> int | None:
    """Threads that the kernel was compiled for (CUDA's __launch_bounds__, Triton's num_warps)."""
    match = re.search(rf"^\.nv\.info\.{re.escape(name)}\n(.*?)(?=\n\.|\Z)", sections, re.DOTALL | re.MULTILINE)
    threads = match and re.search(r"EIATTR_(?:MAX_THREADS|REQNTID)\n.*\n\s*Value:\s*((?:0x[0-9a-f]+\s*)+)", match[1])
    if not threads:
        return None
    x, y, z = (int(value, 16) for value in threads[1].split()[:3])
    return x * y * z
