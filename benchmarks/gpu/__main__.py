"""On a GPU: our backends against float64 first, then the rates of memory and products, then our times and the peers'.

``--rehearse`` does the same with a few small rows on the CPU: only the clock, the shapes and the backends differ. A
time is a median over calls, each measured by two events after a write larger than the L2 cache; contenders take turns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from benchmarks.gpu.checks import check
from benchmarks.gpu.device import Device, backends
from benchmarks.gpu.inputs import ON_GPU, REHEARSAL
from benchmarks.gpu.times import rates, table, time_head, time_logits
from benchmarks.harness import OURS, Result, WrongError, clean

NO_GPU = 2  # exit code


def describe(where: Mapping[str, Any], rate: Mapping[str, float]) -> Iterator[str]:
    yield ", ".join(f"{key} {value}" for key, value in where.items() if key != "versions")
    yield ", ".join(f"{package} {number}" for package, number in where["versions"].items() if number)
    for name, value in rate.items():
        yield f"  {name:24} {value / 1e12:8.3f} {'Tflop/s' if name.endswith('product') else 'TB/s'}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU, with a few small rows")
    parser.add_argument("--check", action="store_true", help="correctness only")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        print(f"PyTorch {torch.__version__} sees no GPU: nothing was run; --rehearse runs it all on the CPU")
        return NO_GPU
    start = time.perf_counter()
    device, sizes = Device("cpu" if options.rehearse else "cuda"), REHEARSAL if options.rehearse else ON_GPU
    where = device.describe()
    names, absent = backends(device)
    print("\n".join(describe(where, {})), flush=True)
    for name, reason in absent.items():
        print(f"{name} is left out: {reason}")
    if not names:
        print("none of our backends is available: nothing was run")
        return 1
    try:
        errors = check(sizes, device, names)
    except WrongError as error:
        print(f"{OURS} is wrong: {error}")
        return 1
    print("\nLargest errors against float64: logprob and entropy in nats, gradients relative to their largest element")
    for name, found in errors.items():
        print(f"  {name:64} {', '.join(f'{kind} {value:.0e}' for kind, value in found.items())}")
    message: dict[str, Any] = {"rehearsal": options.rehearse, "machine": where, "errors": errors, "absent": absent}
    if not options.check:
        rate = rates(sizes, device)
        print("\n".join(["", *describe(where, rate)]), flush=True)
        results: list[Result] = []
        skipped = False
        for result in itertools.chain(time_logits(sizes, device, names, rate), time_head(sizes, device, names, rate)):
            results.append(result)
            if time.perf_counter() - start > sizes.seconds:
                skipped = True
                break
        print("\n".join(["", *table(results)]))
        if skipped:
            print(f"no new measurement was started after {sizes.seconds:.0f} s")
        message |= {"rates": rate, "results": results}
    message["seconds"] = time.perf_counter() - start
    print(json.dumps(clean(message)))
    rows = [row for result in message.get("results", ()) for row in result["contenders"].items()]
    return int(any(name.startswith(OURS) and "failed" in row for name, row in rows))


if __name__ == "__main__":
    sys.exit(main())
