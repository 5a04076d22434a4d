"""NVIDIA's instructions as cuobjdump prints them: what each moves, reads, writes and multiplies.

Nothing is known here of control flow (loops.py) or of kernels (cubin.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

WARP = 32  # threads
# Behind the operands some versions print what the scheduler was told: "&req={0} ?trans1".
LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*(?:(?<=\s)[&?].*)?;")
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
                return registers(match, self._num_registers)
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
                names += registers(match, 2 if is_pair else 1)
        return tuple(names)

    @property
    def _num_registers(self) -> int:
        if self.name in LOADS or self.name in ("LDS", "LDL", "LDC", "ULDC", "LDCU"):
            return max(1, self.num_bytes // 4)
        return 2 if ".64" in self.opcode or ".WIDE" in self.opcode else 1


def registers(match: re.Match[str], count: int) -> tuple[str, ...]:
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


def parse(text: str) -> dict[str, tuple[Instruction, ...]]:
    functions: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            current = functions.setdefault(match[1], [])
        elif match := LINE.match(line):
            operands = tuple(part.strip().removesuffix(".reuse") for part in match[4].split(",")) if match[4] else ()
            current.append(Instruction(int(match[1], 16), match[2] or "", match[3], operands))
    return {name: tuple(instructions) for name, instructions in functions.items()}
