"""Every snippet of the README runs: Python as it stands, shell commands cut short."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
from paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = ["steps=1", "eval.size=8", "rollout.num_prompts=2", "rollout.num_generations=4"]


def snippets(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    return [shlex.split(line, comments=True) for snippet in snippets("sh") for line in snippet.splitlines()]


def test_every_snippet_has_a_language_that_is_run():
    assert set(re.findall(r"^```(\w*)$", README, flags=re.MULTILINE)) == {"sh", "python", ""}
    assert snippets("python")
    assert commands()


@pytest.mark.parametrize("code", snippets("python"), ids=lambda code: code.splitlines()[1])
def test_python(code):
    exec(compile(code, "README.md", "exec"), {})


def test_make_targets_exist():
    for words in commands():
        if words[:1] == ["make"]:
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.slow
def test_edge_grpo(tmp_path):
    """In order, in an empty folder: each command finds what those before it left."""
    ran = 0
    for words in commands():
        if words[:1] == ["make"]:
            continue
        assert words[0] == "edge-grpo", f"no test runs {words[0]}"
        if any(word.startswith("smollm2-135m") for word in words):
            continue  # tests/test_recipes.py and test_vllm.py: they need the fetched model, or a server
        extra = {"train": SHORT, "eval": ["--size", "8"], "compare": [], "report": []}[words[1]]
        result = subprocess.run(
            [sys.executable, "-m", "edge_grpo", *words[1:], *extra], cwd=tmp_path, capture_output=True, text=True
        )
        assert result.returncode == 0, f"{shlex.join(words)}: {result.stderr[-2000:]}"
        ran += 1
    assert ran == 7
    assert list(tmp_path.glob("**/report.html"))
