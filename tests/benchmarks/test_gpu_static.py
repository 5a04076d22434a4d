"""Our GPU kernels' machine code against budgets: what a loop over logits may cost, and that the head uses wgmma.

No GPU is needed; what compiles them is. How the figures are read from the code is tested in test_cubin.py.
"""

from __future__ import annotations

import json
import re
import sys
from functools import cache, partial

import pytest

from benchmarks import gpu_static
from benchmarks.gpu_static import OURS_CUDA, OURS_HEAD, OURS_TRITON, Row
from benchmarks.machine_code import aot, cubin, ours
from benchmarks.machine_code.aot import Compiled

pytestmark = pytest.mark.slow

OF_LOGITS = re.compile(r"(token_stats_(fwd|bwd)|grpo_sweep)_kernel\b(?!.*Curved)")  # a soft cap costs a tanh on top


@cache
def compiled(owner: str, architecture: int) -> list[Compiled]:
    try:
        cubin.tool("cuobjdump")
        aot.nvcc() if owner == OURS_CUDA else aot.require_triton()
    except (FileNotFoundError, RuntimeError) as error:
        pytest.skip(str(error))
    if owner == OURS_CUDA:  # not all sources: a compiler takes seconds for each
        return [k for name in ("token_stats", "grpo_sweep") for k in ours.cuda_kernels(architecture, name)]
    return gpu_static.contenders()[owner](architecture)


def rows(owner: str, architecture: int) -> list[Row]:
    return [row for each in compiled(owner, architecture) for row in gpu_static.rows(owner, each)]


def loops(owner: str, architecture: int, kind: str) -> list[Row]:
    """Loops over logits; other kernels' work is of size N."""
    found = [
        row for row in rows(owner, architecture) if row["loop"].startswith(kind) and OF_LOGITS.match(row["kernel"])
    ]
    expected = {"statistics": "token_stats_fwd", "gradient": "token_stats_bwd"}[kind]
    names = {row["kernel"].partition("_kernel")[0] for row in found}
    assert names == {expected, "grpo_sweep"}
    return found


@pytest.mark.parametrize("architecture", gpu_static.MACHINES)
@pytest.mark.parametrize("owner", [OURS_CUDA, OURS_TRITON])
def test_loops_over_logits_have_wide_accesses_no_spills_and_no_barriers(owner: str, architecture: int) -> None:
    for row in [*loops(owner, architecture, "statistics"), *loops(owner, architecture, "gradient")]:
        assert row["spills"] == 0, row
        assert {*row["load_bits"], *row["store_bits"]} == {128}, row
        assert row["barriers"] == 0, row
        assert row["shuffles_per_element"] == 0, row


# (architecture, instructions, special functions) per bfloat16 element of the forward loop. sm_90: both backends. sm_100
# allows 9.4 and 1.17 at its memory's rate; CUDA moves a part of the exponentials to the FMA units.
@pytest.mark.parametrize(
    ("owner", "architecture", "instructions", "mufu"),
    [(OURS_CUDA, 90, 9, 1.13), (OURS_TRITON, 90, 9, 1.13), (OURS_CUDA, 100, 8.8, 1.0)],
)
def test_a_forward_loop_keeps_to_its_budget(owner: str, architecture: int, instructions: float, mufu: float) -> None:
    for row in loops(owner, architecture, "statistics"):
        assert row["instructions_per_element"] <= instructions, row
        assert row["mufu_per_element"] <= mufu, row
        assert row["mufu_per_element"] >= 0.5  # an exponential each, most of them there: the loop is the right one


@pytest.mark.parametrize("architecture", gpu_static.MACHINES)
@pytest.mark.parametrize("owner", [OURS_CUDA, OURS_TRITON])
def test_memory_bounds_every_loop_over_logits(owner: str, architecture: int) -> None:
    for row in [*loops(owner, architecture, "statistics"), *loops(owner, architecture, "gradient")]:
        assert row["bound"] == "memory", row
        assert row["bytes_per_element"] == (4 if row["loop"] == "gradient" else 2), row  # read, and written


def test_the_head_multiplies_by_wgmma_on_sm_90() -> None:
    found = [row for row in rows(OURS_HEAD, 90) if row["loop"] == "products"]
    assert found
    for row in found:
        assert row["matrix"].startswith("wgmma"), row
        assert row["spills"] == 0, row


def test_the_script_prints_a_table_and_json_and_names_who_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(architecture: int) -> list[Compiled]:
        raise ModuleNotFoundError("No module named 'absent'")

    found = {OURS_TRITON: partial(compiled, OURS_TRITON), "a peer": absent}
    monkeypatch.setattr(gpu_static, "contenders", lambda: found)
    monkeypatch.setattr(sys, "argv", ["gpu_static", "--arch", "90"])
    assert gpu_static.main() == 0
    printed = capsys.readouterr().out
    assert re.search(r"^ +token_stats_fwd, statistics .* memory, 1.00$", printed, re.MULTILINE)
    assert "a peer is left out: ModuleNotFoundError: No module named 'absent'" in printed
    message = json.loads(printed.splitlines()[-1])
    assert message["missing"] == {"a peer": "ModuleNotFoundError: No module named 'absent'"}
    assert message["machines"]["sm_90"]["bandwidth"] == 3.35e12
    assert {row["owner"] for row in message["kernels"]} == {OURS_TRITON}


def test_ours_missing_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(architecture: int) -> list[Compiled]:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(gpu_static, "contenders", lambda: {OURS_CUDA: absent})
    monkeypatch.setattr(sys, "argv", ["gpu_static"])
    assert gpu_static.main() == 1
