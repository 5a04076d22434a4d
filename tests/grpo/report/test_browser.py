"""The page's script in a browser: what it draws of runs and groups, and what must not be lost, hidden or left empty."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from report_page import BROWSER, HOSTILE, charts_of, drawn
from run_folder import append, make_run

from edge_grpo.report.page import write_report

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome on PATH")


def numbers(chart: str) -> list[float]:
    """The labels of a chart's vertical axis, shares as percentages."""
    texts = re.findall(r'class="mark">([^<]*)<', chart)
    return [float(text.replace("−", "-").rstrip("%M")) * (1e6 if text.endswith("M") else 1) for text in texts]


def test_everything_is_drawn_without_an_error(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "edge", steps=20), make_run(tmp_path / "grpo", steps=8, method="grpo")]
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text('{"step": 1, "loss": NaN, "custom/one": 2}\n')
    record = {"step": 99, "problem": HOSTILE, "segments": [["injected", HOSTILE]], "correction": HOSTILE}
    append(runs[0] / "completions.jsonl", json.dumps(record) + "\n")
    markup = drawn(write_report([*runs, bare]), tmp_path / "profile")
    charts = charts_of(markup)
    wanted = {
        "Held-out accuracy",
        "Collapsed groups, after correction",
        "Entropy-driven weights",
        "Drift",
        "custom/one",
    }
    assert wanted | {"Time per step,  edge"} <= charts.keys()
    assert [title for title, chart in charts.items() if not re.search(r"<path|<circle", chart)] == []
    assert "Not drawn: KL to the reference (always 0)" in markup
    assert markup.count('class="card sample"') == 8
    assert 'class="nonfinite"' in charts["Loss"]
    assert "<img" not in re.sub(r"<script.*?</script>", "", markup, flags=re.DOTALL)


def test_groups_have_bands_and_every_row_is_full(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"{method}-{seed}", method=method, steps=20, seed=seed, final_accuracy=final)
        for method, final in (("grpo", 0.5), ("edge", 0.8))
        for seed in range(3)
    ]
    markup = drawn(write_report(runs), tmp_path / "profile")
    charts = charts_of(markup)
    assert "Held-out accuracy minus that of grpo" in charts
    for title in ("Entropy, mean over tokens", "Advantage variance", "Collapsed groups, before correction"):
        assert charts[title].count('fill-opacity="0.14"') == 2, title  # a band for each group
        assert len(set(re.findall(r'stroke-dasharray="([^"]*)" class="curve"', charts[title]))) == 2, title
    grids = re.findall(r'<div class="grid charts"[^>]*>(.*?)(?=<h2|<section)', markup, re.DOTALL)
    assert len(grids) >= 5
    for grid in grids:
        spans = [int(span) for span in re.findall(r'class="card chart" style="grid-column: span (\d+)', grid)]
        assert sum(spans) % 12 == 0
        assert {12 % span for span in spans} == {0}


def test_a_spike_and_its_axis(tmp_path: Path) -> None:
    """The labels of an axis enclose the curve; one spike in 5,000 steps is marked with its value, off the axis."""
    run = tmp_path / "long"
    run.mkdir()
    rows = [
        {"step": i, "grad/norm": 9e4 if i == 3112 else 1 + (i % 7) / 10, "accuracy/before": 0.78}
        for i in range(1, 5001)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    charts = charts_of(drawn(write_report([run]), tmp_path / "profile"))
    assert re.search(r'class="spike-label">90k<', charts["Gradient norm"])
    assert "beyond the axis" in charts["Gradient norm"]
    assert 1.6 <= max(numbers(charts["Gradient norm"])) <= 2
    assert max(numbers(charts["Accuracy"])) >= 78
