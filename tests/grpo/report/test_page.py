"""The report page: what a run left is on it, nothing breaks it, nothing is fetched, no text escapes into markup."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from report_page import HOSTILE, Page
from run_folder import append, make_run

from edge_grpo.report import page as page_module
from edge_grpo.report.page import write_report
from edge_grpo.run.history import MAX_CHARACTERS, MAX_POINTS, MAX_TEXT

STYLES = Path(page_module.__file__).with_name("page")

# ---- What is on the page


def test_a_run_is_on_its_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "first", steps=30)
    path = write_report([run])
    assert path == run / "report.html"
    assert [entry.name for entry in run.iterdir() if "partial" in entry.name] == []
    page = Page(path)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = records[-1]
    assert f"22.0% ± 2.9 → {100 * last['eval/accuracy']:.1f}% ± {100 * last['eval/stderr']:.1f}" in page.words
    assert f"{100 * (last['eval/accuracy'] - 0.22):+.1f} points held-out accuracy, step 0 → 30" in page.words
    assert "Steps 30 of 30" in page.words
    assert "Time in steps 1 min" in page.words  # 30 steps of 2.1 seconds
    assert "model edge_grpo:tiny · trained on arithmetic · held-out arithmetic@test" in page.words
    (data,) = page.runs
    assert data["steps"] == list(range(1, 31))  # step 0 has an evaluation only
    assert data["minutes"][-1] == pytest.approx(30 * 2.1 / 60)
    assert [e["step"] for e in data["evals"]] == [0, 10, 20, 30]
    assert data["columns"]["reward/mean"] == pytest.approx([r["reward/mean"] for r in records[1:]], rel=1e-4)
    assert len(data["completions"]) == 30 * 4
    assert data["prompt"].startswith("<user>What is")


def test_the_configuration_marks_what_differs(tmp_path: Path) -> None:
    def differing(page: Page) -> set[str]:
        return set(re.findall(r'<tr class="differs"><th scope="row">([^<]*)</th>', page.source))

    edge = make_run(tmp_path / "edge", steps=3)
    grpo = make_run(tmp_path / "grpo", steps=4, method="grpo")
    assert differing(Page(write_report([edge]))) == {"steps", "eval.data"}  # from the defaults; output never counts
    assert differing(Page(write_report([edge, grpo]))) == {"method", "steps"}  # from each other


def test_several_runs_share_one_page(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a" / name, method=m, steps=5) for name, m in (("x", "edge"), ("y", "grpo"))]
    runs.append(make_run(tmp_path / "b" / "x", method="grpo+reflection", steps=6))
    path = write_report(runs)
    assert path == tmp_path / "report.html"
    page = Page(path)
    assert [run["name"] for run in page.runs] == ["a/x", "a/y", "b/x"]  # as long as it takes to tell them apart
    assert [run["index"] for run in page.runs] == [0, 1, 2]
    assert "EDGE-GRPO: 3 runs compared" in page.words
    with pytest.raises(ValueError, match="each run can be given once"):
        write_report([runs[0], runs[0]])


def test_output_goes_where_it_is_wanted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2)
    wanted = tmp_path / "new" / "page.html"
    assert write_report([run], wanted) == wanted
    assert Page(wanted).runs[0]["name"] == "run"


# ---- What must not happen


def test_nothing_is_fetched(tmp_path: Path) -> None:
    page = Page(write_report([make_run(tmp_path / "run", steps=3)]))
    fetching = {"src", "href", "srcset", "action", "data", "poster"}
    assert [(tag, attrs) for tag, attrs in page.elements if fetching & attrs.keys()] == []
    assert [tag for tag, _ in page.elements if tag in ("link", "img", "iframe", "object", "embed", "base")] == []
    urls = set(re.findall(r"https?://[^\s\"'`)]+", page.source))
    assert urls == {"http://www.w3.org/2000/svg"}  # a namespace, which no browser opens
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|WebSocket|sendBeacon", page.source)
    policy = next(attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_text_cannot_become_markup(tmp_path: Path) -> None:
    clean = Page(write_report([make_run(tmp_path / "clean", steps=2)]))
    run = make_run(tmp_path / "<b>&run", steps=2)
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["data"]["system_prompt"] = tree["model"]["path"] = HOSTILE
    tree["method"] = HOSTILE
    tree[HOSTILE] = 1
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    record = {"step": 2, "problem": HOSTILE, "prompt": HOSTILE, "answer": HOSTILE, "segments": [["sampled", HOSTILE]]}
    append(run / "completions.jsonl", json.dumps(record | {"outcome": HOSTILE, "correction": HOSTILE}) + "\n")
    append(run / "metrics.jsonl", json.dumps({"step": 2, HOSTILE: 1.0}) + "\n")
    page = Page(write_report([run]))
    assert [tag for tag, _ in page.elements if tag == "img"] == []
    assert [t for t, _ in page.elements].count("script") == [t for t, _ in clean.elements].count("script")
    sample = page.runs[0]["completions"][-1]
    assert sample["segments"] == [["sampled", HOSTILE]]  # and yet nothing is lost
    assert sample["problem"] == HOSTILE
    assert "outcome" not in sample  # it would name a style
    assert HOSTILE in page.runs[0]["columns"]
    # Script puts text into the page as text nodes only.
    assert "innerHTML" not in page.script
    assert "insertAdjacentHTML" not in page.script


def test_what_could_not_be_judged_is_counted_over_the_whole_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2)
    assert "Answers timed out" not in Page(write_report([run])).words
    for step in range(3, MAX_POINTS + 103):
        row = {"step": step, "grading/answers_timed_out": 1, "grading/functions_timed_out": 2, "grading/skipped": 0}
        append(run / "metrics.jsonl", json.dumps(row) + "\n")
    words = Page(write_report([run])).words
    assert f"Answers timed out {MAX_POINTS + 100:,}" in words  # although the curves are thinned
    assert f"Reward calls timed out {2 * MAX_POINTS + 200:,}" in words
    assert "Responses skipped" not in words


# ---- What a run may lack


def test_unreadable_lines_are_counted_on_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=4)
    append(run / "metrics.jsonl", "[1]\n[2]\n[3]\n")
    assert "metrics.jsonl: 3 unreadable lines were skipped" in Page(write_report([run])).words


def test_numbers_that_are_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2)
    append(
        run / "metrics.jsonl",
        '{"step": 3, "loss": NaN, "grad/norm": Infinity, "kl/mean": null, "reward/mean": "?", "time/total": 1e999}\n',
    )
    (data,) = Page(write_report([run])).runs  # Page fails on a NaN, which is not JSON
    assert data["steps"] == [1, 2, 3]
    assert [data["columns"][key][-1] for key in ("loss", "grad/norm", "kl/mean", "reward/mean")] == [None] * 4


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl", "completions.jsonl"])
def test_a_missing_file_is_said(tmp_path: Path, missing: str) -> None:
    run = make_run(tmp_path / "run", steps=3)
    (run / missing).unlink()
    assert f"{missing} is missing" in Page(write_report([run])).words


def test_a_run_without_steps_or_evaluations(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3)
    for name in ("metrics.jsonl", "completions.jsonl"):
        (run / name).write_text("")
    page = Page(write_report([run]))
    assert "no held-out evaluation" in page.words
    assert "not finished: step 0 of 3" in page.words
    assert page.runs[0]["steps"] == []
    (run / "metrics.jsonl").write_text('{"step": 0, "eval/accuracy": 0.5, "eval/stderr": null}\n')
    assert "50.0% held-out accuracy before training" in Page(write_report([run])).words


def test_an_unreadable_configuration(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1)
    (run / "config.yaml").write_text("steps: [1")
    assert "config.yaml is not readable" in Page(write_report([run])).words


def test_a_page_is_about_runs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run folder"):
        write_report([tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match="is not a run folder: it holds neither config"):
        write_report([tmp_path])
    with pytest.raises(ValueError, match="at least one run"):
        write_report([])


# ---- Size


def test_a_long_run_is_thinned_and_says_so(tmp_path: Path) -> None:
    run = tmp_path / "long"
    run.mkdir()
    steps = 4000
    (run / "metrics.jsonl").write_text(
        "".join(f'{{"step": {i}, "loss": {i}, "time/total": 60}}\n' for i in range(1, steps + 1))
    )
    record = {"segments": [["sampled", "x" * (MAX_TEXT - 10)], ["injected", "y" * 15]], "problem": "?"}
    (run / "completions.jsonl").write_text(
        "".join(json.dumps(record | {"step": 1 + i // 8}) + "\n" for i in range(8 * 200))
    )
    path = write_report([run])
    page = Page(path)
    (data,) = page.runs
    assert len(data["steps"]) == MAX_POINTS == steps / 4
    assert (data["steps"][:2], data["steps"][-1], data["minutes"][-1]) == ([4, 8], steps, steps)
    assert [data[part]["loss"][0] for part in ("lows", "columns", "highs")] == [1, 2.5, 4]
    assert "time/total" not in data["lows"]  # it does not vary
    assert "the curves show means of 4 steps, and their smallest and largest values" in page.words
    chosen = [sample["step"] for sample in data["completions"]]
    assert {chosen.count(step) for step in chosen} == {8}  # steps stay whole
    assert (chosen[0], chosen[-1]) == (1, 200)
    assert f"{len(chosen)} of 1600 completions are shown, from {len(chosen) // 8} steps" in page.words
    assert path.stat().st_size < 1.3 * MAX_CHARACTERS
    sample = data["completions"][0]
    assert sample["segments"][1] == ["injected", "y" * 10]
    assert sample["cut"] == 5


def test_a_short_runs_page_is_small(tmp_path: Path) -> None:
    assert write_report([make_run(tmp_path / "run", steps=100)]).stat().st_size < 300_000


# ---- Colours and dashes

# Linear RGB as people without one kind of cone see it (Machado, Oliveira and Fernandes 2009, severity 1).
SIGHT = {
    "all cones": np.eye(3),
    "no red": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
    "no green": [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    "no blue": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
}
TO_LMS = [[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]]
TO_OKLAB = [[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45059], [0.02590, 0.78277, -0.80868]]


def linear(colour: str) -> np.ndarray:
    encoded = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    low, high = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (a, b))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_can_be_told_apart(sight: str) -> None:
    """Two colours that differ by 0.02 in OKLab are just told apart; on the card each has the contrast of a graphic."""
    css = (STYLES / "style.css").read_text()
    cards, palettes = re.findall(r"--card: (#\w{6})", css), re.findall(r"--c0: .*", css)
    assert len(cards) == len(palettes) == 2  # light and dark
    for card, line in zip(cards, palettes, strict=True):
        colours = re.findall(r"#\w{6}", line)
        assert len(colours) == 8
        assert min(contrast(colour, card) for colour in colours) >= 2.95
        seen = [TO_OKLAB @ np.cbrt(TO_LMS @ np.clip(SIGHT[sight] @ linear(colour), 0, 1)) for colour in colours]
        distances = [float(np.linalg.norm(a - b)) for i, a in enumerate(seen) for b in seen[:i]]
        assert min(distances) >= 0.05


def test_no_two_series_of_a_chart_share_a_dash() -> None:
    dashes = re.search(r"const DASHES = (\[.*?\]);", (STYLES / "series.js").read_text())
    assert dashes is not None
    patterns = json.loads(dashes[1])
    panels = re.findall(r"series: (\[\[.*?\]\])", (STYLES / "panels.js").read_text(), re.DOTALL)
    most = max(len(json.loads(series)) for series in panels)
    assert most == 6  # the times of a step; corrections are five
    assert len(patterns) == len(set(patterns)) == 8 >= most
