"""edge-grpo train: where its settings come from, folders that are not overwritten, how an interrupted run goes on.

Training itself is replaced by ``FakeTrainer``.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from fake_trainer import FakeTrainer

from edge_grpo.commands import main as cli
from edge_grpo.config import from_dict, load_config, recipe_path
from edge_grpo.run.stop import Stopped


def test_train_reads_recipe_options_and_keys_in_any_order(
    trainer: FakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "steps=3", "--recipe", "tiny", "optim.learning_rate=1e-5", "--output", "out", "seed=4"]
    assert cli.main(arguments) == 0
    assert trainer.calls == [
        (load_config(recipe_path("tiny"), ["steps=3", "optim.learning_rate=1e-5", "seed=4", "output=out"]), False)
    ]
    printed = capsys.readouterr().out
    assert "before  20.0% ± 3.0\n" in printed
    assert "after   65.0% ± 3.4   +45.0 points\n" in printed
    assert "Steps     3 in 1 min 15 s\n" in printed
    assert "Report    out/report.html\n" in printed
    assert Path("out/report.html").is_file()


def test_train_from_a_file(trainer: FakeTrainer) -> None:
    Path("my.yaml").write_text("method: grpo\noutput: mine\n")
    assert cli.main(["train", "--config", "my.yaml"]) == 0
    assert trainer.config == from_dict({"method": "grpo", "output": "mine"})


def test_another_method_gets_a_folder_of_its_own(trainer: FakeTrainer) -> None:
    Path("my.yaml").write_text("method: edge\noutput: runs/mine\n")
    outputs = []
    for extra in (["--method", "edge"], ["--method", "grpo"], ["--method", "grpo+reflection"]):
        assert cli.main(["train", "--config", "my.yaml", *extra]) == 0
        outputs.append((trainer.config.method, trainer.config.output))
    assert outputs == [
        ("edge", "runs/mine"),
        ("grpo", "runs/mine-grpo"),
        ("grpo+reflection", "runs/mine-grpo-reflection"),
    ]
    assert cli.main(["train", "--config", "my.yaml", "--method", "grpo", "output=runs/own"]) == 0
    assert trainer.config.output == "runs/own"


def test_a_preset_has_a_folder_of_its_own_and_its_keys_can_be_overridden(
    trainer: FakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("my.yaml").write_text("output: runs/mine\nseed: 4\n")
    assert cli.main(["train", "--config", "my.yaml", "--preset", "published", "published.reencode=false"]) == 0
    assert (trainer.config.output, trainer.config.seed) == ("runs/mine-published", 4)
    assert trainer.config.published.drop_eos
    assert not trainer.config.published.reencode
    assert cli.main(["train", "--config", "my.yaml", "--preset", "published", "--method", "eda"]) == 0
    assert (trainer.config.method, trainer.config.output) == ("eda", "runs/mine-published-eda")
    assert cli.main(["train", "--config", "my.yaml", "--preset", "published", "--output", "other"]) == 0
    assert trainer.config.output == "other"
    assert cli.main(["train", "--preset", "unknown"]) == 2
    assert "no preset named 'unknown'; there are: published" in capsys.readouterr().err


def test_a_run_is_not_overwritten_unasked(trainer: FakeTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--output", "out"]) == 0
    notes = Path("out/notes.txt")
    notes.write_text("mine")
    old_checkpoint = Path("out/checkpoints/step-000001/model.bin")
    old_checkpoint.parent.mkdir(parents=True)
    old_checkpoint.write_text("")
    assert cli.main(["train", "--output", "out"]) == 2
    assert "out already holds a run; continue it with --resume, replace it with --overwrite" in capsys.readouterr().err
    assert len(trainer.calls) == 1
    assert old_checkpoint.exists()
    assert cli.main(["train", "--output", "out", "--overwrite", "steps=9"]) == 0
    assert trainer.config.steps == 9
    assert not old_checkpoint.exists()
    assert notes.read_text() == "mine"  # only what a run wrote is deleted


def test_a_file_in_the_way_is_not_deleted(trainer: FakeTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").write_text("mine")
    assert cli.main(["train", "--output", "out", "--overwrite"]) == 2
    assert "output must be a folder; out is a file" in capsys.readouterr().err
    assert trainer.calls == []


def test_resume_takes_the_runs_own_configuration(trainer: FakeTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--output", "out", "method=grpo", "steps=5"]) == 0
    assert cli.main(["train", "--resume", "--output", "out", "steps=8"]) == 0
    config, resume = trainer.calls[-1]
    assert resume
    assert (config.method, config.steps, config.output) == ("grpo", 8, "out")
    assert cli.main(["train", "--resume"]) == 2
    assert "--resume needs to know which run: give --output DIR" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "--output", "elsewhere"]) == 2
    assert "nothing to resume: elsewhere holds no config.yaml of a run" in capsys.readouterr().err


VLLM = ["rollout.engine=vllm", "rollout.vllm.dtype=bfloat16", "rollout.vllm.trust_remote_code=true"]
SERVER = ["rollout.engine=vllm-server", "rollout.server=10.0.0.1:80"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["reward.weights.theirs:f=1.0"], "reward.weights.theirs:f"),
        (["rollout.engine=vllm", "rollout.vllm.worker_cls=theirs.C"], "rollout.vllm.worker_cls"),
        (VLLM, "rollout.vllm.trust_remote_code"),
        (SERVER, "rollout.server"),
        ([SERVER[0], "rollout.server=10.0.0.1:80,10.0.0.2:80"], "rollout.server"),
        ([*SERVER[:1], "rollout.server_folder=/theirs"], "rollout.server_folder"),
    ],
)
def test_a_run_folder_runs_nothing_that_its_user_has_not_named(
    trainer: FakeTrainer, capsys: pytest.CaptureFixture[str], settings: list[str], named: str
) -> None:
    """Its config.yaml may come from somebody else, and names what a resumed run imports, calls and talks to."""
    assert cli.main(["train", "--output", "out", *settings]) == 0
    resume = ["train", "--resume", "--output", "out"]
    assert cli.main(resume) == 2
    said = capsys.readouterr().err
    assert f"out/config.yaml runs code or reaches other machines by {named}; if you trust" in said
    assert len(trainer.calls) == 1
    assert cli.main([*resume, "--trust"]) == 0
    assert cli.main([*resume, said.rpartition(": ")[2].strip()]) == 0  # as the message says
    assert cli.main(["train", "--resume", "--config", "out/config.yaml"]) == 0  # the user has named it
    assert len(trainer.calls) == 4


def test_a_run_folder_without_such_settings_needs_no_trust(trainer: FakeTrainer) -> None:
    assert cli.main(["train", "--output", "out", *VLLM[:2]]) == 0
    assert cli.main(["train", "--resume", "--output", "out", "steps=200"]) == 0


def test_an_interrupted_run_says_what_its_resumption_needs(
    trainer: FakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.error = KeyboardInterrupt()
    state = Path("out/checkpoints/step-000020/trainer_state.json")
    assert cli.main(["train", "--output", "out", "reward.weights.mine:f=1"]) == 130
    state.parent.mkdir(parents=True)
    state.write_text('{"step": 20}')
    capsys.readouterr()
    assert cli.main(["train", "--resume", "--output", "out", "--trust"]) == 130
    trainer.error = None
    assert cli.main(capsys.readouterr().err.splitlines()[-1].split()[1:]) == 0


def test_changes_are_accepted_of_a_resumed_run_alone(trainer: FakeTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--output", "out", "--accept-changes"]) == 2
    assert "--accept-changes is for --resume" in capsys.readouterr().err
    assert cli.main(["train", "--output", "out"]) == 0
    assert cli.main(["train", "--resume", "--output", "out", "--accept-changes"]) == 0
    assert trainer.accepted == [False, True]


def test_other_processes_of_a_run_neither_claim_nor_print(
    trainer: FakeTrainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--output", "out"]) == 0
    capsys.readouterr()
    monkeypatch.setenv("RANK", "1")  # the first process may have made the folder already
    assert cli.main(["train", "--output", "out"]) == 0
    assert capsys.readouterr() == ("", "")


def test_ctrl_c_before_an_old_run_is_overwritten(trainer: FakeTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--output", "out"]) == 0
    state = Path("out/checkpoints/step-000020/trainer_state.json")
    state.parent.mkdir(parents=True)
    state.write_text('{"step": 20}')
    trainer.fails_to_load = True
    assert cli.main(["train", "--output", "out", "--overwrite"]) == 130
    assert "Interrupted: the run had not begun; the earlier one in out is as it was\n" in capsys.readouterr().err
    assert state.exists()


def test_sigterm_has_a_status_of_its_own(trainer: FakeTrainer) -> None:
    trainer.error = Stopped(signal.SIGTERM)
    assert cli.main(["train", "--output", "out"]) == 143


def test_ctrl_c_says_how_to_go_on(trainer: FakeTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    trainer.error = KeyboardInterrupt()
    assert cli.main(["train", "--output", "out"]) == 130
    assert "Interrupted: no checkpoint had been saved yet; save_every sets" in capsys.readouterr().err
    state = Path("out/checkpoints/step-000020/trainer_state.json")
    state.parent.mkdir(parents=True)
    state.write_text('{"step": 20}')
    assert cli.main(["train", "--resume", "--output", "out"]) == 130
    advice = capsys.readouterr().err
    assert "Interrupted: step 20 is saved; continue with\n  edge-grpo train --resume --output out\n" in advice
    trainer.error = None
    assert cli.main(advice.splitlines()[-1].split()[1:]) == 0  # the advice works
