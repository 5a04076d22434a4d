"""How a benchmark runs: a fresh process per configuration, contenders in turns, medians with spread, peak memory.

Tables and JSON are printed here. What is timed is in peers.py and limits.py, the configurations in each script.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

Config = dict[str, Any]  # the argument of a script's ``measure``: JSON
Configs = Callable[[bool], Sequence[Config]]  # a script's configurations; the flag asks for few small ones
Result = dict[str, Any]  # one table, a row for each contender: JSON
OURS = "edge_kernels"
SIZES = (("V", "vocab"), ("N", "rows"), ("D", "hidden"))
COMPILED = "torch.compile"
SLOW_SECONDS = (0.3, 1.0, 2.5)  # a contender slower than these runs only 4, 3 or 2 times
TIMEOUT_SECONDS = 900


# --- in the fresh process ---------------------------------------------------------------------------------------------


class WrongError(Exception):
    """Our result is less accurate than required, so nothing is timed."""


class Run(NamedTuple):
    """``run`` is timed; its result is freed after the clock has stopped. ``prepare`` runs before it, untimed."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    own_bytes: int = 0  # of its results, which do not count as extra memory


def take_turns(runs: Mapping[str, Run], repetitions: int) -> dict[str, Result]:
    """Return times in milliseconds and peak memory in bytes of each contender, run in turns with cold caches.

    The first round is not timed: it warms up, measures memory, and sets the number of timed rounds by its duration.
    With ``repetitions`` 0 it is the only one.
    """
    flush = torch.ones(_last_level_cache_bytes() // 4)
    times: dict[str, list[float]] = {name: [] for name in runs}
    rounds, peaks, failed = dict.fromkeys(runs, repetitions), {}, {}
    for turn in range(repetitions + 1):
        # Every other round runs backwards, so that no contender always follows the same one.
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            if name in failed or turn > rounds[name]:
                continue
            try:
                runs[name].prepare()
                flush.sum()
                if turn == 0:
                    extra, seconds = _peak_bytes(runs[name].run)
                    peaks[name] = max(extra - runs[name].own_bytes, 0)  # in this order NaN stays NaN
                    rounds[name] = min(repetitions, (repetitions, 4, 3, 2)[sum(seconds > s for s in SLOW_SECONDS)])
                    continue
                start = time.perf_counter()
                result = runs[name].run()
                times[name].append((time.perf_counter() - start) * 1e3)
                del result
            except Exception as error:  # any failure of a peer is a result
                failed[name] = explain(error)
    answers: dict[str, Result] = {name: {"failed": reason} for name, reason in failed.items()}
    for name, values in times.items():
        if name not in failed:
            answers[name] = {"repetitions": len(values), "extra_bytes": peaks[name]}
            if values:
                answers[name] = {**spread(values), **answers[name]}
    return answers


def spread(times_ms: Sequence[float]) -> Result:
    return {"median_ms": statistics.median(times_ms), "min_ms": min(times_ms), "max_ms": max(times_ms)}


def explain(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def _last_level_cache_bytes() -> int:
    """Return a little more than the largest cache that the system reports, between 64 and 512 MiB."""
    sizes = [64 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with suppress(OSError, ValueError):
            sizes.append(int(path.read_text().strip().removesuffix("K")) << 10)
    return min(512 << 20, max(sizes) * 5 // 4)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def _peak_bytes(run: Callable[[], object]) -> tuple[float, float]:
    """Return the growth of the resident set at its peak (NaN without /proc), and the seconds taken."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # memory that the allocator kept from earlier runs would hide this one's need
    before = math.nan
    with suppress(OSError, StopIteration):
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    del result
    return (math.nan if math.isnan(before) else _status("VmHWM") - before), seconds


def machine() -> dict[str, Any]:
    from edge_kernels import info

    about = info.collect()
    return {
        "cpu": about["cpu"]["name"],
        "threads": about["cpu"]["threads"],
        "instruction_set": about["cpu"]["instruction_set"],
        "torch": about["packages"]["torch"],
        "python": about["python"],
    }


def child() -> None:
    """Run in the fresh process: write the results of one ``measure(config)`` to the file named in the arguments."""
    module, config, answer = sys.argv[1:]
    try:
        message = {"results": importlib.import_module(module).measure(json.loads(config))}
    except WrongError as error:
        message = {"wrong": str(error)}
    Path(answer).write_text(json.dumps(message))


# --- in the calling process -------------------------------------------------------------------------------------------


def fresh(script: str, config: Config) -> list[Result]:
    """Return the results of ``benchmarks.<script>.measure(config)`` in a process of its own, with pinned threads.

    ``config["pages"]`` is "huge" (PyTorch requests transparent huge pages for every contender) or "ordinary".
    ``OMP_NUM_THREADS`` is respected if set. Raises WrongError if our result fails its check.
    """
    # A measurement that starts more processes is itself bound to one core.
    cpus = json.loads(os.environ.get("BENCHMARK_CPUS", "null")) or sorted(os.sched_getaffinity(0))
    threads = int(os.environ.get("OMP_NUM_THREADS", len(cpus)))
    root = Path(__file__).resolve().parent.parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": str(threads),
        "BENCHMARK_CPUS": json.dumps(cpus),
        "THP_MEM_ALLOC_ENABLE": "1" if config["pages"] == "huge" else "0",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of compiler processes beside the timed code
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
    }
    if threads == len(cpus):
        environment |= {"OMP_PROC_BIND": "true", "OMP_PLACES": "threads"}
    # Set the affinity first: torch's OpenMP runtime reads it once and binds the main thread to the first core.
    code = f"import os; os.sched_setaffinity(0, {cpus}); from benchmarks.harness import child; child()"
    command = [sys.executable, "-W", "ignore", "-c", code, f"benchmarks.{script}", json.dumps(config)]
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        try:
            options: Any = {"env": environment, "stdout": sys.stderr, "cwd": root, "timeout": TIMEOUT_SECONDS}
            status = subprocess.run([*command, str(answer)], check=False, **options).returncode
            text = answer.read_text()
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = explain(error) if isinstance(error, subprocess.TimeoutExpired) else f"its process ended: {status}"
            where: Config = {key: config[key] for key in ("dtype", "vocab", "rows", "hidden", "pages") if key in config}
            return [{"work": script, **where, "failed": reason}]
    message = json.loads(text)
    if "wrong" in message:
        raise WrongError(message["wrong"])
    return message["results"]


def run_all(script: str, configs: Iterable[Config]) -> list[Result]:
    """Return the results of all configurations, printing each as it arrives."""
    results = []
    for config in configs:
        for result in fresh(script, config):
            print(table(result), flush=True)
            results.append(result)
    return results


def main(script: str, about: str | None, configs: Configs) -> int:
    """Run one script from the command line, JSON last; return 1 if our result is wrong or a process failed."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{script}", description=(about or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few small configurations")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="only this dtype")
    parser.add_argument("--pages", choices=["huge", "ordinary"], help="only with these pages")
    parser.add_argument("--vocab", type=int, help="replaces the configurations' vocabulary size")
    parser.add_argument("--rows", type=int, help="replaces the configurations' number of tokens")
    parser.add_argument("--repetitions", type=int, help="timed runs of a fast contender (default: 7)")
    parser.add_argument(
        "--contenders", type=lambda text: text.split(","), help="comma-separated names; ours always takes part"
    )
    options = vars(parser.parse_args())
    chosen = select(configs, **options)
    print(describe(machine()), flush=True)
    try:
        results = run_all(script, chosen)
    except WrongError as error:
        print(f"{OURS} is wrong: {error}")
        return 1
    print(json.dumps(clean({"machine": machine(), "results": results})))
    return int(any("failed" in result for result in results))


def select(
    configs: Configs, *, quick: bool, dtype: str | None = None, pages: str | None = None, **given: Any
) -> list[Config]:
    """Return a script's configurations of this dtype and these pages, with the given values replaced."""
    chosen: dict[str, Config] = {}
    for config in configs(quick):
        if dtype in (None, config["dtype"]) and pages in (None, config["pages"]):
            changed = {**config, **{key: value for key, value in given.items() if value is not None}}
            chosen[json.dumps(changed)] = changed  # replaced values can make two of them equal
    return list(chosen.values())


def clean(value: Any) -> Any:
    """Return ``value`` with None for NaN and infinities, which JSON cannot represent."""
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- tables -----------------------------------------------------------------------------------------------------------


def describe(where: Mapping[str, Any]) -> str:
    return (
        f"{where['cpu']}, {where['threads']} threads, {where['instruction_set']}, torch {where['torch']}\n"
        "Times: median (smallest to largest) with cold caches. Extra: peak memory besides inputs and gradients.\n"
        "Errors against float64: logprob and entropy absolute (nats), gradients relative to their largest element."
    )


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def title(result: Result) -> str:
    parts = [result["work"], result.get("dtype", "")]
    parts += [f"{key} = {result[name]:,}" for key, name in SIZES if name in result]
    return ", ".join([*filter(None, parts), f"{result['pages']} pages"])


def table(result: Result) -> str:
    """Return the lines of one result: contenders, fastest first, then the limits, then what was left out."""
    lines = ["", title(result)]
    if "failed" in result:
        return "\n".join([*lines, f"  FAILED: {result['failed']}"])
    for group in ("contenders", "limits"):
        rows = result.get(group, {})
        ours = rows.get(OURS, result["contenders"].get(OURS, {})).get("median_ms")
        for name, row in sorted(rows.items(), key=lambda item: item[1].get("median_ms", math.inf)):
            lines.append(f"  {name:38} {_cells(row, ours)}")
    lines += [f"  {name:38} left out: {reason}" for name, reason in result.get("missing", {}).items()]
    return "\n".join(lines)


def _cells(row: Result, ours: float | None) -> str:
    cells = []
    if "median_ms" in row:
        cells.append(f"{row['median_ms']:9.2f} ms ({row['min_ms']:.2f} to {row['max_ms']:.2f})".ljust(40))
        cells.append(f"{row['median_ms'] / ours:6.2f} x ours" if ours else " " * 13)
    if "extra_bytes" in row:
        cells.append(f"{row['extra_bytes'] / 1e6:7.0f} MB extra")
    if "gigabytes_per_second" in row:
        cells.append(f"{row['gigabytes_per_second']:6.1f} GB/s")
    if "gigaflops" in row:
        cells.append(f"{row['gigaflops']:6.0f} GF/s")
    if row.get("errors"):
        cells.append("errors " + ", ".join(f"{name} {value:.0e}" for name, value in row["errors"].items()))
    if "values" in row:
        cells.append(", ".join(f"{name} {value:.6g}" for name, value in row["values"].items()))
    cells += [row["note"]] if row.get("note") else []
    cells += [f"FAILED: {row['failed']}"] if "failed" in row else []
    return "  ".join(cells).rstrip()
