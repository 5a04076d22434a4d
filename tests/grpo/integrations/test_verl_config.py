"""How verl finds the trainer mode, what the section ``edge`` may hold, the recipe, the guard against another verl."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

pytest.importorskip("tensordict", reason="verl's requirements: make test-verl")
pytest.importorskip("verl.trainer.ppo.v1", reason="verl's requirements: make test-verl")

import verl
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from paths import ROOT
from verl.trainer.ppo.v1 import PPOTrainerSync
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.utils.config import validate_config
from verl.utils.import_utils import load_class_from_fqn
from verl_runs import TINY, compose_config, environment

from edge_grpo.config import recipe_names
from edge_grpo.integrations.verl import EdgeAgentLoopManager, EdgePPOTrainerSync, guard
from edge_grpo.integrations.verl.settings import MANAGER, EdgeSettings, read_settings

DISCOVERY = """
import verl  # and nothing of ours: the entry point brings it in
from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
from verl.trainer.ppo.v1 import get_trainer_cls
print(get_trainer_cls("edge_sync").__name__, _agent_loop_registry["edge_agent"]["_target_"])
"""


@pytest.mark.slow
def test_verl_finds_the_trainer_by_itself(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", DISCOVERY], env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = result.stdout.split()[-2:]
    assert found == ["EdgePPOTrainerSync", "edge_grpo.integrations.verl.agent.EdgeAgentLoop"]


@pytest.mark.slow
def test_a_plugin_that_does_not_fit_says_so(tmp_path):
    """verl itself hides the failure of a plugin."""
    (tmp_path / "transfer_queue.py").write_text("raise ModuleNotFoundError('no queue', name='transfer_queue')")
    result = subprocess.run(
        [sys.executable, "-c", "import verl"],
        env=environment(tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "edge_sync is not available" in result.stderr
    assert (
        "transfer_queue is not installed; in an environment of its own: pip install 'edge-grpo[verl]'" in result.stderr
    )


def test_one_option_routes_everything():
    config = compose_config()
    trainer = EdgePPOTrainerSync(config)
    assert isinstance(trainer, PPOTrainerSync)
    assert trainer.trainer_mode == "sync"
    assert type(trainer.replay_buffer) is ReplayBuffer  # and not that of asynchronous training
    agent = config.actor_rollout_ref.rollout.agent
    assert agent.default_agent_loop == "edge_agent"
    assert load_class_from_fqn(agent.agent_loop_manager_class, "AgentLoopManager") is EdgeAgentLoopManager
    assert agent.agent_loop_manager_class == MANAGER


def test_without_correction_rollouts_are_verls():
    config = compose_config("+edge.gec=false")
    EdgePPOTrainerSync(config)
    agent = config.actor_rollout_ref.rollout.agent
    assert agent.default_agent_loop == "single_turn_agent"
    assert agent.get("agent_loop_manager_class") is None


def test_defaults_are_those_of_our_own_configuration():
    assert read_settings(OmegaConf.create({})) == EdgeSettings()
    assert read_settings(OmegaConf.create({"edge": {"correction": {"scope": "one"}}})).correction.scope == "one"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+edge.edda=false"], "edda"),
        (["+edge.correction.scop=one"], "edge.correction.scop"),
        (["+edge.injected=sft"], "edge.injected"),
        (["+edge.accuracy_threshold=.nan"], "accuracy_threshold"),
        (["+edge.eda_config.scale_rewards=none"], "norm_adv_by_std_in_grpo decides"),
        (["+edge.correction.superseded=mask"], "correction.superseded must be 'credit'"),
        (["data.max_response_length=64"], "max_response_length must be more than edge.correction.max_length"),
        (["algorithm.rollout_correction.rollout_is=token"], "set edge.injected=mask"),
        (["algorithm.rollout_correction.bypass_mode=true"], "set edge.injected=mask"),
        (["actor_rollout_ref.rollout.enable_rollout_routing_replay=true"], "routing_replay=true"),
        (["reward.reward_model.enable=true"], "enable_resource_pool=true"),
        (["actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent"], "got tool_agent"),
        (["+actor_rollout_ref.rollout.agent.agent_loop_manager_class=a.B"], "got a.B"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_name(overrides, message):
    with pytest.raises(ValueError, match=message):
        EdgePPOTrainerSync(compose_config(*overrides))


def command(page: str) -> list[str]:
    """The one command, as a page has it."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = (line for line in text.splitlines() if line.startswith("python -m verl.trainer.main_ppo"))
    return shlex.split(line)


@pytest.mark.parametrize("page", ["README.md", "docs/verl.md"])
def test_the_recipe_is_a_configuration_of_verl(page):
    """The command, up to where verl would start a cluster: composed, accepted, and taken by the trainer."""
    words = command(page)
    folder, name = words[words.index("--config-dir") + 1], words[words.index("--config-name") + 1]
    with initialize_config_dir(str(ROOT / folder), version_base=None):
        config = compose(name, [word for word in words if "=" in word])
    validate_config(config, use_reference_policy=False, use_critic=False)
    with_model = OmegaConf.merge(config, {"actor_rollout_ref": {"model": {"path": str(TINY)}}})
    trainer = EdgePPOTrainerSync(with_model)
    assert not trainer.use_critic
    assert trainer.edge == EdgeSettings()
    assert "verl-edge" not in recipe_names()  # edge-grpo train could not read it


def test_another_verl_is_refused_by_range_and_signature(monkeypatch):
    guard.check_verl()
    monkeypatch.setattr(verl, "__version__", "0.8.0")
    with pytest.raises(ImportError, match=r"supports verl 0.9; got 0.8.0; pip install 'verl>=0.9,<0.10'"):
        guard.check_verl()
    monkeypatch.setattr(verl, "__version__", "0.10.0")
    with pytest.warns(UserWarning, match=r"was tested with verl 0.9; this is 0.10.0"):
        guard.check_verl()
    monkeypatch.setattr(PPOTrainerSync, "_compute_advantage", lambda self, data: None)
    with pytest.raises(
        ImportError, match=r"PPOTrainerSync._compute_advantage of verl 0.10.0 takes self, data; expected"
    ):
        guard.check_verl()
