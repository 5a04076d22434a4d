"""The benchmarks at their smallest: they run, check, and end in JSON with errors and times. No time is judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT

from benchmarks import head, limits
from benchmarks.__main__ import summary
from benchmarks.harness import COMPILED, OURS, table
from benchmarks.peers import PLAIN

pytestmark = pytest.mark.slow


def run(script: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"benchmarks.{script}", "--quick", "--repetitions", "1", *arguments]
    # One thread: more would wait for each other over a few rows.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# 8 rows: two groups of four. An odd V, whose last block is no vector. Peers by name: compiling takes the longest.
@pytest.mark.parametrize(
    ("script", "kinds"),
    [
        ("logits", {"logprob", "entropy", "gradient"}),
        ("head", {"logprob", "entropy", "d hidden", "d weight"}),
    ],
)
def test_a_script_ends_in_json_with_errors_and_times(script: str, kinds: set[str]) -> None:
    message = run(script, "--dtype", "float32", "--vocab", "301", "--rows", "8", "--contenders", "PyTorch")
    assert message["machine"]["threads"] == 1
    first = message["results"][0]
    for name in ("edge_kernels", "PyTorch"):
        row = first["contenders"][name]
        assert set(row["errors"]) == kinds
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        assert row["extra_bytes"] is None or row["extra_bytes"] >= 0
    assert any("median_ms" in row for row in first["limits"].values())


def test_hard_rows_are_checked_without_times() -> None:
    message = run("accuracy", "--dtype", "float32", "--vocab", "301", "--rows", "8", "--contenders", "PyTorch")
    assert len(message["results"]) == 6
    assert all(result["contenders"]["edge_kernels"]["errors"] for result in message["results"])


def test_graders_agree_before_they_are_timed(tmp_path: Path) -> None:
    data = tmp_path / "rows.json"
    data.write_text(json.dumps([{"problem": "?", "answer": answer} for answer in ("1/2", "x", r"3\mid n")]))
    command = [sys.executable, "-m", "benchmarks.grading", str(data), "--workers", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    [result] = json.loads(done.stdout.splitlines()[-1])["results"]
    assert result["answers"] == 3
    assert set(result["per_second"]) == {"math-verify alone", "1 workers", "1 workers, identical texts"}


def test_a_process_that_dies_is_a_failure_and_not_silence() -> None:
    command = [sys.executable, "-m", "benchmarks.head", "--quick", "--rows", "-1", "--dtype", "float32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "FAILED" in done.stdout


def test_what_a_cpu_multiplies_too_slowly_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, which multiplies in float32 there, is checked and timed; plain PyTorch stays the measure of accuracy."""
    monkeypatch.setattr(limits, "_product_rate", lambda dtype, enough: 1e6)  # flops/s: 8 x 301 x 16 x 6 take 0.2 s
    config = {"dtype": "bfloat16", "vocab": 301, "rows": 8, "hidden": 16, "pages": "huge", "repetitions": 1}
    config |= {"contenders": [PLAIN, COMPILED], "accumulated": True}
    (result,) = head.measure({**config, "max_seconds": 0.1})
    assert set(result["contenders"]) == {OURS, f"{OURS}, accumulated"}
    assert set(result["contenders"][OURS]["errors"]) == {"logprob", "entropy", "d hidden", "d weight"}
    assert set(result["limits"]) == {"3 products, float32"}
    assert set(result["missing"]) == {PLAIN, COMPILED, "3 products", limits.SQUARE_PRODUCT}
    reason = "left out: 0.2 s for its products alone, bfloat16 at 0.0 GF/s"
    assert f"  {COMPILED:38} {reason}" in table(result).splitlines()
    assert any("3 products, float32" in line for line in summary([result]))
    (result,) = head.measure({**config, "contenders": [PLAIN], "max_seconds": 1e6})
    assert PLAIN in result["contenders"]
    assert result["missing"] == {}


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16], ids=str)
def test_a_head_that_computes_in_float32_says_so(products: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "product_dtype", lambda dtype, device: products)
    config = {"dtype": "bfloat16", "vocab": 301, "rows": 8, "hidden": 16, "pages": "huge", "repetitions": 1}
    (result,) = head.measure({**config, "contenders": [], "accumulated": True})
    note = "computes in float32: this CPU has no bfloat16 instructions"
    for name in (OURS, f"{OURS}, accumulated"):
        assert (result["contenders"][name].get("note") == note) == (products == torch.float32)
    assert any(note in line for line in table(result).splitlines()) == (products == torch.float32)


def test_the_rate_of_products_is_measured_until_it_is_enough() -> None:
    assert limits.too_slow({"a product": 1e3}, torch.float32, max_seconds=60.0) == {}
    assert limits.too_slow({"a product": 1e30}, torch.float32, max_seconds=None) == {}
    reasons = limits.too_slow({"a product": 1e3, "another": 1e30}, torch.float32, max_seconds=60.0)
    assert set(reasons) == {"another"}
