"""What test_colocated.py runs in two processes, each with an engine: training, resuming, and one process that fails.

``colocated.py FOLDER [stand-in]`` trains with split parameters, and with the stand-in of vLLM with whole ones as well.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["ACCELERATE_USE_CPU"] = "true"

import fake_vllm
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from processes import together as on_processes

from edge_grpo.config import CorrectionConfig, DataConfig, EvalConfig, ModelConfig, OptimConfig, RolloutConfig
from edge_grpo.config import TrainConfig as Config
from edge_grpo.policy.loading import load_model
from edge_grpo.policy.model import PolicyModel
from edge_grpo.policy.sharding import shard
from edge_grpo.rollout import build_engine
from edge_grpo.rollout.wire import verify
from edge_grpo.together import together
from edge_grpo.trainer import train
from edge_grpo.types import Sampling
from edge_kernels import GRPOLossConfig


def config_of(output: Path, sharding: str) -> Config:
    """Two groups of four for two processes; a rate at which a step's old weights would show in the ratios."""
    return Config(
        output=str(output),
        steps=2,
        save_every=2,
        data=DataConfig(train="arithmetic:1,2", max_prompt_length=64),
        eval=EvalConfig(data="arithmetic:1@test", size=2),
        rollout=RolloutConfig(engine="vllm", num_prompts=2, num_generations=4, max_completion_length=12, batch_size=8),
        correction=CorrectionConfig(max_length=64),
        optim=OptimConfig(learning_rate=1e-3),
        loss=GRPOLossConfig(entropy_coef=0.1),  # a gradient also where corrections have made all responses right
        model=ModelConfig(sharding=sharding),  # type: ignore[arg-type]
    )


def work(config: Config, stand_in: bool) -> None:
    if stand_in:
        fake_vllm.install()
    train(config)
    train(replace(config, steps=3), resume=True)
    said = failures(config)
    file = Path(config.output).with_suffix(f".{PartialState().process_index}")
    file.write_text(json.dumps({"said": said, "events": fake_vllm.events}))


def failures(config: Config) -> list[Any]:
    """What each call returns or raises in this process; process 1 or 0 fails in some."""
    rank = PartialState().process_index
    said: list[Any] = []

    def attempt(call: Callable[[], Any]) -> None:
        try:
            said.append(call())
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")

    model, tokenizer = load_model(config.model)
    policy = PolicyModel(model)
    if config.model.sharding == "fsdp2":
        shard(policy, processes=2, device=torch.device("cpu"))
    engine: Any = build_engine(config, policy, tokenizer)

    def load(method: str, kwargs: dict[str, Iterator[Any]]) -> None:
        next(kwargs["weights_iterator"])
        raise ValueError("no room for the second tensor")

    with torch.no_grad():
        for value in policy.parameters():
            value.mul_(0.7)
    attempt(lambda: verify(engine, policy, seed=0))  # the engines have the old weights
    if rank == 1:
        engine._llm.collective_rpc = load
    attempt(lambda: engine.update_weights(policy))  # process 1 reads one tensor and fails
    vars(engine._llm).pop("collective_rpc", None)
    attempt(lambda: engine.update_weights(policy))  # nobody was left behind
    attempt(lambda: verify(engine, policy, seed=0))
    # Process 0 asks for more than the engine holds, process 1 for nothing.
    attempt(lambda: together(lambda: len(engine.generate([[5] * 999] * (1 - rank), Sampling(max_tokens=2), seed=0))))
    attempt(lambda: together(lambda: len(engine.generate([[5]] * (1 + rank), Sampling(max_tokens=2), seed=0))))
    engine.close()
    attempt(lambda: gather_object([rank]))  # the group of the trainer's processes is alive
    return said


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, stand_in = Path(sys.argv[1]), sys.argv[2:] == ["stand-in"]
    for sharding in ("none", "fsdp2") if stand_in else ("fsdp2",):
        on_processes(2, partial(work, config_of(folder / sharding, sharding), stand_in))
