"""The settings of the trainer in TRL, the guard against another TRL, and what importing it needs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import trl
from trl import GRPOConfig, GRPOTrainer

from edge_grpo.integrations.trl import EdgeGRPOConfig, guard
from edge_kernels import EDAConfig


def config(tmp_path, **options):
    return EdgeGRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], **options)


def test_sections_take_our_own_keys(tmp_path):
    settings = config(
        tmp_path,
        eda_config={"clip": 4, "mean_over": "batch"},
        correction='{"mix": {"answer": 1}, "max_length": 64}',  # as on a command line
        reward={"answer": "hash", "tolerance": 1e-3},
    ).edge_settings()
    assert settings.eda == EDAConfig(0.25, 4.0, mean_over="batch")
    assert settings.correction.mix == {"answer": 1.0}
    assert settings.correction.max_length == 64
    assert settings.reward.answer == "hash"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eda_config": {"clp": 4}}, "unknown key eda.clp; did you mean eda.clip"),
        ({"eda_config": {"scale_rewards": False}}, "TRL's own option"),
        ({"correction": {"superseded": "mask"}}, "correction.superseded must be 'credit'"),
        ({"correction": {"mix": {"reflect": -1}}}, "correction.mix"),
        ({"correction": {"max_length": 0}}, "correction.max_length must be a whole number"),
        ({"correction": "solution"}, "correction must be a mapping"),
        ({"injected": "drop"}, "injected must be one of"),
        ({"shaped_gamma": 0}, "shaped_gamma"),
        ({"reward": {"weights": {"accuracy": 1}}}, "reward_funcs and reward_weights"),
    ],
)
def test_wrong_settings_are_refused_with_their_names(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_trls_own_config_is_refused(make_trainer, tmp_path):
    from edge_grpo.integrations.trl import EdgeGRPOTrainer

    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    with pytest.raises(TypeError, match="args must be an EdgeGRPOConfig; got GRPOConfig"):
        EdgeGRPOTrainer("model", args=args)


def test_another_trl_is_refused_by_range_and_signature(monkeypatch):
    guard.check_trl()
    monkeypatch.setattr(trl, "__version__", "1.15.2")
    with pytest.raises(ImportError, match=r"supports TRL 1.16; got 1.15.2; pip install 'trl>=1.16,<1.17'"):
        guard.check_trl()
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.warns(UserWarning, match="was tested with TRL 1.16; this is 1.17.0"):
        guard.check_trl()
    monkeypatch.setattr(GRPOTrainer, "_generate", lambda self, requests: None)
    with pytest.raises(ImportError, match=r"GRPOTrainer._generate of TRL 1.17.0 takes self, requests; expected self"):
        guard.check_trl()
    monkeypatch.delattr(GRPOTrainer, "_calculate_rewards")
    monkeypatch.setattr(guard, "SIGNATURES", {"_calculate_rewards": ("self",)})
    with pytest.raises(ImportError, match="nothing: it is gone"):
        guard.check_trl()


MISSING = """
import sys
sys.modules["trl"] = None  # what `import trl` finds where it is not installed
try:
    import edge_grpo.integrations.trl
except ImportError as error:
    print(error)
import edge_grpo.integrations
"""
NO_SIDE_EFFECTS = """
import trl.trainer.grpo_trainer as theirs, trl.trainer.utils as utils
before = {name: id(value) for module in (theirs, utils) for name, value in vars(module).items()}
methods = {name: id(value) for name, value in vars(theirs.GRPOTrainer).items()}
import torch.distributed
from edge_grpo.integrations.trl import EdgeGRPOConfig, EdgeGRPOTrainer
assert before == {name: id(value) for module in (theirs, utils) for name, value in vars(module).items()}
assert methods == {name: id(value) for name, value in vars(theirs.GRPOTrainer).items()}
assert not torch.distributed.is_initialized()
"""


@pytest.mark.slow
def test_importing_it_changes_nothing_and_says_what_is_missing():
    done = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (
        "edge_grpo.integrations.trl needs TRL, which is not installed; pip install 'edge-grpo[trl]'"
    )
    done = subprocess.run([sys.executable, "-c", NO_SIDE_EFFECTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ""
