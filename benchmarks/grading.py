"""Answers graded per second: by math-verify alone, in this process and without limits, and by ``Grader``'s workers.

``python -m benchmarks.grading DATA ...``, for example evaluation_suite@math. Every accepted answer is compared with
itself "+ 0", so that the texts differ and math-verify has to decide. All outcomes must agree. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence

from benchmarks.harness import describe, machine
from edge_grpo.data.sources import load_examples
from edge_grpo.grading import equivalence, symbolic
from edge_grpo.grading.answers import Grader
from edge_grpo.grading.normalize import normalize
from edge_grpo.types import Outcome


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grading", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", metavar="DATA", nargs="+", help="data, as for edge-grpo eval --data")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of processes to try")
    options = parser.parse_args()
    where = machine()
    print(describe(where).splitlines()[0])
    results = [measure(spec, options.workers) for spec in options.data]
    print(json.dumps({"machine": where, "results": results}))
    return 0


Pairs = Sequence[tuple[Sequence[str], str | None]]


def measure(spec: str, worker_counts: Sequence[int]) -> dict[str, object]:
    answers = [example.answer for example in load_examples(spec, {}) if example.answer is not None]
    pairs: Pairs = [([answer], f"{answer} + 0") for answer in answers]
    equivalence.load()
    symbolic.parsed.cache_clear()
    alone, alone_rate = timed(compare_here, pairs)
    rates = {"math-verify alone": alone_rate}
    for count in worker_counts:
        grader = Grader(workers=count, timeout=60.0)
        grader([(["1/7"], f"{n}/7 + 1") for n in range(count)])  # starts the processes
        outcomes, rates[f"{count} workers"] = timed(grader, pairs)
        same, rates[f"{count} workers, identical texts"] = timed(grader, [([answer], answer) for answer in answers])
        grader.close()
        if outcomes != alone or set(same) != {"correct"}:
            raise SystemExit(f"{spec}: {count} workers disagree with math-verify alone")
    print(f"\n{spec}: {len(pairs)} answers")
    print("\n".join(f"  {name:28} {rate:10,.0f} a second" for name, rate in rates.items()))
    return {"data": spec, "answers": len(pairs), "per_second": rates}


def compare_here(pairs: Pairs) -> list[Outcome]:
    compare = equivalence.Comparison().outcome
    return [compare(normalize(gold), normalize(answer or "")) for [gold], answer in pairs]


def timed(judge: Callable[[Pairs], list[Outcome]], pairs: Pairs) -> tuple[list[Outcome], float]:
    started = time.perf_counter()
    outcomes = judge(pairs)
    return outcomes, len(pairs) / (time.perf_counter() - started)


if __name__ == "__main__":
    raise SystemExit(main())
