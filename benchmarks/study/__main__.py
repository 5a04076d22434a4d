"""Make the runs of the study that are missing, one process a core, and draw the tables and plots of docs/study.md.

python -m benchmarks.study           all runs (hours on two cores; interrupt it and continue at will)
python -m benchmarks.study --quick   five cells at their tuned rates, into a file of its own (minutes), and a table
python -m benchmarks.study --draw    no runs: only the tables and plots
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.harness import machine
from benchmarks.study.results import FILE, Results
from benchmarks.study.schedule import WORK, full_runs, make_all, quick_runs
from edge_grpo.run.folder import claim


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few cells at their tuned rates, and a table of them")
    parser.add_argument("--draw", action="store_true", help="draw from the runs that are there, and make none")
    parser.add_argument("--results", type=Path, help=f"the file of the runs (default: {FILE.name} beside this module)")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="default: one a core")
    options = parser.parse_args()
    from benchmarks.study import draw

    file = options.results or (WORK / "quick.json" if options.quick else FILE)
    if not options.draw:
        with claim(WORK, overwrite=True):  # two at once would lose each other's records
            results = Results(file)
            results.machine = machine()
            runs = quick_runs(results, Results()) if options.quick else full_runs(results)
            make_all(runs, results, options.processes)
    lines = draw.quick_table(Results(file), Results()) if options.quick else draw.draw(Results(file))
    print(*lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
