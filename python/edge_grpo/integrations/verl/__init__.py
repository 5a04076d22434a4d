"""EDGE-GRPO in verl: ``trainer.v1.trainer_mode=edge_sync``. verl finds it by itself, through
``edge_grpo.integrations.verl_plugin``.

``settings`` has what the section ``edge`` may hold, ``trainer`` the entropy-driven advantages, ``agent`` and ``worker``
guided error correction.
"""

try:
    import verl  # before anything that needs it, for one clear sentence
    import verl.trainer.ppo.v1  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f"edge_grpo.integrations.verl needs verl and what it builds on; {error.name} is not installed; in an "
        "environment of its own: pip install 'edge-grpo[verl]'"
    ) from error

from edge_grpo.integrations.verl.guard import check_verl

check_verl()

from edge_grpo.integrations.verl.agent import EdgeAgentLoop  # noqa: E402
from edge_grpo.integrations.verl.trainer import MODE, EdgePPOTrainerSync  # noqa: E402
from edge_grpo.integrations.verl.worker import EdgeAgentLoopManager, EdgeAgentLoopWorker  # noqa: E402

__all__ = ["MODE", "EdgeAgentLoop", "EdgeAgentLoopManager", "EdgeAgentLoopWorker", "EdgePPOTrainerSync"]
