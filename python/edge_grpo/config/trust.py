"""Which settings run somebody's code or reach other machines: a run folder's own may not do so unasked.

Nothing else of a configuration can: model code (``trust_remote_code``) and pickles are never loaded, and transformers
renders chat templates in Jinja's sandbox.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge_grpo.config.keys import TrainConfig
from edge_grpo.config.rollout import RolloutConfig

# Arguments of vLLM that are numbers, switches and names of its own. Any other may name a class, a file or an address.
_OF_VLLM_ITSELF = {
    *("dtype", "quantization", "kv_cache_dtype", "block_size", "seed", "swap_space", "cpu_offload_gb", "enforce_eager"),
    *("gpu_memory_utilization", "max_num_batched_tokens", "enable_prefix_caching", "enable_chunked_prefill"),
    *("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "disable_custom_all_reduce"),
}


def reaching_out(config: TrainConfig, *, trains: bool = True) -> dict[str, str]:
    """Return the settings that run code or reach other machines, as KEY=VALUE would give them: key and value.

    Reward functions are called by what ``trains`` alone.
    """
    rollout = config.rollout
    found: dict[str, str] = {}
    if trains:
        found = {f"reward.weights.{name}": str(config.reward.weights[name]) for name in config.reward.functions}
    if rollout.engine == "vllm":
        found |= {f"rollout.vllm.{name}": str(v) for name, v in rollout.vllm.items() if name not in _OF_VLLM_ITSELF}
    if rollout.engine == "vllm-server" and rollout.servers != (RolloutConfig.server,):
        found["rollout.server"] = ",".join(rollout.servers)
    if rollout.engine == "vllm-server" and rollout.server_folder is not None:
        found["rollout.server_folder"] = rollout.server_folder
    return found


def refuse_foreign(source: Path, config: TrainConfig, overrides: Sequence[str], *, trains: bool = True) -> None:
    """Raise ValueError for what ``reaching_out`` finds in a run's configuration and ``overrides`` do not repeat."""
    said = {override.partition("=")[0].strip() for override in overrides}
    foreign = {
        key: value
        for key, value in reaching_out(config, trains=trains).items()
        if not any(key == own or key.startswith(f"{own}.") for own in said)
    }
    if foreign:
        repeated = " ".join(f"{key}={value}" for key, value in foreign.items())
        raise ValueError(
            f"{source} runs code or reaches other machines by {', '.join(foreign)}; if you trust whoever made this "
            f"folder, add --trust, or repeat these settings: {repeated}"
        )
