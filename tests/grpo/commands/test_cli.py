"""The command edge-grpo: help that is quick and complete, mistakes that are named, folders that are not overwritten.

Training itself is replaced here, except in the last test, which runs every command for real on the shipped model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from edge_grpo.commands import main as cli
from edge_grpo.config import TrainConfig, describe, from_dict, load_config, recipe_path, to_dict


@dataclass
class FakeTrainer:
    """Stands in for ``trainer.train``: remembers what it was asked for and leaves a run folder behind."""

    calls: list[tuple[TrainConfig, bool]] = field(default_factory=list)
    error: BaseException | None = None

    def train(self, config: TrainConfig, *, resume: bool = False) -> Any:
        self.calls.append((config, resume))
        output = Path(config.output)
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
        (output / "metrics.jsonl").write_text(
            '{"step": 0, "eval/accuracy": 0.2, "eval/stderr": 0.03}\n'
            '{"step": 3, "reward/mean": 0.5, "eval/accuracy": 0.65, "eval/stderr": 0.034}\n'
        )
        if self.error is not None:
            raise self.error
        return types.SimpleNamespace(steps=config.steps, seconds=75.0)

    @property
    def config(self) -> TrainConfig:
        return self.calls[-1][0]


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeTrainer:
    fake = FakeTrainer()
    module = types.ModuleType("edge_grpo.trainer")
    module.train = fake.train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "edge_grpo.trainer", module)
    monkeypatch.chdir(tmp_path)
    return fake


def help_of(*arguments: str, columns: int = 100) -> subprocess.CompletedProcess[str]:
    """The help, printed by a process of its own that ends by naming the slow modules it imported."""
    program = (
        "import sys\nfrom edge_grpo.commands.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    status = end.code\n"
        "heavy = {'torch', 'numpy', 'transformers', 'datasets', 'accelerate', 'math_verify'} & set(sys.modules)\n"
        "print('heavy:', *sorted(heavy), file=sys.stderr)\nsys.exit(status)"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={"COLUMNS": str(columns), "PYTHONPATH": ":".join(sys.path), "PYTHONIOENCODING": "utf-8"},
    )


# ---- Help


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["eval", "--help"],
        ["compare", "--help"],
        ["check", "--help"],
        ["report", "--help"],
        ["info", "--help"],
    ],
)
def test_help_waits_for_nothing_heavy(arguments: list[str]) -> None:
    done = help_of(*arguments)
    assert (done.returncode, done.stderr) == (0, "heavy:\n")
    assert done.stdout.startswith("usage: edge-grpo")


def test_help_names_the_commands() -> None:
    text = help_of("--help").stdout
    for command in ("train", "eval", "compare", "check", "report", "info"):
        assert f"\n    {command} " in text


def test_help_of_train_lists_every_key_with_its_default_and_meaning() -> None:
    text = help_of("train", "--help").stdout
    words = " ".join(text.split())
    for entry in describe():
        assert f"\n  {entry.key}=" in text
        assert entry.help in words
    assert "\n  optim.learning_rate=1e-06  " in text
    assert "\n  data.eval=null  " in text
    assert "(transformers, vllm, vllm-server)" in words  # choices that the help line does not name itself
    assert "edge-grpo train --recipe tiny" in text


def test_help_fits_the_terminal() -> None:
    for columns in (70, 100):
        _, keys = help_of("train", "--help", columns=columns).stdout.split("configuration keys", 1)
        too_long = [line for line in keys.splitlines()[1:] if len(line) > columns]
        assert [line for line in too_long if "=" not in line] == []  # only a key with its default may be longer


def test_the_examples_in_the_help_are_commands_that_parse() -> None:
    examples = [
        line.strip().partition("   ")[0].split()[1:]
        for command in ("train", "eval", "compare", "check", "report", "info")
        for line in help_of(command, "--help").stdout.splitlines()
        if line.startswith("  edge-grpo ")
    ]
    assert len(examples) >= 15
    parser, _ = cli._parser()
    for example in examples:
        _, rest = parser.parse_known_args(example)
        load_config(None, rest)


# ---- train


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


def test_other_processes_of_a_run_neither_claim_nor_print(
    trainer: FakeTrainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--output", "out"]) == 0
    capsys.readouterr()
    monkeypatch.setenv("RANK", "1")  # the first process may have made the folder already
    assert cli.main(["train", "--output", "out"]) == 0
    assert capsys.readouterr() == ("", "")


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


# ---- Mistakes and bugs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "optm.learning_rate=1"], "unknown key optm.learning_rate; did you mean optim.learning_rate?"),
        (["train", "--recipe", "tinny"], "no recipe of the name 'tinny' (a file goes by --config); did you mean tiny?"),
        (["train", "--config", "none.yaml"], "no configuration file none.yaml"),
        (["report", "nowhere"], "no run folder nowhere"),
        (["eval", "edge_grpo:tiny"], "no data to evaluate on; give --suite DIR, or --data SPEC"),
        (["eval", "m", "--data", "d", "--k", "4", "--temperature", "0"], "eval_generations = 4 at eval_temperature 0"),
        (["eval", "m", "--data", "d", "--k", "0"], "eval_generations must be a whole number of at least 1; got 0"),
    ],
)
def test_a_mistake_gets_one_message(
    trainer: FakeTrainer, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"edge-grpo {arguments[0]}: ")
    assert message in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "stps"], "unrecognized argument: stps; settings are given as KEY=VALUE"),
        (["train", "--stps", "3"], "unrecognized argument: --stps"),
        (["report", "a", "--k=3"], "unrecognized argument: --k=3"),
        (["train", "--resume", "--overwrite"], "not allowed with argument"),
        (["train", "--recipe", "tiny", "--config", "a.yaml"], "not allowed with argument"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_what_is_no_argument_is_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert message in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(trainer: FakeTrainer) -> None:
    trainer.error = ValueError("from somewhere else")  # not raised by the package: this file is not part of it
    with pytest.raises(ValueError, match="from somewhere else"):
        cli.main(["train", "--output", "out"])


def test_only_what_the_package_raises_on_purpose_is_for_the_user() -> None:
    def caught(call: Any) -> BaseException:
        with pytest.raises(ValueError) as found:  # noqa: PT011 - any will do
            call()
        return found.value

    assert cli._is_for_the_user(caught(lambda: load_config(None, ["steps=0"])))
    assert cli._is_for_the_user(caught(lambda: recipe_path("?")))
    assert not cli._is_for_the_user(caught(lambda: cli._clock(float("nan"))))  # a builtin complained in our code
    assert not cli._is_for_the_user(caught(lambda: int("x")))


# ---- Everything, for real


@pytest.mark.slow
def test_train_eval_report_and_info(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["rollout.num_prompts=2", "rollout.num_generations=4", "rollout.max_completion_length=24"]
    small += ["data.eval_size=6", "optim.minibatches=1", "eval_every=0", "correction.max_length=24"]
    for method in ("edge", "grpo"):
        arguments = ["train", "--recipe", "tiny", "--method", method, "--output", method, "steps=2", *small]
        assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "  before  " in printed
    assert "Model     grpo/final\n" in printed
    assert (tmp_path / "edge" / "report.html").stat().st_size > 10_000

    assert cli.main(["eval", "edge", "--k", "2", "--size", "5", "--json", "figures/edge.json"]) == 0
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures" / "edge.json").read_text())
    own = load_config(recipe_path("tiny"))
    assert figures["model"]["name"] == "edge/final"
    assert figures["protocol"]["template"]["name"] == "config"
    assert figures["protocol"]["temperature"] == own.rollout.temperature
    [(name, found)] = figures["sets"].items()
    assert (name, found["problems"], figures["protocol"]["generations"]) == (own.data.eval, 5, 2)
    accuracy, best = found["accuracy"], found["pass@2"]
    assert 0 <= accuracy["value"] <= best["value"] <= 1
    for figure in (accuracy, best):
        assert f" {100 * figure['value']:.1f}% ({100 * figure['low']:.1f}-{100 * figure['high']:.1f}) " in printed

    # The run's own settings are evaluated: the same figures as the trainer's last evaluation.
    assert cli.main(["eval", "edge", "--json", "again.json"]) == 0
    last = [json.loads(line) for line in (tmp_path / "edge" / "metrics.jsonl").read_text().splitlines()][-1]
    assert json.loads((tmp_path / "again.json").read_text())["micro"]["accuracy"]["value"] == last["eval/accuracy"]
    capsys.readouterr()

    assert cli.main(["report", "edge", "grpo"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"

    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "\n  tiny " in printed
    assert "token_stats" in printed


@pytest.mark.parametrize(
    ("line", "positional", "keys"),
    [
        ("check --recipe tiny seed=3", None, ["seed=3"]),
        ("check seed=3 math.jsonl", "math.jsonl", ["seed=3"]),
        ("check math.jsonl seed=3", "math.jsonl", ["seed=3"]),
        ("eval --self-check data.eval_size=5", None, ["data.eval_size=5"]),
        ("eval --suite folder seed=1 my-model optim.epochs=2", "my-model", ["seed=1", "optim.epochs=2"]),
    ],
)
def test_settings_may_stand_where_a_name_was_left_out(monkeypatch, line, positional, keys):
    seen = []
    for command in ("_check", "_eval"):
        monkeypatch.setattr(cli, command, lambda options, overrides: seen.append((options, overrides)) or 0)
    assert cli.main(line.split()) == 0
    [(options, overrides)] = seen
    assert (options.data if options.command == "check" else options.model) == positional
    assert sorted(overrides) == sorted(keys)
