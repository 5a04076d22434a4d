"""A run's identity: what of its data, model and reward functions may not change, and what is only said."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edge_grpo.config import DataConfig, ModelConfig, RewardConfig
from edge_grpo.policy.loading import load_model
from edge_grpo.run import identity
from edge_grpo.trainer import train

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*use_reentrant.*")]

REWARD = "def short(completions):\n    return [-len(text) / 100 for text in completions]\n"


def change_data():
    rows = Path("data.jsonl").read_text().splitlines()
    Path("data.jsonl").write_text("\n".join([rows[0].replace("2 + 3", "3 + 2"), *rows[1:]]))


def change_weights():
    model, _ = load_model(ModelConfig(path="model"))
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    model.save_pretrained("model")


def change_template():
    template = Path("model/chat_template.jinja")
    template.write_text(template.read_text() + "{# the same output #}")


def change_tokenizer():
    tokenizer = json.loads(Path("model/tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "NFC"}
    Path("model/tokenizer.json").write_text(json.dumps(tokenizer))


def change_reward():
    Path("rewards_of_mine.py").write_text(REWARD.replace("100", "99"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one step with files of its own for data, model and reward, and the configuration that continues it."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        rows = [{"problem": f"{a} + 3 = ?", "answer": str(a + 3)} for a in (2, 4)]
        Path("data.jsonl").write_text("\n".join(map(json.dumps, rows)))
        Path("rewards_of_mine.py").write_text(REWARD)
        model, tokenizer = load_model(ModelConfig())
        model.save_pretrained("model")
        tokenizer.save_pretrained("model")
    return folder


@pytest.fixture
def interrupted(config, finished, tmp_path, monkeypatch):
    """The configuration of a run that has made one of two steps, in a working directory of its own."""
    config = replace(
        config,
        output="run",
        method="grpo",
        steps=1,
        save_every=1,
        model=ModelConfig(path="model"),
        data=DataConfig(train="data.jsonl"),
        reward=RewardConfig(weights={"accuracy": 1.0, "rewards_of_mine:short": 1.0}),
        rollout=replace(config.rollout, max_completion_length=8),
    )
    if not (finished / "run").exists():
        monkeypatch.chdir(finished)
        train(config)
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return replace(config, steps=2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_data, "data.train"),
        (change_weights, "weights"),
        (change_template, "chat template"),
        (change_tokenizer, "tokenizer"),
        (change_reward, "reward function rewards_of_mine:short"),
    ],
)
def test_what_changed_is_refused_or_accepted(interrupted, capsys, change, named):
    change()
    with pytest.raises(ValueError, match=rf"cannot resume run: {named} changed since .* or add --accept-changes"):
        train(interrupted, resume=True)
    if change is change_data:
        train(interrupted, resume=True, accept_changes=True)
        assert f"resumed although it changed: {named}\n" in capsys.readouterr().err
        first, second = json.loads(Path("run/identity.json").read_text())
        assert (first["after_step"], second["after_step"]) == (0, 1)
        assert first["identity"]["inputs"][named] != second["identity"]["inputs"][named]


def test_versions_and_hardware_are_said(interrupted, capsys):
    path = Path("run/identity.json")
    [entry] = json.loads(path.read_text())
    assert entry["identity"]["versions"].keys() >= {"python", "torch", "transformers", "edge-grpo"}
    entry["identity"]["versions"]["torch"] = "1.0"
    entry["identity"]["hardware"]["device"] = "an abacus"
    path.write_text(json.dumps([entry]))
    train(interrupted, resume=True)
    said = capsys.readouterr().err
    assert f"torch was 1.0, is {torch.__version__}: the next steps may differ in rounding\n" in said
    assert "device was an abacus, is " in said


def test_a_run_without_identity_resumes_and_says_so(interrupted, capsys):
    Path("run/identity.json").unlink()
    train(interrupted, resume=True)
    assert "run holds no identity.json: whether data, model and reward functions are still" in capsys.readouterr().err
    assert [entry["after_step"] for entry in json.loads(Path("run/identity.json").read_text())] == [1]


def test_a_module_is_hashed_and_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "rewards_in_here"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "mine.py").write_text("a = 1")
    monkeypatch.chdir(tmp_path)
    before = identity._hash_module("rewards_in_here.mine")
    (package / "mine.py").write_text("a = 2")
    assert len({before, identity._hash_module("rewards_in_here.mine"), identity._hash_module("rewards_in_here")}) == 3
    assert identity._hash_module("rewards_in_here.absent") == "not found as a file"
