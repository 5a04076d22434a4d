"""What test_distributed.py stops and resumes on other numbers of processes.

``resumed_runs.py FOLDER SERVER`` kills a run on four processes and resumes it on two, and resumes on four a run that
sampled ahead on two.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["ACCELERATE_USE_CPU"] = "true"

import pytest
import torch
from accelerate.state import PartialState

sys.path.insert(0, str(Path(__file__).parent))
from forked import together

from edge_grpo.config import DataConfig, EvalConfig, ModelConfig, OptimConfig, RolloutConfig, TrainConfig
from edge_grpo.run.stop import Stopped
from edge_grpo.trainer import Trainer, train
from edge_kernels import GRPOLossConfig


def run_of(output: Path, sharding: str) -> TrainConfig:
    """Three steps of plain GRPO, whose groups differ; a rate at which rounding does not change what is sampled.

    There are fewer prompts to evaluate than four processes.
    """
    return TrainConfig(
        method="grpo",
        output=str(output),
        steps=3,
        seed=5,
        save_every=1,
        data=DataConfig(train="arithmetic:1,2"),
        eval=EvalConfig(data="arithmetic:2@test", size=3, every=1, generations=4),
        rollout=RolloutConfig(num_prompts=4, num_generations=4, max_completion_length=16),
        optim=OptimConfig(learning_rate=1e-5, micro_batch_size=3, minibatches=1),
        model=ModelConfig(sharding=sharding),  # type: ignore[arg-type]
    )


def ahead_of(output: Path, sharding: str, server: str) -> TrainConfig:
    """A run that samples ahead, and other prompts for groups whose rewards are equal."""
    config = run_of(output, sharding)
    rollout = replace(config.rollout, engine="vllm-server", server=server, server_folder=str(output / "weights"))
    rollout = replace(rollout, ahead=1, resample=1, timeout=120.0)
    optim = replace(config.optim, learning_rate=1e-3)  # the weights that have sampled are not those that learn
    # With a loss of all tokens the drift is of all responses: else each process leaves out what has no gradient.
    loss = GRPOLossConfig(entropy_coef=0.1)
    return replace(config, rollout=rollout, optim=optim, loss=loss, eval=EvalConfig(), save_every=10)


def until_stopped(config: TrainConfig) -> None:
    """Train until SIGTERM, which a process gets while step 2 learns and step 3 is sampled."""
    assign_advantages, made = Trainer._assign_advantages, []

    def stop(self: Trainer, samples: Any) -> None:
        made.append(samples)
        if len(made) == 2 and PartialState().is_main_process:
            os.kill(os.getpid(), signal.SIGTERM)
        assign_advantages(self, samples)

    Trainer._assign_advantages = stop  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        train(config)


def resume(folder: Path, server: str) -> None:
    """Train on one process; then on four until these are killed, and on two from the checkpoint that they left.

    The same with samples for the next step: two processes stop, four go on.
    """
    together(1, lambda: train(run_of(folder / "whole", "none")))
    parts = folder / "parts"
    record = parts / "checkpoints" / "step-000001" / "trainer_state.json"
    together(4, lambda: train(run_of(parts, "fsdp2")), kill_when=record.is_file)
    (folder / "at_kill.json").write_text(json.dumps(sorted(path.name for path in record.parent.iterdir())))
    together(2, lambda: train(run_of(parts, "fsdp2"), resume=True))
    together(1, lambda: train(ahead_of(folder / "ahead_whole", "none", server)))
    ahead = ahead_of(folder / "ahead_parts", "fsdp2", server)
    together(2, lambda: until_stopped(ahead))
    together(4, lambda: train(ahead, resume=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    resume(Path(sys.argv[1]), sys.argv[2])
