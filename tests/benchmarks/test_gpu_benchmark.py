"""The benchmark for a GPU: without one it says so, and its rehearsal on the CPU goes through all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from paths import ROOT

from benchmarks.gpu import head_ways
from edge_kernels.ops.head_plan import MEMORY_BUDGET, Rates, every_plan

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
    of_head = message["results"][-1]
    for way in ("one tile", "tiles", "by columns"):  # a CPU has no fused kernels
        assert of_head["contenders"][f"edge_kernels, cpu, {way}"]["min_ms"] > 0
        assert of_head["head_plan"]["predicted_ms"][f"edge_kernels, cpu, {way}"] > 0
        assert f"edge_kernels, cpu, {way}, bfloat16, loss from hidden states" in errors
    rates = of_head["head_plan"]["rates"]
    assert rates["products"] == message["rates"]["bfloat16 product"]
    assert rates["memory"] == message["rates"]["in-place read-write"]
    assert f"Rates(products={rates['products']:.3g}, " in done.stdout


def test_the_constants_of_the_cost_model_come_from_times() -> None:
    """Times that follow the model, of a device with other rates: they give back its rates, and are predicted."""
    rates = Rates(products=4e14, float32_products=3e13, memory=2e12, fused_share=0.6)
    rate = {"bfloat16 product": 4e14, "float32 product": 3e13, "in-place read-write": 2e12}
    problem = head_ways.problem_of(4_096, 151_936, 1_536, torch.bfloat16, "cpu")
    ours = head_ways.ways(["cuda", "triton"], problem)
    assert {way.way for way in ours.values()} == {None, "fused", "tiles", "columns"}
    times = {}
    for name, way in ours.items():
        plans = {plan.way: plan for plan in every_plan(problem, way.memory_budget or MEMORY_BUDGET, rates)}
        seconds = min(plan.seconds for plan in plans.values()) if way.way is None else plans[way.way].seconds
        times[name] = {"min_ms": seconds * 1e3}
    found = head_ways.constants({"contenders": times}, problem, ours, rate)
    assert found["share_was_measured"]
    assert found["rates"] == pytest.approx(rates._asdict(), rel=1e-6)
    for name, predicted in found["predicted_ms"].items():
        assert predicted == pytest.approx(times[name]["min_ms"], rel=1e-6)
    assert len(found["predicted_ms"]) == len(ours) - 2  # without the model's own choices


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
