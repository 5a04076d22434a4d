"""The study's plots: held-out accuracy over steps and over generated tokens, the curves of the paper, the rates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.study.design import HARD, SHOWN, cells
from benchmarks.study.outcomes import area, at_step, at_tokens
from benchmarks.study.results import Made
from edge_grpo.report.groups import mean_interval

_COLORS = dict(zip(SHOWN, ("#444444", "#d98c00", "#3b8bc2", "#b5485d", "#2a8f5c"), strict=True))
_CURVES = {
    "entropy": "entropy (nats)",
    "advantage_var": "variance of the advantages",
    "collapsed_before": "collapsed groups before correction",
    "collapsed_after": "collapsed groups after correction",
}


def draw(made: Made, folder: Path) -> list[Path]:
    """Write the plots that there are runs for, and return their files."""
    shown = [name for name in SHOWN if not all("diverged" in run for run in made.of(name))]
    if not shown:
        return []
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "study"  # the same figure is the same file
    return [
        _accuracy(made, shown, folder / "study.png"),
        _curves(made, shown, folder / "study-curves.png"),
        _rates(made, folder / "study-rates.png"),
    ]


def _accuracy(made: Made, shown: Sequence[str], path: Path) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    steps = max((run["steps"] for name in shown for run in made.of(name)), key=len)  # one may have diverged
    for name in shown:
        runs = made.of(name)
        label = f"{name} (rate {1e4 * made.rates[f'{HARD.name}: {name}']:g}e-4)"
        _band(axes[0], steps, [[at_step(run, step) for step in steps] for run in runs], name, label)
        grid = np.linspace(0, min(run["tokens"][-1] for run in runs if "diverged" not in run), 40).tolist()
        _band(axes[1], grid, [[at_tokens(run, tokens) for tokens in grid] for run in runs], name, label)
    axes[0].set(xlabel="steps of 2 prompts x 4 responses", ylabel="held-out avg@4, %")
    axes[1].set(xlabel="generated tokens, thousands")
    axes[1].legend(frameon=False, fontsize=9, loc="lower right")
    figure.suptitle("Four-number arithmetic, each method at its tuned learning rate; mean and 95 % over eight seeds")
    return _save(figure, path)


def _curves(made: Made, shown: Sequence[str], path: Path) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(_CURVES), figsize=(14, 3.4))
    for axis, (key, title) in zip(axes, _CURVES.items(), strict=True):
        for name in shown:
            runs = [run for run in made.of(name) if "diverged" not in run]
            _band(axis, runs[0]["steps"][1:], [run[key] for run in runs], name, name, scale=1)
        axis.set(xlabel="steps", title=title)
    axes[0].legend(frameon=False, fontsize=9)
    return _save(figure, path)


def _rates(made: Made, path: Path) -> Path:
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.5, 3.8))
    for cell in cells():
        if cell.setting == HARD and cell.name in SHOWN:
            tuned = sorted(made.results.tuning(cell).items())
            if tuned:
                means = [100 * fmean(area(run) for run in runs) for _, runs in tuned]
                axis.plot([rate for rate, _ in tuned], means, marker="o", color=_COLORS[cell.name], label=cell.name)
    axis.set(xscale="log", xlabel="learning rate", ylabel="mean held-out avg@4 of the run, %", title="Two tuning seeds")
    axis.legend(frameon=False, fontsize=9)
    return _save(figure, path)


def _band(
    axis: Any, x: Sequence[float], curves: Sequence[Sequence[float | None]], name: str, label: str, scale: float = 100
) -> None:
    """Draw the mean over runs and its 95 % interval at each point."""
    columns = list(zip(*curves, strict=True))
    estimates = [mean_interval([scale * value for value in column if value is not None]) for column in columns]
    axis.plot(x, [estimate.value for estimate in estimates], color=_COLORS[name], label=label)
    low, high = ([getattr(estimate, bound) for estimate in estimates] for bound in ("low", "high"))
    axis.fill_between(x, low, high, color=_COLORS[name], alpha=0.15, linewidth=0)
    axis.grid(alpha=0.25)


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)
    return path
