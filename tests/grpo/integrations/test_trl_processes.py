"""Correction where groups lie on several processes, some have nothing to correct, and a server slices by rank."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl.generation.vllm_generation as vllm_generation
import trl_processes

HERE = Path(__file__).parent


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """Return a function from a group size to what one process makes of the step."""
    for name in ("VLLMClient", "is_vllm_available"):
        monkeypatch.setattr(vllm_generation, name, getattr(vllm_generation, name))  # to be put back

    def run(num_generations):
        folder = tmp_path / "alone"
        folder.mkdir()
        return trl_processes.step(folder, num_generations)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "num_generations"),
    [
        pytest.param(2, 4, id="two processes, the second of three groups on both"),
        pytest.param(3, 6, id="three processes, both groups on two of them, nothing wrong on the first"),
    ],
)
def test_processes_correct_the_batch_that_one_corrects(alone, tmp_path, processes, num_generations):
    expected = alone(num_generations)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*launch, str(HERE / "trl_processes.py"), str(tmp_path), str(num_generations)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    saved = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(processes)]
    parts = [both["server"] for both in saved]

    kinds = {name: expected["metrics"][f"correction/{name}"] for name in ("reflect", "answer", "solution")}
    assert kinds["reflect"] % processes, "the reflections are to be uneven"
    assert kinds["answer"] + kinds["solution"] > 0
    for name in ("completions", "injected"):
        assert [row for part in parts for row in part[name]] == expected[name]
    assert not any(any(marks) for marks in parts[0]["injected"][:4])
    torch.testing.assert_close(torch.cat([part["advantages"] for part in parts]), expected["advantages"])
    for part in parts:
        error = (part["gradient"] - expected["gradient"]).norm() / expected["gradient"].norm()
        assert error <= 1e-4
        for name, value in kinds.items():
            assert part["metrics"][f"correction/{name}"] == value

    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    assert [call["rank"] for call in calls] == [0, 0]
    assert (calls[0]["prompts"], calls[0]["n"]) == (12 // num_generations, num_generations)
    assert calls[1]["n"] == 1
    assert calls[1]["prompts"] % processes == 0  # the same number from every process
    assert calls[1]["prompts"] - kinds["reflect"] in range(processes)

    alike = ["gradient", *(f"correction/{name}" for name in kinds)]
    sampled = [{"gradient": both["model"]["gradient"], **both["model"]["metrics"]} for both in saved]
    for name in alike:
        assert all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(sampled[0][name])) for one in sampled), name
    assert any(any(map(any, both["model"]["injected"])) for both in saved)

    assert all(both["sharded"] <= 1e-5 for both in saved)
