"""Every snippet of the README and of docs/ runs: Python as it stands, shell commands cut short, YAML read as a
configuration. Their links and pictures lead somewhere.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from edge_grpo.config import load_config

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in [*PAGES, ROOT / "CONTRIBUTING.md"]
}
SHORT = ["steps=1", "eval.size=8", "rollout.num_prompts=2", "rollout.num_generations=4"]


def snippets(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def every(language: str) -> list[object]:
    """A parameter for each snippet of a language, named by its page and number."""
    return [
        pytest.param(snippet, id=f"{page}-{number}")
        for page, text in TEXTS.items()
        for number, snippet in enumerate(snippets(text, language), start=1)
    ]


def commands() -> list[list[str]]:
    """The shell commands of all pages, the README's first."""
    return [
        shlex.split(line, comments=True)
        for text in TEXTS.values()
        for snippet in snippets(text, "sh")
        for line in snippet.replace("\\\n", " ").splitlines()
    ]


def test_every_snippet_has_a_language_that_is_run():
    found = {language for text in TEXTS.values() for language in re.findall(r"^```(\w*)$", text, flags=re.MULTILINE)}
    assert found == {"sh", "python", "yaml", ""}
    assert snippets(TEXTS["README.md"], "python")
    assert commands()


@pytest.mark.parametrize("code", every("python"))
def test_python(code, monkeypatch, tmp_path):
    monkeypatch.setenv("CI", "1")  # TRL sends no telemetry there
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "snippet", "exec"), {})


@pytest.mark.parametrize("text", every("yaml"))
def test_configurations(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    load_config(path)


@pytest.mark.parametrize("page", TEXTS)
def test_links(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXTS[page]):
        if not target.startswith("https://"):
            assert (ROOT / Path(page).parent / target).exists(), f"{page} links to {target}, which is not there"


@pytest.mark.parametrize("page", TEXTS)
def test_paths(page):
    """Files of the project that a page names exist."""
    folders = "tests|benchmarks|examples|recipes|scripts|csrc|edge_kernels|python"
    for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", TEXTS[page]):
        assert (ROOT / name).exists(), f"{page} names {name}, which is not there"


def test_make_targets_exist():
    for words in commands():
        if words[:1] == ["make"]:
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)


def expanded(word: str, folder: Path) -> list[str]:
    """The files that a shell in ``folder`` puts in the place of a pattern; any other word as it is."""
    found = sorted(path.relative_to(folder).as_posix() for path in folder.glob(word)) if "*" in word else []
    return found or [word]


@pytest.mark.slow
def test_edge_grpo(tmp_path):
    """In order, in one empty folder: each command finds what those before it left."""
    ran = 0
    for words in commands():
        if words[:1] == ["make"] or words[:3] == ["python", "-m", "verl.trainer.main_ppo"]:
            continue  # verl's: grpo/integrations/test_verl_config.py, in an environment that has it
        if words[0] in ("torchrun", "accelerate"):
            continue  # several processes: grpo/test_distributed.py, test_gpu_recipes.py; integrations/test_trl_zero.py
        assert words[0] == "edge-grpo", f"no test runs {words[0]}"
        if any(word.startswith("smollm2-135m") for word in words):
            continue  # grpo/config/test_recipes.py and grpo/rollout: they need the fetched model, or a server
        shorter = {"train": [] if "--resume" in words else SHORT, "eval": ["--size", "8"], "compare": [], "report": []}
        arguments = [re.sub(r"^steps=\d+$", "steps=2", word) for name in words[1:] for word in expanded(name, tmp_path)]
        result = subprocess.run(
            [sys.executable, "-m", "edge_grpo", *arguments, *shorter[words[1]]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, f"{shlex.join(words)}: {result.stderr[-2000:]}"
        ran += 1
    assert ran == 15
    assert list(tmp_path.glob("**/report.html"))
