"""An engine of vLLM in each of two trainer processes: a stand-in everywhere, and vLLM itself where it is installed.

The processes are real ones over gloo; what they do is in colocated.py. vLLM in one process: rollout/test_vllm.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training import records

pytestmark = pytest.mark.slow


def run(folder: Path, *arguments: str) -> None:
    script = str(Path(__file__).with_name("colocated.py"))
    result = subprocess.run(
        [sys.executable, script, str(folder), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-6000:]


def check(output: Path) -> list[list[str]]:
    """Three steps, the last after resuming, each sampled with the weights before it; and nobody waits for who fails.

    Returns what the stand-in was told in each process.
    """
    made = records(output)
    assert [record["step"] for record in made] == [0, 1, 2, 3]
    for record in made[1:]:
        assert record["ratio/sampler_max"] == pytest.approx(1, abs=1e-2)
        assert record["drift/logprob_max"] < 1e-3
        assert record["grad/norm"] > 0  # so that the next step samples with other weights
    both = [json.loads(output.with_suffix(f".{rank}").read_text()) for rank in (0, 1)]
    first, second = (one["said"] for one in both)
    assert "nats on average" in first[0]
    assert "nats on average" in second[0]
    assert second[1] == "ValueError: no room for the second tensor"
    assert first[1] == f"RolloutError: process 1 of this run failed: {second[1]}"
    assert first[2:4] == second[2:4] == [None, None]
    assert "the engine holds" in first[4]
    assert second[4] == f"RolloutError: process 0 of this run failed: {first[4]}"
    assert (first[5], second[5]) == (1, 2)
    assert first[6] == second[6] == [0, 1]
    return [one["events"] for one in both]


def test_an_engine_in_each_process(tmp_path):
    """With whole and with split parameters: an engine that left a tensor ungathered would hang the other process."""
    run(tmp_path, "stand-in")
    push = ["load", "reset cache"]
    for sharding in ("none", "fsdp2"):
        for told in check(tmp_path / sharding):
            assert told[:4] == ["start external_launcher", *push, "generate"]  # which is compared with the policy
            # Corrections may have nothing to continue in one process.
            training = [event for event in told[4 : told.index("shutdown")] if event != "generate"]
            step = ["sleep 2", "wake weights", "load", "wake kv_cache", "reset cache"]
            assert training == step * 2
            assert told[told.index("shutdown") + 1] == "end engine's groups"
            assert "end process group" not in told


@pytest.mark.vllm
@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; `make vllm` installs it for the CPU"
)
def test_real_vllm_in_each_process(tmp_path):
    run(tmp_path)
    check(tmp_path / "fsdp2")
