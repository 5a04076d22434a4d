"""examples/trl_zero.py as its users run it: two processes with DeepSpeed against one without."""

from __future__ import annotations

import importlib.resources
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import ROOT
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: make test-deepspeed"),
]

TINY = Path(str(importlib.resources.files("edge_grpo") / "tiny"))
SCRIPT = str(ROOT / "examples" / "trl_zero.py")
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# Greedy sampling is the same on any number of processes. With an epsilon of 1 AdamW moves a weight by about its clipped
# gradient, so that a rounding error stays one. A group's eight answers are then all alike; where they are wrong, two
# are corrected, so that the group does not collapse.
OPTIONS = {
    "max_steps": "2",
    "top_k": "1",
    "learning_rate": "1",
    "adam_epsilon": "1",
    "lr_scheduler_type": "constant",
    "save_strategy": "steps",
    "save_steps": "1",
    "beta": "0.04",
    "correction": '{"max_per_group": 2}',
}
TOLERANCE = 1e-5


def run(output: Path, launch: list[str], **options: str) -> Path:
    words = [word for name, value in (OPTIONS | options).items() for word in (f"--{name}", value)]
    done = subprocess.run(
        [sys.executable, *launch, SCRIPT, "--output_dir", str(output), *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return output


def weights(folder: Path) -> torch.Tensor:
    """All weights of the model in a folder, one after the other; a tied head that was written too is left out."""
    found = load_file(folder / "model.safetensors")
    return torch.cat([found[name].float().flatten() for name in sorted(found) if name != "lm_head.weight"])


def losses(output: Path, step: int) -> list[dict[str, float]]:
    state = json.loads((output / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("alone"), [], per_device_train_batch_size="32")


@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_make_the_steps_of_one(alone, tmp_path, stage):
    """Two micro-batches each. Of what is saved the first step shows the gradient, the second the next one's."""
    config = str(ROOT / "examples" / f"zero{stage}.json")
    sizes = {"per_device_train_batch_size": "8", "gradient_accumulation_steps": "2"}
    got = run(tmp_path / "whole", TWO, deepspeed=config, **sizes)
    parts = {file.name for file in (got / "checkpoint-1" / "global_step1").glob("*_optim_states.pt")}
    assert len(parts) == 2, "DeepSpeed has each process save its part of AdamW's state"
    before = weights(TINY)
    for step in (1, 2):
        expected, moved = (weights(folder / f"checkpoint-{step}") - before for folder in (alone, got))
        error = float((moved - expected).abs().max() / expected.abs().max())
        print(f"ZeRO-{stage}, weights after step {step}: {error:.1e} of the largest change")
        assert error <= TOLERANCE
    assert torch.equal(weights(got), weights(got / "checkpoint-2"))
    for expected, entry in zip(losses(alone, 2), losses(got, 2), strict=True):
        assert expected["grad_norm"] > 0.1
        for name in ("loss", "grad_norm", "reward", "accuracy/before", "accuracy/after", "eda/weight_max"):
            assert entry[name] == pytest.approx(expected[name], rel=TOLERANCE, abs=1e-6), name

    (got / "checkpoint-2").rename(tmp_path / "uninterrupted")
    run(got, TWO, deepspeed=config, resume_from_checkpoint=str(got / "checkpoint-1"), **sizes)
    assert torch.equal(weights(got / "checkpoint-2"), weights(tmp_path / "uninterrupted"))
