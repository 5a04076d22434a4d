"""The benchmark for a GPU: without one it says so, and its rehearsal on the CPU goes through all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from paths import ROOT

pytestmark = pytest.mark.slow


def run(
    *arguments: str, code: str = "from benchmarks.gpu.__main__ import main; sys.exit(main())"
) -> subprocess.CompletedProcess:
    # No compiler, which would take longest: torch.compile then is plain PyTorch again.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
    program = f"import sys\nsys.argv[1:] = {list(arguments)!r}\n{code}"
    command = [sys.executable, "-W", "ignore", "-c", program]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 2
    assert "sees no GPU" in done.stdout


def test_the_rehearsal_checks_times_and_ends_in_json() -> None:
    done = run("--rehearse")
    assert done.returncode == 0, done.stdout + done.stderr
    message = json.loads(done.stdout.splitlines()[-1])
    assert message["rehearsal"] is True
    assert message["machine"]["versions"]["torch"] == torch.__version__
    errors = message["errors"]
    for dtype in ("float32", "bfloat16"):
        for work, kinds in (
            ("loss from logits", {"logprob", "entropy", "gradient"}),
            ("EDA loss from logits", {"logprob", "entropy", "gradient"}),
            ("loss from hidden states", {"logprob", "entropy", "d hidden", "d weight"}),
            ("token_stats", {"logprob", "entropy"}),
            ("token_stats with gradients", {"output 0", "output 1", "output 2", "gradient 0"}),
            ("token_stats with a soft cap", {"output 0", "output 1", "output 2", "gradient 0"}),
            ("token_entropy", {"output 0", "gradient 0"}),
            ("linear_token_stats", {"output 0", "output 1", "output 2", "gradient 0", "gradient 1", "gradient 2"}),
        ):
            found = errors[f"edge_kernels, cpu, {dtype}, {work}"]
            assert set(found) == kinds
            assert max(found.values()) < (0.1 if dtype == "bfloat16" else 2e-3)  # nats, at offsets of 30,000 too
    assert {"read", "copy", "in-place read-write", "bfloat16 product", "float32 product"} == set(message["rates"])
    works = [(result["work"], result["dtype"]) for result in message["results"]]
    from_logits = ("loss from logits", "EDA loss from logits", "token_stats")
    expected = [(work, dtype) for dtype in ("bfloat16", "float32") for work in from_logits]
    assert works == [*expected, ("loss from hidden states", "bfloat16")]
    for result in message["results"]:
        assert result["floor_ms"] > 0
        for name in ("edge_kernels, cpu", "PyTorch"):
            assert 0 < result["contenders"][name]["min_ms"] <= result["contenders"][name]["median_ms"]


def test_a_backend_that_errs_is_not_timed() -> None:
    """An entropy that is off by a hundredth stops it before any time is taken."""
    code = """
import torch
from benchmarks import peers
from benchmarks.gpu.__main__ import OURS, main
make = peers.LOGITS[OURS]
def wrong():
    statistics, loss = make()
    def shifted(*arguments):
        out = loss(*arguments)
        return out._replace(entropy=out.entropy + 0.01)
    return statistics, shifted
peers.LOGITS[OURS] = wrong
sys.exit(main())
"""
    done = run("--rehearse", code=code)
    assert done.returncode == 1
    assert "edge_kernels is wrong: loss from logits" in done.stdout
    assert "median" not in done.stdout
