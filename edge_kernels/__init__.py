"""Fused kernels for EDGE-GRPO and any other trainer: token statistics, entropy-driven advantages, GRPO losses.

Names are imported on first use, so that reading a configuration or printing help does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_kernels.advantages import (
        entropy_driven_advantages,
        entropy_weights,
        group_advantages,
        kl_penalized_rewards,
        response_entropy,
        response_entropy_weights,
    )
    from edge_kernels.backend import get_backend, set_backend, use_backend
    from edge_kernels.config import EDAConfig, GRPOLossConfig
    from edge_kernels.ops.grpo_loss import edge_grpo_loss
    from edge_kernels.ops.linear_grpo_loss import linear_edge_grpo_loss
    from edge_kernels.ops.linear_token_stats import linear_token_stats
    from edge_kernels.ops.token_stats import token_entropy, token_stats
    from edge_kernels.sequences import cumulative_lengths
    from edge_kernels.types import GRPOLossOutput, TokenStats

__all__ = [
    "EDAConfig",
    "GRPOLossConfig",
    "GRPOLossOutput",
    "TokenStats",
    "cumulative_lengths",
    "edge_grpo_loss",
    "entropy_driven_advantages",
    "entropy_weights",
    "get_backend",
    "group_advantages",
    "kl_penalized_rewards",
    "linear_edge_grpo_loss",
    "linear_token_stats",
    "response_entropy",
    "response_entropy_weights",
    "set_backend",
    "token_entropy",
    "token_stats",
    "use_backend",
]

_MODULE_OF = {
    "EDAConfig": "config",
    "GRPOLossConfig": "config",
    "GRPOLossOutput": "types",
    "TokenStats": "types",
    "cumulative_lengths": "sequences",
    "edge_grpo_loss": "ops.grpo_loss",
    "entropy_driven_advantages": "advantages",
    "entropy_weights": "advantages",
    "get_backend": "backend",
    "group_advantages": "advantages",
    "kl_penalized_rewards": "advantages",
    "linear_edge_grpo_loss": "ops.linear_grpo_loss",
    "linear_token_stats": "ops.linear_token_stats",
    "response_entropy": "advantages",
    "response_entropy_weights": "advantages",
    "set_backend": "backend",
    "token_entropy": "ops.token_stats",
    "token_stats": "ops.token_stats",
    "use_backend": "backend",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
