"""Configuration of a run: the keys and their rules, reading and writing them, the help about them."""

from edge_grpo.config.correction import CorrectionConfig
from edge_grpo.config.help import describe, keys_help
from edge_grpo.config.keys import (
    AdvantageConfig,
    DataConfig,
    EvalConfig,
    Method,
    ModelConfig,
    OnError,
    OptimConfig,
    RewardConfig,
    TrainConfig,
)
from edge_grpo.config.published import PublishedConfig
from edge_grpo.config.reading import (
    flatten,
    from_dict,
    load_config,
    preset_names,
    recipe_names,
    recipe_path,
    to_dict,
)
from edge_grpo.config.rollout import Engine, RolloutConfig

__all__ = [
    "AdvantageConfig",
    "CorrectionConfig",
    "DataConfig",
    "Engine",
    "EvalConfig",
    "Method",
    "ModelConfig",
    "OnError",
    "OptimConfig",
    "PublishedConfig",
    "RewardConfig",
    "RolloutConfig",
    "TrainConfig",
    "describe",
    "flatten",
    "from_dict",
    "keys_help",
    "load_config",
    "preset_names",
    "recipe_names",
    "recipe_path",
    "to_dict",
]
