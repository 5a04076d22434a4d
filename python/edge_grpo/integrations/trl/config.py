"""TRL's GRPOConfig with the settings of EDGE-GRPO, under the names and rules of our own configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig, GRPOTrainer

from edge_grpo.config import AdvantageConfig, CorrectionConfig, RewardConfig
from edge_grpo.config.reading import section_from_dict
from edge_kernels import EDAConfig, GRPOLossConfig

GRADER = "edge_grpo:grader"  # no function can have this name


@dataclass
class EdgeGRPOConfig(GRPOConfig):
    """GRPOConfig with these fields more; with ``eda``, ``gec`` and ``fused_loss`` off, TRL's training to the bit.

    Raises ValueError that names every unknown key, wrong type and value out of range.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "eda_config", "correction", "reward"]  # noqa: RUF012

    eda: bool = field(default=True, metadata={"help": "Divide advantages by the response's relative entropy."})
    eda_config: dict[str, Any] | str | None = field(
        default_factory=dict,
        metadata={"help": "Keys of our section `eda`: clip, preserve_scale, mean_over. scale_rewards is TRL's option."},
    )
    gec: bool = field(default=True, metadata={"help": "Correct incorrect responses of training, on token ids."})
    correction: dict[str, Any] | str | None = field(
        default_factory=dict,
        metadata={
            "help": "Keys of our section `correction`: mix, reflection_text, answer_text, max_length, truncated, "
            "scope, max_per_group, long_solution, hint_min, hint_max."
        },
    )
    injected: str = field(
        default="credit",
        metadata={"help": "What tokens that the policy did not sample do in the loss: credit, mask, sft or shaped."},
    )
    sft_weight: float = field(default=1.0, metadata={"help": "Weight of the likelihood of injected tokens (`sft`)."})
    shaped_gamma: float = field(default=0.1, metadata={"help": "gamma of p / (p + gamma) (`shaped`)."})
    fused_loss: bool = field(
        default=True,
        metadata={"help": "Compute loss and statistics from hidden states with edge_kernels, without logits."},
    )
    accuracy_reward: str | None = field(
        default=None,
        metadata={
            "help": "Name of the reward function that decides which responses are incorrect; None is the first one, "
            f"`{GRADER}` our own grader, which compares with the answer column."
        },
    )
    accuracy_threshold: float = field(
        default=1.0, metadata={"help": "A response is correct if that reward is at least this."}
    )
    reward: dict[str, Any] | str | None = field(
        default_factory=dict,
        metadata={
            "help": "Keys of our section `reward` for our grader: answer, reasoning, tolerance, timeout. The answer's "
            "style and reasoning hold for corrections too."
        },
    )
    answer_column: str = field(default="answer", metadata={"help": "Column of right answers, for corrections."})
    solution_column: str = field(default="solution", metadata={"help": "Column of solutions, for corrections."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.edge_settings()  # complains now, not in the first step

    def edge_settings(self) -> EdgeSettings:
        """Return the sections as our own configuration objects. Raises ValueError as described above."""
        weights = _mapping("eda_config", self.eda_config)
        advantage = section_from_dict(AdvantageConfig, weights, "eda")
        if "scale_rewards" in weights:
            raise ValueError("eda_config must not set scale_rewards; TRL's own option of that name decides")
        correction = section_from_dict(CorrectionConfig, _mapping("correction", self.correction), "correction")
        if correction.superseded != "credit":
            raise ValueError(
                "correction.superseded must be 'credit'; TRL's losses take the completion's mask from TRL; train with "
                "edge-grpo train to mask superseded attempts"
            )
        grading = _mapping("reward", self.reward)
        reward = section_from_dict(RewardConfig, grading, "reward")
        for name in ("weights", "on_error", "function_timeout"):
            if name in grading:
                raise ValueError(f"reward must not set {name}; rewards are TRL's: reward_funcs and reward_weights")
        # Checks the three values that it takes.
        GRPOLossConfig(injected=self.injected, sft_weight=self.sft_weight, shaped_gamma=self.shaped_gamma)  # type: ignore[arg-type]
        bounds = EDAConfig(1 / advantage.clip, advantage.clip, advantage.preserve_scale, advantage.mean_over)
        return EdgeSettings(bounds, correction, reward)


@dataclass(frozen=True)
class EdgeSettings:
    """The sections of an EdgeGRPOConfig."""

    eda: EDAConfig
    correction: CorrectionConfig
    reward: RewardConfig


class ConfiguredTrainer(GRPOTrainer):
    """GRPOTrainer as the modules of this room see it: its attributes, with the types that it has once built."""

    args: EdgeGRPOConfig
    settings: EdgeSettings
    model: Any
    num_generations: int
    _logs: dict[str, Any]


def _mapping(name: str, value: dict[str, Any] | str | None) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a mapping (JSON on the command line); got {value!r}")
    return value
