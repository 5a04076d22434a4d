"""Fused kernels for EDGE-GRPO and any other trainer: token statistics, entropy-driven advantages, GRPO losses.

Names are imported on first use, so that reading a configuration or printing help does not wait for torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_kernels.advantages import entropy_driven_advantages, entropy_weights, group_advantages
    from edge_kernels.backend import get_backend, set_backend, use_backend
    from edge_kernels.config import EDAConfig, GRPOLossConfig
    from edge_kernels.grpo_loss import edge_grpo_loss
    from edge_kernels.linear_grpo_loss import linear_edge_grpo_loss
    from edge_kernels.linear_token_stats import linear_token_stats
    from edge_kernels.token_stats import token_entropy, token_stats
    from edge_kernels.types import GRPOLossOutput, TokenStats

__all__ = [
    "EDAConfig",
    "GRPOLossConfig",
    "GRPOLossOutput",
    "TokenStats",
    "edge_grpo_loss",
    "entropy_driven_advantages",
    "entropy_weights",
    "get_backend",
    "group_advantages",
    "linear_edge_grpo_loss",
    "linear_token_stats",
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
    "edge_grpo_loss": "grpo_loss",
    "entropy_driven_advantages": "advantages",
    "entropy_weights": "advantages",
    "get_backend": "backend",
    "group_advantages": "advantages",
    "linear_edge_grpo_loss": "linear_grpo_loss",
    "linear_token_stats": "linear_token_stats",
    "set_backend": "backend",
    "token_entropy": "token_stats",
    "token_stats": "token_stats",
    "use_backend": "backend",
}


class _Package(ModuleType):
    """This package, where the functions ``token_stats`` and ``linear_token_stats`` outrank modules of their names."""

    def __getattr__(self, name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{self.__name__}.{_MODULE_OF[name]}"), name)
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Python binds an imported submodule in its package; that would hide the function.
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_MODULE_OF})


sys.modules[__name__].__class__ = _Package
