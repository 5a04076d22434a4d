"""Which verl this package fits: the range it was tested with, and the parts of its trainer that it builds on."""

from __future__ import annotations

from typing import Any

import verl
from packaging.version import Version
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.trainer.ppo.v1 import AgentLoopManagerTQ, AgentLoopWorkerTQ, PPOTrainerSync
from verl.workers.rollout.llm_server import LLMServerClient

from edge_grpo.integrations.releases import Release, check_release

RELEASE = Release("verl", "verl", "edge_grpo.integrations.verl", Version("0.9"), Version("0.9"))


def plain_class(actor: Any) -> type:
    """Return the class under ``ray.remote``, which Ray does not let anyone inherit from."""
    plain: type = actor.__ray_metadata__.modified_class
    return plain


# What is overridden or called, with the parameters that are relied on.
SIGNATURES: dict[type, dict[str, tuple[str, ...]]] = {
    PPOTrainerSync: {
        "__init__": ("self", "config"),
        "_compute_old_log_prob": ("self", "batch", "metrics"),
        "_compute_advantage": ("self", "batch", "metrics"),
    },
    plain_class(AgentLoopWorkerTQ): {
        "_run_prompt": ("self", "prompt", "sampling_params", "trajectory", "trace"),
        "_run_agent_loop": ("self", "sampling_params", "trajectory", "agent_name", "kwargs"),
        "_compute_score": ("self", "outputs", "kwargs"),
    },
    AgentLoopManagerTQ: {"_init_agent_loop_workers": ("self",)},
    SingleTurnAgentLoop: {"run": ("self", "sampling_params", "priority", "kwargs")},
    LLMServerClient: {"generate": ("self", "request_id", "prompt_ids", "sampling_params")},
}


def check_verl() -> None:
    """Raise ImportError for a verl that does not fit; warn of one that looks right but is newer than the tests."""
    check_release(RELEASE, verl.__version__, SIGNATURES)
