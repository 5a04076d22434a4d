"""The section ``edge`` of a verl configuration: the settings of EDGE-GRPO under the names of our own configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf, open_dict

from edge_grpo.config import AdvantageConfig, CorrectionConfig
from edge_grpo.config.checks import real, refuse
from edge_grpo.config.reading import section_from_dict
from edge_grpo.text import Reasoning
from edge_kernels import EDAConfig

AGENT = "edge_agent"  # the agent loop that corrects
MANAGER = "edge_grpo.integrations.verl.worker.EdgeAgentLoopManager"
PLAIN_AGENT = "single_turn_agent"  # the one that it extends


@dataclass(frozen=True)
class EdgeSettings:
    """What ``edge`` may hold. Everything else is verl's: rewards, rollout, loss, parallelism, checkpoints."""

    eda: bool = True  # multiply advantages by the entropy weights of whole groups
    eda_config: AdvantageConfig = field(default_factory=AdvantageConfig)  # clip, preserve_scale, mean_over
    gec: bool = True  # correct incorrect responses of training, on token ids
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    # tokens that the policy did not sample: credit them like its own, or mask them (response_mask 0)
    injected: Literal["credit", "mask"] = "credit"
    accuracy_key: str | None = None  # entry of reward_extra_info that decides what is incorrect; null: the reward
    accuracy_threshold: float = 1.0  # a response is correct if that is at least this
    answer_key: str = "reward_model.ground_truth"  # place of the right answer in a row of the dataset
    solution_key: str = "extra_info.solution"  # place of the reference solution
    reasoning: Reasoning = "auto"  # as reward.reasoning: where an answer counts in a response with a think block
    seed: int = 0  # of the draws: which responses are corrected, and how

    def __post_init__(self) -> None:
        refuse(real("finite", accuracy_threshold=self.accuracy_threshold))

    @property
    def bounds(self) -> EDAConfig:
        """The settings of the entropy weights as the kernels take them."""
        given = self.eda_config
        return EDAConfig(1 / given.clip, given.clip, given.preserve_scale, given.mean_over)


def read_settings(config: DictConfig) -> EdgeSettings:
    """Return the section ``edge`` of a verl configuration; defaults where it is not there.

    Raises ValueError that names every unknown key, wrong type and value out of range.
    """
    section: Any = config.get("edge") or {}
    tree: Any = OmegaConf.to_container(section, resolve=True) if isinstance(section, DictConfig) else section
    if not isinstance(tree, dict):
        raise ValueError(f"edge is a section and must hold `key: value` lines; got {tree!r}")
    settings = section_from_dict(EdgeSettings, tree, "edge")
    if "scale_rewards" in (tree.get("eda_config") or {}):
        raise ValueError(
            "edge.eda_config must not set scale_rewards; verl's option algorithm.norm_adv_by_std_in_grpo decides"
        )
    if settings.correction.superseded != "credit":
        raise ValueError(
            "edge.correction.superseded must be 'credit'; verl has one mask for the loss and the entropy; train with "
            "edge-grpo train to mask superseded attempts"
        )
    return settings


def first_attempt_length(config: DictConfig, settings: EdgeSettings) -> int:
    """Return how many tokens a first attempt may have, so that its correction fits verl's limit of a response."""
    total = int(config.actor_rollout_ref.rollout.response_length)
    length = total - settings.correction.max_length
    if length < 1:
        raise ValueError(
            "data.max_response_length must be more than edge.correction.max_length, since a corrected response has to "
            f"fit; got {total} and {settings.correction.max_length}"
        )
    return length


def check_options(config: DictConfig, settings: EdgeSettings) -> None:
    """Raise ValueError for options of verl with which the method cannot do what it says; name a remedy."""
    algorithm, rollout = config.algorithm, config.actor_rollout_ref.rollout
    if not settings.gec:
        return
    first_attempt_length(config, settings)
    off = "set edge.gec=false to train without correction"
    reward_model = config.reward.reward_model
    if reward_model.enable and not reward_model.enable_resource_pool:
        raise ValueError(
            "correction needs rewards while it samples, but reward.reward_model.enable=true computes them afterwards; "
            f"set reward.reward_model.enable_resource_pool=true, or {off}"
        )
    if rollout.get("enable_rollout_routing_replay"):
        raise ValueError(
            f"correction does not work with actor_rollout_ref.rollout.enable_rollout_routing_replay=true; {off}"
        )
    importance = algorithm.get("rollout_correction") or {}
    for name in ("rollout_is", "rollout_rs", "bypass_mode"):
        if settings.injected == "credit" and importance.get(name):
            raise ValueError(
                f"edge.injected=credit does not work with algorithm.rollout_correction.{name}={importance[name]}: "
                f"injected tokens have no log-probability of the sampler; set edge.injected=mask, or {off}"
            )


def route_rollouts(config: DictConfig, settings: EdgeSettings) -> None:
    """Put our agent loop and its manager into ``config``, where verl's own defaults stand.

    Raises ValueError where something else stands there.
    """
    if not settings.gec:
        return
    agent = config.actor_rollout_ref.rollout.agent
    if agent.default_agent_loop not in (PLAIN_AGENT, AGENT):
        raise ValueError(
            f"correction works with rollout.agent.default_agent_loop={PLAIN_AGENT}, single turns of text; got "
            f"{agent.default_agent_loop}; set edge.gec=false to train without correction"
        )
    if agent.get("agent_loop_manager_class") not in (None, MANAGER):
        raise ValueError(
            f"correction needs rollout.agent.agent_loop_manager_class={MANAGER}; got {agent.agent_loop_manager_class}; "
            "leave it out, or set edge.gec=false to train without correction"
        )
    with open_dict(agent):
        agent.default_agent_loop, agent.agent_loop_manager_class = AGENT, MANAGER
