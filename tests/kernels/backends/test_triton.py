"""Triton's kernels without a GPU: their arithmetic under the interpreter, in a process of its own, and their machine
code for each architecture, as a GPU's launch would compile them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from backends import INTERPRETING
from paths import ROOT

from benchmarks.machine_code import aot, cubin, ours

pytest.importorskip("triton", reason="needs the extra: pip install '.[triton]'")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(INTERPRETING, reason="is what runs the interpreter, or compiles"),
]


def test_under_the_interpreter() -> None:
    """The statistics and the head's tiles pass the tests of the other backends; the rest has tests of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/kernels/ops/test_token_stats.py",
        "tests/kernels/ops/test_token_stats_machinery.py::TestInplace",
        "tests/kernels/ops/test_token_stats_shards.py",
        "tests/kernels/ops/test_head_tiles.py",
        "tests/kernels/backends/interpreted",
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None, result.stdout
    assert int(passed[1]) > 200  # not that half of them was not collected


# --- machine code -----------------------------------------------------------------------------------------------------

NUM_LOOPS = {"token_stats_fwd": 1, "token_stats_bwd": 1, "grpo_sweep": 2}  # over a row; remainders are no loops
HEAD = {"linear_fwd", "linear_merge", "linear_bwd_logits", "linear_bwd_hidden", "linear_bwd_weight"}
EVERY_KERNEL = {*NUM_LOOPS, "token_stats_merge", "token_loss", "token_loss_sum", *HEAD}


class Item(NamedTuple):
    name: str  # "token_stats_fwd"
    dtype: torch.dtype  # of the logits
    is_capped: bool
    itemsize: int  # of what the kernel streams
    compiled: Any  # Triton's


def items(architecture: int) -> Iterator[Item]:
    """Every kernel for bfloat16, with rows of any length too, and for sm_90 and sm_100 those over rows for float32.

    Not the products: without matrix instructions one takes half a minute to compile.
    """
    launchers = [(ours.triton_logits, {}), (ours.triton_capped, {}), (ours.triton_logits, {"vocab": 50_257})]
    launchers += [(ours.triton_loss, {}), (ours.triton_head, {}), (ours.triton_tiles, {})]
    if architecture in (90, 100):
        launchers += [(ours.triton_tiles, {"vocab": 50_257})]
        launchers += [(launch, {"dtype": torch.float32}) for launch in (ours.triton_logits, ours.triton_capped)]
    for launch, options in launchers:
        for compiled, itemsize in aot.triton_kernels(partial(launch, architecture, **options), architecture):
            name = compiled.metadata.name.removesuffix("_kernel")
            dtype = options.get("dtype", torch.bfloat16)
            yield Item(name, dtype, launch is ours.triton_capped, itemsize, compiled)


# With what a bfloat16 logit may cost in the loop of the forward pass: instructions, and special-function operations,
# of which sm_90 has 17.7 and 2.2 to spend while memory delivers it.
@pytest.mark.parametrize(("architecture", "instructions"), [(80, 9.0), (90, 9.0), (100, 8.8), (120, 9.0)])
def test_budgets(architecture: int, instructions: float) -> None:
    matrix_instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}[architecture]
    seen = set()
    for name, dtype, is_capped, itemsize, compiled in items(architecture):
        seen.add(name)
        (kernel,) = cubin.read(compiled.asm["cubin"])
        # Triton 3.6 keeps two values of the whole launch in local memory there: written once, read once a row.
        allowed = 4 if (name, dtype, architecture) == ("grpo_sweep", torch.float32, 100) else 0
        assert kernel.num_spills <= allowed, f"{name} spills registers"
        if name in NUM_LOOPS:
            innermost = [loop for loop in kernel.loops if loop.depth and not loop.encloses]
            loops = [loop for loop in innermost if any(i.name == "LDG" for i in loop.instructions)]
            assert len(loops) == NUM_LOOPS[name], name
            for loop in loops:
                assert all(i.num_bytes >= 16 for i in loop.instructions if i.name in ("LDG", "STG")), name
                assert not any(
                    i.name.startswith(("BAR", "SHFL", "LDS", "STS", "LDL", "STL")) for i in loop.instructions
                ), name
            if name == "token_stats_fwd" and dtype == torch.bfloat16 and not is_capped:
                (loop,) = loops
                elements = loop.loaded_bytes / itemsize  # of a lane in one round
                assert len(loop.instructions) / elements <= instructions, name
                assert loop.num_mufu / elements <= 1.13, name
        if name.startswith(("linear_fwd", "linear_bwd")):
            assert matrix_instruction in compiled.asm["ptx"], name
    assert seen == EVERY_KERNEL


def test_the_heads_tiles_take_no_kernel_that_makes_logits() -> None:
    """All of their Python runs here on fake CUDA tensors, which refuse a value that the host would wait for."""
    found = aot.triton_kernels(lambda: ours.triton_tiles(90), 90)
    names = {compiled.metadata.name.removesuffix("_kernel") for compiled, _ in found}
    assert names == {*NUM_LOOPS, "token_loss", "token_loss_sum"}


def test_every_option_compiles() -> None:
    found = aot.triton_kernels(lambda: ours.triton_options(90), 90)
    assert {compiled.metadata.name.removesuffix("_kernel") for compiled, _ in found} == EVERY_KERNEL


def test_compiles_for_rocm() -> None:
    """Wide accesses, matrix instructions and no spills there too; nothing in the kernels is NVIDIA's."""
    for name, _, _, _, compiled in items(aot.ROCM):
        text = compiled.asm["amdgcn"]
        assert ".vgpr_spill_count: 0" in text, name
        if name in NUM_LOOPS:
            assert re.search(r"(global|buffer)_load_dwordx4", text), name
        if name.startswith(("linear_fwd", "linear_bwd")):
            assert "v_mfma" in text, name
