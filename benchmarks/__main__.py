"""Run all benchmarks and summarize them: our times against the best peer's and the floor. The last line is JSON.

Takes about 14 minutes on two cores, ``--quick`` about one. Plots and the JSON go to ``--output``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import plots
from benchmarks.harness import COMPILED, OURS, Result, WrongError, clean, describe, machine, run_all, select, title

SCRIPTS = ("accuracy", "logits", "head", "memory", "end_to_end")
QUICK = ("accuracy", "logits", "head")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"small configurations of {', '.join(QUICK)}")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder for plots and results.json (default: benchmarks/results)",
    )
    options = parser.parse_args()
    start = time.perf_counter()
    where = machine()
    print(describe(where), flush=True)
    results: list[Result] = []
    try:
        for script in QUICK if options.quick else SCRIPTS:
            module = importlib.import_module(f"benchmarks.{script}")
            results += run_all(script, select(module.configs, quick=options.quick))
    except WrongError as error:
        print(f"{OURS} is wrong: {error}")
        return 1
    print("\n" + "\n".join(summary(results)))
    print("\n" + "\n".join(more_exact(results)))
    written = [] if options.quick else plots.draw(results, options.output)
    message = clean({"machine": where, "seconds": time.perf_counter() - start, "results": results})
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(message, indent=1))
    print(f"\n{message['seconds']:.0f} s; {', '.join(map(str, [*written, options.output / 'results.json']))}")
    print(json.dumps(message))
    return int(any("failed" in result for result in results))


class Time(NamedTuple):
    """Milliseconds, and as the ratio of two of them."""

    median: float
    fastest: float

    @classmethod
    def of(cls, row: Result) -> Time:
        return cls(row["median_ms"], row["min_ms"])

    def over(self, other: Time) -> str:
        return f"{self.median / other.median:.2f} ({self.fastest / other.fastest:.2f})"


def summary(results: Sequence[Result]) -> Iterator[str]:
    """Yield lines: our time, the ratios of torch.compile and the fastest peer to it, and its ratio to the floor.

    Ratios of medians and, in brackets, of the fastest runs. The host of a virtual machine can dominate medians, for
    example by reclaiming freed memory and returning it at 1 GB/s; contenders that allocate much suffer most.
    """
    yield f"{'':72} {'ours':>10} {'compile':>15}  {'best peer':40} floor"
    for result in results:
        for suffix in ("", ", accumulated"):
            times = {
                name.removesuffix(suffix): Time.of(row)
                for name, row in result.get("contenders", {}).items()
                if "median_ms" in row and name.endswith(suffix) and (suffix or "accumulated" not in name)
            }
            if OURS not in times:
                continue
            ours = times[OURS]
            peers = {name: time for name, time in times.items() if not name.startswith(OURS)}
            compiled = peers[COMPILED].over(ours) if COMPILED in peers else ""
            best = min(peers, key=lambda name: peers[name], default=None)
            against = "" if best is None else f"{peers[best].over(ours)} {best}"
            floor, limits = result.get("floor", ""), result.get("limits", {})
            rows = {name: limits.get(name, {}) for name in (floor, f"{floor}, float32")}
            floors = [f"{ours.over(Time.of(row))} {name}" for name, row in rows.items() if "median_ms" in row]
            label = title(result).replace(" pages", "") + suffix
            yield f"{label:72} {ours.median:7.1f} ms {compiled:>15}  {against:40} {', '.join(floors)}"
    for result in results:
        extra = {n: r["extra_bytes"] for n, r in result.get("contenders", {}).items() if r.get("extra_bytes")}
        if result["work"].startswith("memory") and OURS in extra:
            yield f"{title(result):72} {', '.join(f'{name} {size / 1e6:,.0f} MB' for name, size in extra.items())}"


def more_exact(results: Sequence[Result]) -> list[str]:
    """Return lines: where our error exceeds a peer's by more than half and by more than float32 rounding."""
    lines = []
    for result in results:
        rows = {name: row["errors"] for name, row in result.get("contenders", {}).items() if row.get("errors")}
        for kind, ours in rows.get(OURS, {}).items():
            errors = {name: errors[kind] for name, errors in rows.items() if kind in errors}
            for name, error in errors.items():
                if math.isfinite(error) and ours > 1.5 * error + 1e-6:
                    lines.append(
                        f"more accurate than ours: {name}, {kind}: {error:.1e} to {ours:.1e} ({title(result)})"
                    )
    return lines or ["No contender is more accurate than ours by more than half and 1e-6."]


if __name__ == "__main__":
    sys.exit(main())
