"""What test_colocated.py runs in one, two and four processes: sampling, training, resuming, and one process that fails.

``colocated.py FOLDER stand-in``: all layouts with a stand-in of vLLM. ``colocated.py FOLDER LAYOUT ...``: those, with
vLLM. A layout is "SHARDING-PROCESSES-SIZE": processes, and how many of them share an engine.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["ACCELERATE_USE_CPU"] = "true"

import fake_vllm
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from forked import together as on_processes

from edge_grpo.config import CorrectionConfig, DataConfig, EvalConfig, ModelConfig, OptimConfig, RolloutConfig
from edge_grpo.config import TrainConfig as Config
from edge_grpo.policy.loading import load_model
from edge_grpo.policy.model import PolicyModel
from edge_grpo.policy.sharding import shard
from edge_grpo.policy.together import together
from edge_grpo.rollout import build_engine
from edge_grpo.rollout.wire import verify
from edge_grpo.trainer import train
from edge_grpo.types import Sampling
from edge_kernels import GRPOLossConfig

ALL = ("none-1-1", "none-2-1", "fsdp2-2-1", "none-2-2", "fsdp2-2-2", "none-4-2")


def config_of(output: Path, sharding: str, size: int) -> Config:
    """Two groups of four for two processes; a rate at which a step's old weights would show in the ratios."""
    return Config(
        output=str(output),
        steps=2,
        save_every=2,
        data=DataConfig(train="arithmetic:1,2", max_prompt_length=64),
        eval=EvalConfig(data="arithmetic:1@test", size=2),
        rollout=RolloutConfig(
            engine="vllm",
            num_prompts=2,
            num_generations=4,
            max_completion_length=12,
            batch_size=8,
            vllm={"tensor_parallel_size": size},
        ),
        correction=CorrectionConfig(max_length=64),
        optim=OptimConfig(learning_rate=1e-3),
        loss=GRPOLossConfig(entropy_coef=0.1),  # a gradient also where corrections have made all responses right
        model=ModelConfig(sharding=sharding),  # type: ignore[arg-type]
    )


def work(config: Config) -> None:
    """Sample in all layouts, train where two processes do it."""
    responses, held = sampled(config)
    own: dict[str, Any] = {"sampled": responses, "held": held}
    if PartialState().num_processes == 2:
        fake_vllm.events.clear()
        train(config)
        train(replace(config, steps=3), resume=True)
        own |= {"said": failures(config), "events": fake_vllm.events}
    file = Path(config.output).with_suffix(f".{PartialState().process_index}")
    file.write_text(json.dumps(own))


def engine_of(config: Config) -> tuple[Any, PolicyModel]:
    """An engine with the shipped model, and the policy, split as the configuration says."""
    model, tokenizer = load_model(config.model)
    policy = PolicyModel(model)
    if config.model.sharding == "fsdp2":
        shard(policy, processes=PartialState().num_processes, device=torch.device("cpu"))
    return build_engine(config, policy, tokenizer), policy


def shrink(policy: PolicyModel) -> None:
    with torch.no_grad():
        for value in policy.parameters():
            value.mul_(0.7)


def sampled(config: Config) -> tuple[list[Any], int | None]:
    """This process's responses, as seed, place, tokens and logprobs: before the weights change, and after it.

    And how many numbers vLLM's model has here.

    The processes share eight prompts, in pairs of equal ones; the last process has a call more than the others.
    """
    engine, policy = engine_of(config)
    rank, processes = PartialState().process_index, PartialState().num_processes
    places = range(8 // processes * rank, 8 // processes * (rank + 1))
    found: list[Any] = []

    def ask(seed: int, places: Sequence[int]) -> None:
        prompts = [[5 + place // 2, *range(20, 20 + place // 2)] for place in places]
        responses = engine.generate(prompts, Sampling(max_tokens=12), seed=seed, places=places)
        for place, response in zip(places, responses, strict=True):
            found.append([seed, place, response.token_ids, response.logprobs])

    def collect(seed: int) -> None:
        ask(seed, places)
        if rank == processes - 1:
            ask(seed + 1, [7])

    together(partial(collect, 1), within=engine.phase())
    engine.sleep()
    shrink(policy)
    engine.update_weights(policy)
    verify(engine, policy, seed=0)
    together(partial(collect, 3), within=engine.phase())
    is_real = hasattr(engine._llm, "apply_model")
    held = engine._llm.apply_model(number_of_parameters)[0] if is_real else None
    engine.close()
    return found, held


def number_of_parameters(model: torch.nn.Module) -> int:
    return sum(value.numel() for value in model.parameters())


def failures(config: Config) -> list[Any]:
    """What each call returns or raises in this process; process 1 or 0 fails in some."""
    rank = PartialState().process_index
    said: list[Any] = []

    def attempt(call: Callable[[], Any]) -> None:
        try:
            said.append(call())
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")

    def ask(prompts: list[list[int]]) -> int:
        return together(lambda: len(engine.generate(prompts, Sampling(max_tokens=2), seed=0)), within=engine.phase())

    engine, policy = engine_of(config)

    def load(method: str, kwargs: dict[str, Iterator[Any]]) -> None:
        next(kwargs["weights_iterator"])
        raise ValueError("no room for the second tensor")

    shrink(policy)
    attempt(lambda: verify(engine, policy, seed=0))  # the engines have the old weights
    if rank == 1:
        engine._llm.collective_rpc = load
    attempt(lambda: engine.update_weights(policy))  # process 1 reads one tensor and fails
    vars(engine._llm).pop("collective_rpc", None)
    attempt(lambda: engine.update_weights(policy))  # nobody was left behind
    attempt(lambda: verify(engine, policy, seed=0))
    # Process 0 asks for more than the engine holds, process 1 for nothing.
    attempt(lambda: ask([[5] * 999] * (1 - rank)))
    attempt(lambda: ask([[5]] * (1 + rank)))
    engine.close()
    attempt(lambda: gather_object([rank]))  # the group of the trainer's processes is alive
    return said


if __name__ == "__main__":
    torch.set_num_threads(1)
    if stand_in := sys.argv[2:] == ["stand-in"]:
        fake_vllm.install()
    else:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        import vllm  # noqa: F401 # once, for all processes
    for layout in ALL if stand_in else sys.argv[2:]:
        sharding, processes, size = layout.split("-")
        config = config_of(Path(sys.argv[1]) / layout, sharding, int(size))
        on_processes(int(processes), partial(work, config), seconds=240 if stand_in else 1800)
