"""EDGE-GRPO in TRL: ``EdgeGRPOTrainer`` is TRL's GRPOTrainer with entropy-driven advantages, guided error correction
and the fused loss, each with a switch in ``EdgeGRPOConfig``. What the switches leave alone is TRL's own code.
"""

try:
    import trl  # noqa: F401  # before anything that needs it, for one clear sentence
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise ImportError(
        "edge_grpo.integrations.trl needs TRL, which is not installed; pip install 'edge-grpo[trl]'"
    ) from error

from edge_grpo.integrations.trl.config import EdgeGRPOConfig
from edge_grpo.integrations.trl.trainer import EdgeGRPOTrainer

__all__ = ["EdgeGRPOConfig", "EdgeGRPOTrainer"]
