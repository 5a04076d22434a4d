"""Which processes a run can be spread over, and what of the model each of them holds."""

from __future__ import annotations

import os

from accelerate import Accelerator
from accelerate.utils import DistributedType

from edge_grpo.config import ModelConfig, TrainConfig
from edge_grpo.policy.model import PolicyModel
from edge_grpo.policy.sharding import shard
from edge_grpo.rollout.group import check_processes

_SHARD = "launch with torchrun, or with accelerate's plain data parallelism (--multi_gpu or --cpu), and set "
_ENGINES = {
    "FSDP": "model.sharding=fsdp2 instead",
    "DeepSpeed": (
        "model.sharding=fsdp2 to split what ZeRO-3 splits, or train with ZeRO in TRL's trainer, as "
        "examples/trl_zero.py of the repository does"
    ),
}
_PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def check_launch() -> None:
    """Raise ValueError where accelerate's launcher asks for an engine of its own. Call it before ``Accelerator()``.

    On a CPU accelerate ignores both without a word, so that every process would hold all parameters, or ends with an
    error of its own.
    """
    for engine, instead in _ENGINES.items():
        if os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "").lower() in ("true", "1"):
            raise ValueError(
                f"accelerate launched this run with {engine}, which accelerate ignores on a CPU and edge_grpo's "
                f"trainer does not support; {_SHARD}{instead}"
            )


def check_distribution(config: TrainConfig, accelerator: Accelerator) -> None:
    """Raise ValueError where a run cannot be spread, in whole groups, over these processes as they were launched."""
    kind = accelerator.distributed_type
    if kind not in _PLAIN:
        raise ValueError(f"distributed type {kind.value} is not supported; {_SHARD}model.sharding=fsdp2 to split them")
    processes, prompts = accelerator.num_processes, config.rollout.num_prompts
    if prompts % (processes * config.optim.minibatches):
        raise ValueError(
            f"rollout.num_prompts = {prompts} must be divisible by processes x optim.minibatches = "
            f"{processes} x {config.optim.minibatches}, since groups stay whole"
        )
    check_processes(config.rollout, processes)


def place(policy: PolicyModel, config: ModelConfig, accelerator: Accelerator) -> None:
    """Put ``policy`` on this process's device: all of it, or the part that ``config.sharding`` gives it.

    One process alone holds everything either way.
    """
    if config.sharding == "fsdp2" and accelerator.num_processes > 1:
        shard(policy, processes=accelerator.num_processes, device=accelerator.device)
    else:
        policy.to(accelerator.device)
