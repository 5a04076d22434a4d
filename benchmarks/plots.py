"""The plots of a full run: time from logits over N and over V, and the head's memory over N."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks import head, logits, peers
from benchmarks.harness import COMPILED, OURS, Result

SHOWN = (OURS, COMPILED, peers.TRL, peers.TRL_HEAD, peers.VERL, peers.CUT, peers.LIGER)
Series = dict[str, list[tuple[int, float]]]


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Return the files of the plots that ``results`` has points for."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [r for r in results if "contenders" in r and r.get("pages") == "huge" and r.get("dtype") == "float32"]
    times = [r for r in chosen if r["work"] == logits.LOSS]
    panels = [
        ("tokens N, at V = 151,936", "rows", [r for r in times if r["vocab"] == 151_936]),
        ("vocabulary V, at N = 512", "vocab", [r for r in times if r["rows"] == 512]),
    ]
    drawn = [(label, _series(group, key, "median_ms", 1)) for label, key, group in panels]
    memory = [r for r in results if "contenders" in r and r["work"].startswith("memory")]
    needed = _series(memory, "rows", "extra_bytes", 1e6)
    title = "loss + gradient from float32 logits, huge pages"
    written = [_figure(folder / "time.png", title, "milliseconds", drawn)]
    title = f"{head.WORK}:\nmemory besides inputs and gradients"
    written += [_figure(folder / "memory.png", title, "MB", [("tokens N, at V = 151,936", needed)])]
    return [path for path in written if path is not None]


def _series(results: Sequence[Result], key: str, field: str, unit: float) -> Series:
    series: Series = {}
    for result in results:
        for name, row in {**result["contenders"], **_floor(result)}.items():
            if field in row and (name in SHOWN or name == result["floor"]):
                series.setdefault(name, []).append((result[key], row[field] / unit))
    return {name: sorted(points) for name, points in series.items()}


def _floor(result: Result) -> dict[str, Result]:
    return {name: row for name, row in result["limits"].items() if name == result["floor"]}


def _figure(path: Path, title: str, unit: str, panels: Sequence[tuple[str, Series]]) -> Path | None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    if not any(panel for _, panel in panels):
        return None
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), squeeze=False, sharey=True)
    for axis, (label, series) in zip(axes[0], panels, strict=True):
        for name, points in series.items():
            style = {"color": "black", "linestyle": ":"} if name not in SHOWN else {"color": f"C{SHOWN.index(name)}"}
            axis.plot(
                *zip(*points, strict=True), marker="o", label=name, linewidth=2.5 if name == OURS else 1.2, **style
            )
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.set_xticks(sorted({x for points in series.values() for x, _ in points}))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(unit)
    axes[0][0].legend(frameon=False, fontsize=9)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
    return path
