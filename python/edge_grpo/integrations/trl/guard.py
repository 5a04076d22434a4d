"""Which TRL this package fits: the range it was tested with, and the parts of GRPOTrainer that it builds on."""

from __future__ import annotations

import trl
from packaging.version import Version
from trl import GRPOTrainer

from edge_grpo.integrations.releases import Release, check_release

RELEASE = Release("TRL", "trl", "edge_grpo.integrations.trl", Version("1.16"), Version("1.16"))

# What is overridden or called, with the parameters that are relied on.
SIGNATURES = {
    "_generate": ("self", "prompts"),
    "_generate_single_turn": ("self", "prompt_ids", "images", "multimodal_fields", "num_generations"),
    "_generate_and_score_completions": ("self", "inputs"),
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    "_get_per_token_logps_and_entropies": (
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
    ),
    "_compute_loss": ("self", "model", "inputs"),
}


def check_trl() -> None:
    """Raise ImportError for a TRL that does not fit; warn of one that fits by its looks but is newer than the tests."""
    check_release(RELEASE, trl.__version__, {GRPOTrainer: SIGNATURES})
