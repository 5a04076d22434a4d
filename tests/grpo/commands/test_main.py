"""The command edge-grpo: help that is quick and complete, mistakes that are named, bugs that keep their traceback.

Training itself is replaced here, except in one test, which runs every command for real on the shipped model.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_trainer import FakeTrainer

from edge_grpo.commands import main as cli
from edge_grpo.config import describe, load_config, recipe_path
from edge_grpo.text import clock


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


def test_help_of_train_shows_the_most_used_keys() -> None:
    text = help_of("train", "--help").stdout
    assert "\n  optim.learning_rate=1e-06  " in text
    assert "the most used configuration keys (--help all shows every key)" in text
    assert "optim.weight_decay" not in text
    assert text == help_of("train", "-h").stdout


def test_help_of_train_lists_every_key_with_its_default_and_meaning() -> None:
    text = help_of("train", "--help", "all").stdout
    words = " ".join(text.split())
    for entry in describe():
        assert f"\n  {entry.key}=" in text
        assert entry.help in words
    assert "\n  optim.learning_rate=1e-06  " in text
    assert "\n  eval.data=null  " in text
    assert "(transformers, vllm, vllm-server)" in words  # choices that the help line does not name itself
    assert "edge-grpo train --recipe tiny" in text


def test_help_fits_the_terminal() -> None:
    for columns in (70, 100):
        _, keys = help_of("train", "--help", "all", columns=columns).stdout.split("every configuration key", 1)
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
    for example in examples:
        _, _, overrides = cli.parse(example)
        load_config(None, overrides)


# ---- Mistakes and bugs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "optm.learning_rate=1"], "unknown key optm.learning_rate; did you mean optim.learning_rate?"),
        (["train", "--recipe", "tinny"], "no recipe named 'tinny' (--config takes a file); did you mean tiny?"),
        (["train", "--config", "none.yaml"], "no configuration file none.yaml"),
        (["train", "optim.lr=1"], "override optim.lr=1: unknown key optim.lr; did you mean optim.learning_rate?"),
        (["train", "optim.learning_rate=1e38"], "learning_rate must be a number in (0, 1e37]; got 1e+38"),
        (["train", "optim.learning_rate=.inf"], "learning_rate must be a number in (0, 1e37]; got inf"),
        (["train", "steps=3", "steps=4"], "override steps=4: steps is given twice; first by steps=3"),
        (["train", "--method", "grpo", "method=edge"], "method is given twice; first by method=edge"),
        (["train", "trackers=wandbb"], "trackers takes trackio, wandb, "),
        (["report", "nowhere"], "no run folder nowhere"),
        (["eval", "edge_grpo:tiny"], "no data to evaluate on; give --suite DIR, or --data SPEC"),
        (
            ["eval", "m", "--data", "d", "--k", "4", "--temperature", "0"],
            "4 responses at --temperature 0 would repeat one",
        ),
        (["eval", "m", "--data", "d", "--temperature", "-1"], "--temperature must be a number of at least 0; got -1.0"),
        (["eval", "m", "--data", "d", "--k", "0"], "eval.generations must be a whole number of at least 1; got 0"),
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
        (["train", "--output", "a", "--output=b"], "--output is given twice"),
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

    assert cli.is_deliberate(caught(lambda: load_config(None, ["steps=0"])))
    assert cli.is_deliberate(caught(lambda: recipe_path("?")))
    assert not cli.is_deliberate(caught(lambda: clock(float("nan"))))  # a builtin complained in our code
    assert not cli.is_deliberate(caught(lambda: int("x")))


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("taken/figures.json", "taken is no folder"),
        ("taken/deep/figures.json", "taken is no folder"),
        ("folder", "it is a folder"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        ["eval", "absent-model", "--data", "d", "--json"],
        ["check", "d", "--json"],
        ["compare", "a", "b", "--json"],
        ["report", "run", "-o"],
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    file: str,
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("")
    Path("folder").mkdir()
    assert cli.main([*command, file]) == 2
    said = capsys.readouterr().err
    assert f"edge-grpo {command[0]}: {file} cannot be written: " in said
    assert reason in said


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EFBIG])
def test_what_the_machine_refuses_is_a_sentence(
    trainer: FakeTrainer, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    trainer.error = OSError(number, os.strerror(number), "out/metrics.jsonl")
    assert cli.main(["train", "--output", "out"]) == 2
    said = capsys.readouterr().err
    assert said.endswith(f"\nedge-grpo train: out/metrics.jsonl: {os.strerror(number)}\n")
    assert "Interrupted: no checkpoint had been saved yet" in said
    trainer.error = OSError(errno.EBADF, os.strerror(errno.EBADF))  # a bug
    with pytest.raises(OSError, match="Bad file descriptor"):
        cli.main(["train", "--resume", "--output", "out"])


def test_train_without_anything_prints_its_help() -> None:
    done = help_of("train")
    assert (done.returncode, done.stderr) == (2, "heavy:\n")
    assert done.stdout.startswith("usage: edge-grpo train")


@pytest.mark.slow
@pytest.mark.parametrize("module", ["edge_grpo", "edge_kernels.info"])
def test_a_reader_that_has_seen_enough_is_no_error(module: str) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-m", module, "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    writer.stdout.close()
    assert (writer.communicate()[1], writer.returncode) == ("", 141)


# ---- Everything, for real


@pytest.mark.slow
def test_train_eval_report_and_info(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["rollout.num_prompts=2", "rollout.num_generations=4", "rollout.max_completion_length=24"]
    small += ["eval.size=6", "optim.minibatches=1", "eval.every=0", "correction.max_length=24"]
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
    assert (name, found["problems"], figures["protocol"]["generations"]) == (own.eval.data, 5, 2)
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
    header, *rows, _, page = capsys.readouterr().out.splitlines()
    assert "against grpo" in header
    assert [row.split()[:2] for row in rows] == [["edge", "1"], ["grpo", "1"]]
    assert page == f"{tmp_path / 'report.html'}"

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
        ("eval --self-check eval.size=5", None, ["eval.size=5"]),
        ("eval --suite folder seed=1 my-model optim.epochs=2", "my-model", ["seed=1", "optim.epochs=2"]),
    ],
)
def test_settings_may_stand_where_a_name_was_left_out(line, positional, keys):
    command, options, overrides = cli.parse(line.split())
    assert getattr(options, command.optional) == positional
    assert sorted(overrides) == sorted(keys)
