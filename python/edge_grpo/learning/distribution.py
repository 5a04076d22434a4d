"""Which processes a run can be spread over, and how."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import DistributedType

from edge_grpo.config import TrainConfig


def check_distribution(config: TrainConfig, accelerator: Accelerator) -> None:
    """Raise ValueError where groups cannot be sampled, whole, on these processes."""
    kind = accelerator.distributed_type
    supported = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if kind not in supported:
        raise ValueError(
            f"distributed type {kind.value} is not supported: sampling with transformers needs whole parameters on "
            "every process; launch with accelerate's plain data parallelism (--multi_gpu or --cpu)"
        )
    processes, prompts = accelerator.num_processes, config.rollout.num_prompts
    if processes > 1 and config.rollout.engine == "vllm":
        raise ValueError(
            f"rollout.engine='vllm' runs in one process; got {processes}; use 'vllm-server', which they can share"
        )
    if prompts % (processes * config.optim.minibatches):
        raise ValueError(
            f"rollout.num_prompts = {prompts} must be divisible by processes x optim.minibatches = "
            f"{processes} x {config.optim.minibatches}, since groups stay whole"
        )
