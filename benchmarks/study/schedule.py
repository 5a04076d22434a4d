"""Which runs are missing, and making them: one process a core, results kept at once, so that it continues at will."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

from benchmarks.study.design import HARD, SEEDS, SHOWN, Cell, cells
from benchmarks.study.results import Results, Run
from benchmarks.study.work import Record, make_run, silence

WORK = Path("runs/study")
_BREADTH = 4  # seeds of every cell that are made before the others


def full_runs(results: Results) -> Iterator[list[Run]]:
    """Yield, again and again, the runs that can be made now, the most important first; end when none is missing."""
    by_key = {cell.key: cell for cell in cells()}
    while True:
        found: list[Run] = []
        waiting = False
        for cell in by_key.values():
            rate = results.rate_of(cell, by_key)
            if rate is None:
                waiting = True
                found += [] if cell.rate_of else results.missing_tuning(cell)
            else:
                seeds = cell.setting.seeds
                done = {record["seed"] for record in results.of(cell, rate, seeds)}
                found += [(cell, rate, seed) for seed in seeds if seed not in done]
        if not found and not waiting:
            return
        found.sort(key=lambda run: run[2] in run[0].setting.seeds[_BREADTH:])  # a study cut short has some of each cell
        yield found


def quick_runs(results: Results, tuned: Results) -> Iterator[list[Run]]:
    """As ``full_runs``, for a few cells at the rates that the full study found, on its first seeds."""
    chosen = [cell for cell in cells() if cell.setting == HARD and cell.name in SHOWN]
    rates = {cell.key: _known_rate(tuned, cell) for cell in chosen}
    while True:
        found = [
            (cell, rates[cell.key], seed)
            for seed in SEEDS[:6]
            for cell in chosen
            if not results.of(cell, rates[cell.key], [seed])
        ]
        if not found:
            return
        yield found


def _known_rate(tuned: Results, cell: Cell) -> float:
    rate = tuned.best_rate(cell)
    if rate is None:
        raise SystemExit(f"{tuned.path} lacks runs that decide the learning rate of {cell.key!r}: make study")
    return rate


def make_all(batches: Iterator[list[Run]], results: Results, processes: int) -> None:
    """Make the runs, each in one of ``processes`` that stay; what is finished is kept at once."""
    os.environ["OMP_NUM_THREADS"] = "1"  # the tensors are small: a run a core is faster than cores a run
    started, running = time.monotonic(), dict[Future[Record], tuple[str, float, int]]()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=silence, initargs=(WORK,)) as pool:
        for wanted in batches:
            for cell, rate, seed in wanted:
                if len(running) == processes:
                    break
                if (cell.key, rate, seed) not in running.values():
                    running[pool.submit(make_run, cell, rate, seed, WORK)] = cell.key, rate, seed
            if not running:
                continue
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                record = future.result()
                results.add(record)
                minutes = (time.monotonic() - started) / 60
                line = f"{minutes:6.1f} min  {record['cell']}, rate {record['rate']:g}, seed {record['seed']}"
                print(f"{line}: {100 * record['accuracy'][-1]:.0f} % in {record['seconds']:.0f} s", flush=True)
