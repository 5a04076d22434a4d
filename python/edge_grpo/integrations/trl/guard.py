"""Which TRL this package fits: the range it was tested with, and the parts of GRPOTrainer that it builds on."""

from __future__ import annotations

import inspect
import warnings

import trl
from packaging.version import Version
from trl import GRPOTrainer

OLDEST, NEWEST = Version("1.16"), Version("1.16")  # of major.minor, both tested

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
    version = Version(trl.__version__)
    supported = f"TRL {OLDEST}" if OLDEST == NEWEST else f"TRL {OLDEST} to {NEWEST}"
    remedy = f"pip install 'trl>={OLDEST},<{NEWEST.major}.{NEWEST.minor + 1}'"
    if version < OLDEST:
        raise ImportError(f"edge_grpo.integrations.trl supports {supported}; got {version}; {remedy}")
    for name, expected in SIGNATURES.items():
        method = getattr(GRPOTrainer, name, None)
        found = () if method is None else tuple(inspect.signature(method).parameters)
        if [parameter for parameter in found if parameter in expected] != list(expected):
            raise ImportError(
                f"edge_grpo.integrations.trl supports {supported}; GRPOTrainer.{name} of TRL {version} takes "
                f"{', '.join(found) or 'nothing: it is gone'}; expected {', '.join(expected)}; {remedy}"
            )
    if (version.major, version.minor) > (NEWEST.major, NEWEST.minor):
        warnings.warn(f"edge_grpo.integrations.trl was tested with {supported}; this is {version}", stacklevel=3)
