"""NVIDIA machine code read from a cubin: what a kernel needs, its loops, and what one pass of a loop does.

Nothing is compiled or run here, and nothing is known about a kernel beforehand: loops come from the control flow, the
elements of a pass from the widths of its accesses or the shapes of its matrix instructions. aot.py makes the cubins.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path

WARP = 32  # threads
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


# --- instructions -----------------------------------------------------------------------------------------------------

LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
REGISTER = re.compile(r"\b(U?R)(\d+)((?:\.\w+)*)")
LOADS = ("LDG", "LDGSTS", "LD")  # from global memory, with a width
BULK_LOADS = ("UTMALDG", "UBLKCP")  # by the copy engine: no width in the instruction
STORES = ("STG", "ST", "RED", "REDG", "ATOMG")
THREAD_INDEX = re.compile(r"SR_(TID|LANEID)")
NO_RESULT = {*STORES, "STS", "STL", "BAR", "BRA", "EXIT", "RET", "BSSY", "BSYNC", "UTMALDG", "LDGSTS", "WARPSYNC"} - {
    "ATOMG"
}


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # "P0", "!P3", or "" where it always runs
    opcode: str  # with its modifiers: "LDG.E.128"
    operands: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def num_bytes(self) -> int:
        """Bytes that an access to memory moves for one thread."""
        modifiers = self.opcode.split(".")[1:]
        for modifier, size in (("256", 32), ("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
            if modifier in modifiers:
                return size
        return 4

    @property
    def is_barrier(self) -> bool:
        return self.name == "BAR"

    @property
    def target(self) -> int | None:
        """Where a branch goes, None where it is no branch or goes where a register says."""
        if self.name in ("BRA", "BSSY", "CALL") and re.fullmatch(r"0x[0-9a-f]+", self.operands[-1]):
            return int(self.operands[-1], 16)
        return None

    @property
    def defined(self) -> tuple[str, ...]:
        """Registers written."""
        if self.name in NO_RESULT:
            return ()
        for operand in self.operands[:2]:
            if match := REGISTER.fullmatch(operand):
                return _registers(match, self._num_registers)
        return ()

    @property
    def used(self) -> tuple[str, ...]:
        """Registers read, but for predicates."""
        operands = list(self.operands)
        if self.defined:
            first = next(i for i, operand in enumerate(operands) if REGISTER.fullmatch(operand))
            del operands[: first + 1]
        names: list[str] = []
        for position, operand in enumerate(operands):
            is_last = position == len(operands) - 1
            for match in REGISTER.finditer(operand):
                is_pair = ".64" in match[3] or ".64" in self.opcode or (".WIDE" in self.opcode and is_last)
                names += _registers(match, 2 if is_pair else 1)
        return tuple(names)

    @property
    def _num_registers(self) -> int:
        if self.name in LOADS or self.name in ("LDS", "LDL", "LDC", "ULDC", "LDCU"):
            return max(1, self.num_bytes // 4)
        return 2 if ".64" in self.opcode or ".WIDE" in self.opcode else 1


def _registers(match: re.Match[str], count: int) -> tuple[str, ...]:
    return tuple(f"{match[1]}{int(match[2]) + i}" for i in range(count))


@dataclass(frozen=True)
class Matrix:
    """A tensor-core instruction: (m x k) times (k x n), and where its m x n sums go and what they are added to."""

    m: int
    n: int
    k: int
    sums: str
    addend: str | None
    threads: int | None  # that issue it together: a warp, four of them, or (None) one for the whole block

    def share(self, threads: int) -> float:
        """Of how many such instructions a block of so many threads does one at a time."""
        return 1 if self.threads is None else threads / self.threads


def matrix(instruction: Instruction, before: Sequence[Instruction]) -> Matrix | None:
    """Return the shape of a matrix instruction: mma (HMMA), wgmma (HGMMA) or tcgen05.mma (UTCHMMA); None of another.

    The last says its shape in a register, set by one of the instructions ``before``.
    """
    modifiers = instruction.opcode.split(".")[1:]
    if instruction.name == "HMMA":
        m, n, k = {"16816": (16, 8, 16), "1688": (16, 8, 8)}[modifiers[0]]
        return Matrix(m, n, k, instruction.operands[0], instruction.operands[3], WARP)
    if instruction.name == "HGMMA":
        m, n, k = map(int, modifiers[0].split("x"))
        registers = [operand for operand in instruction.operands[1:] if REGISTER.fullmatch(operand) or operand == "RZ"]
        return Matrix(m, n, k, instruction.operands[0], registers[-1], 4 * WARP)  # the factors may be registers too
    if instruction.name == "UTCHMMA":
        register = next(operand for operand in instruction.operands if operand.startswith("idesc"))
        value = _constant(register.removeprefix("idesc[").removesuffix("]"), before)
        m, n = (value >> 24 & 0x1F) << 4, (value >> 17 & 0x3F) << 3  # PTX, "Instruction descriptor", kind::f16
        memory = instruction.operands[2]
        return Matrix(m, n, 16, memory, memory, None)
    return None


def _constant(register: str, before: Sequence[Instruction]) -> int:
    """The constant that a uniform register holds, moved there by the last of the instructions ``before``."""
    for number in range(len(before) - 1, -1, -1):
        if register in before[number].defined:
            source = before[number].operands[-1]
            if before[number].name == "UMOV":
                return int(source, 16) if source.startswith("0x") else _constant(source, before[:number])
            break
    raise ValueError(f"{register}, the shape of a matrix instruction, is not set by a constant")


# --- loops ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """Instructions of one loop without those of loops inside it; a kernel without loops is one that runs once."""

    instructions: tuple[Instruction, ...]
    streams: frozenset[int]  # addresses of those that access global memory at a place that depends on the thread
    matrices: tuple[Matrix, ...]
    depth: int  # 0: not a loop at all
    encloses: frozenset[int]  # addresses of instructions of the loops inside it

    def _streaming(self, names: Sequence[str]) -> list[Instruction]:
        return [i for i in self.instructions if i.name in names and i.address in self.streams]

    @cached_property
    def loads(self) -> list[Instruction]:
        return self._streaming(LOADS)

    @cached_property
    def stores(self) -> list[Instruction]:
        return self._streaming(STORES)

    @property
    def num_instructions(self) -> int:
        """All that any path through the loop issues, an upper bound where it branches."""
        return sum(i.name != "NOP" for i in self.instructions)

    @property
    def num_mufu(self) -> int:
        """Special-function operations: exponentials, reciprocals and the like."""
        return sum(i.name == "MUFU" for i in self.instructions)

    @property
    def num_barriers(self) -> int:
        return sum(i.is_barrier for i in self.instructions)

    @property
    def num_shuffles(self) -> int:
        """Exchanges between the lanes of a warp."""
        return sum(i.name in ("SHFL", "REDUX", "CREDUX") for i in self.instructions)

    @property
    def loaded_bytes(self) -> int:
        return sum(i.num_bytes for i in self.loads)

    @property
    def stored_bytes(self) -> int:
        return sum(i.num_bytes for i in self.stores)

    @property
    def moved_bytes(self) -> int:
        """Of what one thread streams in one pass: what it reads, or what it writes where that is more."""
        return max(self.loaded_bytes, self.stored_bytes)

    def products(self, threads: int) -> int:
        """Multiply-adds on the tensor cores in one pass of a block of so many threads."""
        return round(sum(shape.m * shape.n * shape.k * shape.share(threads) for shape in self.matrices))

    def tile(self, threads: int) -> int | None:
        """Sums that a block of so many threads adds to in one pass, None where spilled registers hide which."""
        in_registers = any(shape.threads == WARP for shape in self.matrices)
        if in_registers and any(i.name in ("LDL", "STL") for i in self.instructions):
            return None
        total, written = 0.0, set[str]()
        for shape in self.matrices:
            if shape.addend not in written:  # else it goes on with sums that were counted
                total += shape.m * shape.n * shape.share(threads)
            written -= {shape.addend or ""}
            written.add(shape.sums)
        return round(total)

    def widths(self, names: Sequence[str]) -> list[int]:
        """Bits of each access."""
        return sorted({i.num_bytes * 8 for i in self._streaming(names)})


@dataclass
class _Block:
    instructions: list[Instruction]
    next: list[int] = field(default_factory=list)
    previous: list[int] = field(default_factory=list)


def _blocks(instructions: Sequence[Instruction]) -> list[_Block]:
    """Basic blocks in the order of their addresses, with where control goes from each."""
    ends = ("BRA", "BRX", "JMP", "EXIT", "RET", "BSYNC", "CALL")
    starts = {instructions[0].address} | {i.target for i in instructions if i.target is not None}
    starts |= {b.address for a, b in pairwise(instructions) if a.name in ends}
    blocks: list[_Block] = []
    for instruction in instructions:
        if instruction.address in starts:
            blocks.append(_Block([]))
        blocks[-1].instructions.append(instruction)
    index = {block.instructions[0].address: number for number, block in enumerate(blocks)}
    regions = [i for i in instructions if i.name == "BSSY"]
    for number, block in enumerate(blocks):
        last = block.instructions[-1]
        # A call may return, or be a jump out of a loop in disguise.
        conditional = bool(last.guard) or last.name == "CALL" or (last.name == "BRA" and len(last.operands) > 1)
        targets = []
        if last.name in ("BRA", "CALL") and last.target is not None:
            targets.append(last.target)
        if last.name == "BSYNC":
            targets += _meeting_points(last, regions)
        block.next = [index[target] for target in targets if target in index]
        if (conditional or last.name not in ends or (last.name == "BSYNC" and not targets)) and number + 1 < len(
            blocks
        ):
            block.next.append(number + 1)
        for other in block.next:
            blocks[other].previous.append(number)
    return blocks


def _meeting_points(sync: Instruction, regions: Sequence[Instruction]) -> list[int]:
    """Where threads go on after a BSYNC: the end of the region (BSSY) around it that uses the same barrier register."""
    same = [(i.address, i.target) for i in regions if i.operands[0] == sync.operands[0] and i.target is not None]
    around = [end for start, end in same if start < sync.address < end]
    return [min(around)] if around else [end for _, end in same]


def _dominators(blocks: Sequence[_Block]) -> list[set[int]]:
    everything = set(range(len(blocks)))
    dominators = [{0}, *(set(everything) for _ in blocks[1:])]
    changed = True
    while changed:
        changed = False
        for number, block in enumerate(blocks[1:], 1):
            before = [dominators[p] for p in block.previous]
            new = ({number} | set.intersection(*before)) if before else set(everything)
            if new != dominators[number]:
                dominators[number], changed = new, True
    return dominators


def _natural_loops(blocks: Sequence[_Block]) -> dict[int, set[int]]:
    """The first block of each loop, and all its blocks: those that come back to it without leaving through it."""
    dominators = _dominators(blocks)
    loops: dict[int, set[int]] = {}
    for number, block in enumerate(blocks):
        if number and not block.previous:
            continue
        for head in block.next:
            if head not in dominators[number]:
                continue
            body, waiting = loops.setdefault(head, {head}), [number]
            while waiting:
                current = waiting.pop()
                if current not in body:
                    body.add(current)
                    waiting += blocks[current].previous
    return loops


def _streams(blocks: Sequence[_Block]) -> frozenset[int]:
    """Addresses of the accesses to global memory whose place depends on the thread's index: not those of scalars.

    A forward pass over the control flow: what is computed from the index is marked, what is loaded is not.
    """
    outgoing: list[set[str]] = [set() for _ in blocks]
    found: set[int] = set()
    changed = True
    while changed:
        changed = False
        for number, block in enumerate(blocks):
            marked = set().union(*(outgoing[p] for p in block.previous))
            for i in block.instructions:
                of_thread = any(THREAD_INDEX.search(operand) for operand in i.operands)
                is_access = i.name in LOADS or i.name in STORES
                # Of a store only the address counts: the first operand with brackets, not the value.
                used = i.used if not is_access else _in_brackets(i)
                of_thread = of_thread or any(name in marked for name in used)
                if is_access and of_thread:
                    found.add(i.address)
                if of_thread and not is_access and i.name not in ("LDS", "LDL", "LDC", "LDCU", "SHFL"):
                    marked |= set(i.defined)
                elif not i.guard:
                    marked -= set(i.defined)
            if marked != outgoing[number]:
                outgoing[number], changed = marked, True
    return frozenset(found)


def _in_brackets(instruction: Instruction) -> tuple[str, ...]:
    names: list[str] = []
    for operand in instruction.operands:
        for part in re.findall(r"\[([^\]]*)\]", operand):
            for match in REGISTER.finditer(part):
                names += _registers(match, 2 if ".64" in match[3] else 1)
    return tuple(names)


# --- kernels ----------------------------------------------------------------------------------------------------------


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
        blocks = _blocks(self.instructions)
        found, streams = _natural_loops(blocks), _streams(blocks)
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
        """The loops that the time goes into, innermost ones.

        Of loops that multiply matrices all; else the widest that only read, and the widest that write too. A loop of
        the same kind with narrower accesses treats what is left over. A kernel whose blocks do one tile each has no
        loop: then it is all of it.
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
        code = _parse(_run(program, "-sass", str(path)))
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


def _parse(text: str) -> dict[str, tuple[Instruction, ...]]:
    functions: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            current = functions.setdefault(match[1], [])
        elif match := LINE.match(line):
            operands = tuple(part.strip().removesuffix(".reuse") for part in match[4].split(",")) if match[4] else ()
            current.append(Instruction(int(match[1], 16), match[2] or "", match[3], operands))
    return {name: tuple(instructions) for name, instructions in functions.items()}


def _max_threads(sections: str, name: str) -> int | None:
    """Threads that the kernel was compiled for (CUDA's __launch_bounds__, Triton's num_warps)."""
    match = re.search(rf"^\.nv\.info\.{re.escape(name)}\n(.*?)(?=\n\.|\Z)", sections, re.DOTALL | re.MULTILINE)
    threads = match and re.search(r"EIATTR_(?:MAX_THREADS|REQNTID)\n.*\n\s*Value:\s*((?:0x[0-9a-f]+\s*)+)", match[1])
    if not threads:
        return None
    x, y, z = (int(value, 16) for value in threads[1].split()[:3])
    return x * y * z
