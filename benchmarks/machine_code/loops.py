"""The loops of a kernel, found from its control flow alone, and what one pass of a loop does.

The elements of a pass come from the widths of its accesses or the shapes of its matrix instructions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from benchmarks.machine_code.instructions import (
    LOADS,
    REGISTER,
    STORES,
    THREAD_INDEX,
    WARP,
    Instruction,
    Matrix,
    registers,
)


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


def blocks_of(instructions: Sequence[Instruction]) -> list[_Block]:
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


def natural_loops(blocks: Sequence[_Block]) -> dict[int, set[int]]:
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


def streams_of(blocks: Sequence[_Block]) -> frozenset[int]:
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
                names += registers(match, 2 if ".64" in match[3] else 1)
    return tuple(names)
