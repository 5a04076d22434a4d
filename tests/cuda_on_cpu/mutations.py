"""Bugs, planted one at a time into a copy of csrc, that the tests in cases.py must find."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from cuda_on_cpu.harness import ADDRESS, CSRC, PLAIN_SM100, THREAD, Build, compile_unit


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str  # in csrc
    old: str
    new: str
    unit: str = "token_stats"  # which is compiled with it, and whose cases are run
    build: Build = PLAIN_SM100

    def compile(self, folder: Path) -> Path:
        """Return the mutated unit's object file; raises ValueError where the mutation does not fit the source."""
        copy = folder / "csrc"
        shutil.copytree(CSRC, copy)
        path = copy / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.file} has the text {text.count(self.old)} times; adapt the mutation")
        path.write_text(text.replace(self.old, self.new))
        target = folder / f"{self.unit}.o"
        compile_unit(copy / "cuda" / f"{self.unit}.cu", target, self.build, "-Wno-error")
        return target


_BARRIER_OF_MERGE = "    __syncthreads();\n    if (threadIdx.x < kWarp) {"

MUTATIONS = (
    Mutation(
        "no barrier before the warps' sums are merged",
        "cuda/sums.cuh",
        _BARRIER_OF_MERGE,
        "    if (threadIdx.x < kWarp) {",
    ),
    Mutation(
        "a barrier that one warp alone reaches",
        "cuda/sums.cuh",
        "    if (threadIdx.x < kWarp) {\n",
        "    if (threadIdx.x < kWarp) {\n        __syncthreads();\n",
    ),
    Mutation(
        "no barrier before the row's gradient is read",
        "cuda/token_stats.cuh",
        "            __syncthreads();\n            gradient = shared[turn];",
        "            gradient = shared[turn];",
    ),
    Mutation(
        "shared memory used again while it is read",
        "cuda/token_stats.cuh",
        "        turn ^= 1u;\n        if (threadIdx.x != 0) continue;",
        "        if (threadIdx.x != 0) continue;",
    ),
    Mutation(
        "a shuffle for half of the warp",
        "cuda/device.cuh",
        "kWholeWarp = 0xffffffffu",
        "kWholeWarp = 0x0000ffffu",
    ),
    Mutation("a shuffle from the wrong lane", "cuda/sums.cuh", "distance = kWarp / 2;", "distance = kWarp / 4;"),
    Mutation(
        "one element of the tail left out", "cuda/rows.cuh", "threadIdx.x < row.tail", "threadIdx.x + 1 < row.tail"
    ),
    Mutation("the head counted by every part", "cuda/rows.cuh", "has_head(part == 0)", "has_head(true)"),
    Mutation(
        "packets that are not aligned",
        "cuda/rows.cuh",
        "(sizeof(Packet) - past) % sizeof(Packet) / sizeof(T)",
        "past * 0",
    ),
    Mutation(
        "the last packet left out",
        "cuda/rows.cuh",
        "for (; i < last; i += blockDim.x) body",
        "for (; i + 1 < last; i += blockDim.x) body",
    ),
    Mutation(
        "merged without the maxima's difference",
        "cuda/sums.cuh",
        "(b.weighted + shift_b * b.sum) * scale_b",
        "b.weighted * scale_b",
    ),
    Mutation("not rescaled to the new maximum", "cuda/sums.cuh", "        sum = mul2(sum, {scale, scale});\n", ""),
    Mutation(
        "an exponent of -inf not raised to the floor",
        "cuda/sums.cuh",
        "        u = {max_or_nan(u.x, kFloor), max_or_nan(u.y, kFloor)};\n",
        "",
    ),
    Mutation(
        "the wrong exponent", "cuda/sums.cuh", "(float_to_bits(biased.y) << 23)", "(float_to_bits(biased.y) << 22)"
    ),
    Mutation(
        "a part of a split row lost",
        "cuda/token_stats.cuh",
        "i < count; i += kWarp",
        "i + 1 < count; i += kWarp",
    ),
    Mutation(
        "the vocabulary for the row stride",
        "cuda/token_stats.cuh",
        "static_cast<const T*>(call.rows.logits) + i * call.rows.row_stride, call.rows.vocab",
        "static_cast<const T*>(call.rows.logits) + i * call.rows.vocab, call.rows.vocab",
    ),
    Mutation(
        "a position of 32 bits in the matrix",
        "cuda/token_stats.cuh",
        "static_cast<const T*>(call.rows.logits) + i * call.rows.row_stride, call.rows.vocab",
        "static_cast<const T*>(call.rows.logits) + static_cast<unsigned>(i * call.rows.row_stride), call.rows.vocab",
    ),
    Mutation(
        "the target's own gradient not written",
        "cuda/token_stats.cuh",
        "if (threadIdx.x == writer)",
        "if (threadIdx.x == writer + 1)",
    ),
    Mutation(
        "loads in packets where the gradient is aligned otherwise",
        "cuda/token_stats.cuh",
        "return gather(body +",
        "return policy.load(body +",
    ),
    Mutation(
        "no barrier before the row's gradient is read, in the sweep",
        "cuda/grpo_sweep.cuh",
        "        __syncthreads();\n        const RowGradient gradient = shared.gradient;",
        "        const RowGradient gradient = shared.gradient;",
        unit="grpo_sweep",
    ),
    Mutation(
        "no barrier before the target's own gradient",
        "cuda/grpo_sweep.cuh",
        "        __syncthreads();\n        write_own",
        "        write_own",
        unit="grpo_sweep",
    ),
    Mutation(
        "a packet neither kept nor read again",
        "cuda/grpo_sweep.cuh",
        "add_packets(sums, row, kept, row.packets",
        "add_packets(sums, row, kept + 1, row.packets",
        unit="grpo_sweep",
    ),
    Mutation(
        "kept packets past the end of shared memory",
        "cuda/grpo_sweep.cu",
        "static_cast<std::size_t>(kept_packets) * sizeof(Packet)",
        "static_cast<std::size_t>(kept_packets) * (sizeof(Packet) - 1)",
        unit="grpo_sweep",
        build=ADDRESS,
    ),
    Mutation(
        "tokens past the end",
        "cuda/token_loss.cuh",
        "begin + grid.columns < grid.tokens ? begin + grid.columns : grid.tokens",
        "begin + grid.columns",
        unit="token_loss",
    ),
    Mutation(
        "scratch memory used again while it is read",
        "cuda/token_loss.cuh",
        "value += scratch[warp];\n    __syncthreads();\n",
        "value += scratch[warp];\n",
        unit="token_loss",
    ),
    Mutation(
        "a target's logit read where another block writes",
        "cuda/token_stats.cuh",
        "column >= 0 && part.holds(grad, column) ? column : -1",
        "column",
        build=THREAD,
    ),
)
