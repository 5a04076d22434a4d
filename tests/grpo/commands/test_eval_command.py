"""The commands eval and compare on a suite, for real: the shipped model answers two sets of arithmetic."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from edge_grpo.commands import main as cli
from edge_grpo.data.arithmetic import generate
from edge_grpo.evaluation import suite
from edge_grpo.evaluation.result import Result

ASK = ["eval", "edge_grpo:tiny", "--suite", "sets", "--template", "config", "--max-tokens", "24"]


@pytest.fixture(autouse=True)
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sets of different sizes in the working directory; the second has no problem of level 2."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "sets"
    folder.mkdir()
    for name, levels, size in (("both", [1, 2], 8), ("first", [1], 5)):
        rows = [{"problem": e.problem, "answer": e.answer} for e in generate(levels, "test", 0, size)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(*arguments: str, status: int = 0) -> None:
    assert cli.main(arguments) == status


def test_a_suite_is_asked_kept_and_compared(capsys: pytest.CaptureFixture[str]) -> None:
    run(*ASK, "--k", "4", "--temperature", "1", "--json", "warm.json")
    printed = capsys.readouterr().out
    header, columns, *rows = printed.splitlines()
    assert header == (
        "edge_grpo:tiny: template config, 4 responses each, temperature 1, at most 24 tokens, transformers"
    )
    assert " ".join(columns.split()) == ("set problems avg@4 pass@4 maj@4 wrong unparseable timed out tokens cut off")
    assert [row.split()[:2] for row in rows[:2]] == [["both", "8"], ["first", "5"]]
    assert rows[2].startswith("all problems (micro)")
    assert rows[3].startswith("mean of sets (macro)")
    assert re.match(r"pass@2 [\d.]+%  maj@2 [\d.]+%  over all problems", rows[4])

    warm = Result.load(Path("warm.json"))
    assert [part.problems for part in warm.sets.values()] == [8, 5]
    assert len(warm.model["weights"]) == 32
    run(*ASK, "--json", "cool.json")
    cool = Result.load(Path("cool.json"))
    assert (cool.protocol.temperature, cool.protocol.generations) == (0.1, 1)  # as published
    assert (cool.model, cool.sets["both"].fingerprint) == (warm.model, warm.sets["both"].fingerprint)
    run(*ASK, "--json", "again.json")
    assert Result.load(Path("again.json")).sets == cool.sets  # the same seed, the same answers
    capsys.readouterr()

    run("compare", "cool.json", "warm.json", "--json", "difference.json")
    printed = capsys.readouterr().out
    difference = json.loads(Path("difference.json").read_text())
    gain = warm.estimates()[1]["accuracy"].value - cool.estimates()[1]["accuracy"].value
    assert difference["micro"]["difference"]["value"] == pytest.approx(gain)
    assert f" {100 * gain:+.1f} (" in printed
    assert "note: both results are from the same weights\n" in printed
    assert "note: temperature differs: 0.1 and 1.0\n" in printed

    run("eval", "warm.json", "--json", "graded.json")
    assert capsys.readouterr().out.endswith("0 of 52 outcomes changed\n")
    assert Result.load(Path("graded.json")) == warm
    run("eval", "warm.json", "--k", "3", status=2)
    assert "warm.json is graded again with its own settings; --k cannot change them" in capsys.readouterr().err

    run(*(word.replace("config", "chat") for word in ASK), "--sets", "first", "--json", "chat.json")
    run(*ASK, "--sets", "first", "--json", "plain.json")
    run("compare", "plain.json", "chat.json", status=2)
    assert "results must use the same template; got config" in capsys.readouterr().err


def test_an_interrupted_evaluation_is_finished(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = [*ASK, "--chunk", "5", "--json", "out.json"]
    evaluate, calls = suite.evaluate, []

    def stop_at_the_third(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*arguments, **options)

    monkeypatch.setattr(suite, "evaluate", stop_at_the_third)
    run(*ask, status=130)
    assert "the results so far are in out.json; add --resume to the command to finish it" in capsys.readouterr().err
    assert [len(part.evaluation.results) for part in Result.load(Path("out.json")).sets.values()] == [8, 0]
    run(*ask, status=2)
    assert "out.json exists already; finish it with --resume, replace it with --overwrite" in capsys.readouterr().err
    run("compare", "out.json", "out.json", status=2)
    assert "the first result is not finished" in capsys.readouterr().err
    run(*ask, "--seed", "3", "--resume", status=2)
    assert "out.json holds another evaluation" in capsys.readouterr().err
    run(*ask, "--resume")
    assert len(calls) == 4  # one set was left
    run(*ask, "--resume")
    assert len(calls) == 4
    run(*[*ask[:-1], "whole.json"])
    assert Result.load(Path("whole.json")) == Result.load(Path("out.json"))


def test_the_published_template_warns_where_a_tokenizer_does_not_know_it(capsys: pytest.CaptureFixture[str]) -> None:
    run("eval", "edge_grpo:tiny", "--suite", "sets", "--sets", "first", "--size", "2")
    printed = capsys.readouterr()
    assert "template qwen_math, 1 response each, temperature 0.1, at most 3000 tokens" in printed.out
    assert "warning: <|im_start|> and <|im_end|> of template qwen_math are ordinary text" in printed.err
    assert "warning: 2 of 2 prompts leave less than 3000 tokens within the model's context of 512" in printed.err
    assert "nothing was written; --json FILE keeps the result" in printed.err


def test_the_grader_is_checked_without_a_model(sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("eval", "--self-check", "--suite", "sets")
    assert re.search(r"^both +8 +100\.0%(?: +0\.0%){4} +0 +0 +0$", capsys.readouterr().out, re.MULTILINE)
    rows = [{"problem": "p", "answer": answer} for answer in ("1", "{5", r"\text{even}", None)]  # a brace too few
    (sets / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("eval", "--self-check", "--suite", "sets", "--template", "r1", "--json", "check.json", status=1)
    printed = capsys.readouterr().out
    assert re.search(r"^odd +4 +66\.7% +0\.0% +0\.0% +33\.3% +0\.0% +1 +\d +1$", printed, re.MULTILINE)
    assert "odd: the grader rejects the data's own answer: row 1\n" in printed
    assert "odd: no answer: row 3\n" in printed
    assert json.loads(Path("check.json").read_text())["odd"]["rejected"] == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval"], "no model to evaluate; give MODEL, or --self-check"),
        (["eval", "m", "--self-check", "--suite", "sets"], "--self-check takes no model; got m"),
        (["eval", "--self-check"], "no data to evaluate on"),
        (["eval", "m", "--suite", "nowhere"], "no folder nowhere with evaluation sets"),
        (["eval", "m", "--suite", "sets", "--sets", "first,x"], "sets has no set 'x'; there are both, first"),
        (["eval", "m", "--data", "d", "--sets", "a"], "--sets chooses among the sets of a suite"),
        (["eval", "m", "--suite", "sets", "--resume"], "--resume needs to know which result: give --json FILE"),
        (["eval", "edge_grpo:tiny", "--suite", "sets", "--chunk", "0"], "chunk must be at least 1; got 0"),
        (["eval", "none.json"], "no evaluation result none.json"),
        (["compare", "a.json", "b.json"], "no evaluation result a.json"),
    ],
)
def test_a_mistake_gets_one_message(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(*arguments, status=2)
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_a_run_folder_brings_no_arguments_of_vllm_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor is a reward function a reason to ask: an evaluation calls none."""
    run_folder = tmp_path / "theirs"
    (run_folder / "final").mkdir(parents=True)
    settings = "reward: {weights: {accuracy: 1, theirs:f: 1}}\neval: {data: arithmetic@test}\n"
    (run_folder / "config.yaml").write_text(settings)
    run("eval", str(run_folder), status=2)
    assert "is a folder without config.json" in capsys.readouterr().err
    (run_folder / "config.yaml").write_text(settings + "rollout: {engine: vllm, vllm: {worker_cls: theirs.C}}\n")
    run("eval", str(run_folder), status=2)
    assert (
        "theirs/config.yaml runs code or reaches other machines by rollout.vllm.worker_cls;" in capsys.readouterr().err
    )
    run("eval", str(run_folder), "--trust", status=2)
    assert "is a folder without config.json" in capsys.readouterr().err
