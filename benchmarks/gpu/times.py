"""Times on a GPU: the rates of memory and products, then our backends and the peers in turns, and their table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import head, limits, logits, peers
from benchmarks.gpu import head_ways
from benchmarks.gpu.contenders import HEADS, LOGITS
from benchmarks.gpu.device import Device, with_backend
from benchmarks.gpu.inputs import Sizes, make_batch, make_head
from benchmarks.harness import OURS, Result, Run, explain, name_of, spread


def take_turns(runs: Mapping[str, Run], device: Device, repetitions: int) -> dict[str, Result]:
    """Return times in milliseconds and extra memory of each. The first round is not timed: it compiles and measures."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    extra: dict[str, float] = {}
    failed: dict[str, str] = {}
    for turn in range(repetitions + 2):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            if name in failed:
                continue
            try:
                runs[name].prepare()
                if turn < 2:  # once to compile and tune, once more for the memory
                    extra[name] = max(device.extra_bytes(runs[name].run) - runs[name].own_bytes, 0)
                    continue
                times[name].append(device.milliseconds(runs[name].run))
            except Exception as error:  # any failure of a peer is a result
                failed[name] = explain(error)
    answers: dict[str, Result] = {name: {"failed": reason} for name, reason in failed.items()}
    for name in (name for name in runs if name not in failed):
        answers[name] = {**spread(times[name]), "extra_bytes": extra[name]}
    return answers


def rates(sizes: Sizes, device: Device) -> dict[str, float]:
    """Return the memory's rates, in bytes/s read plus written, and the products', in flops/s."""
    buffer = torch.ones(sizes.rows * sizes.vocab, dtype=torch.bfloat16, device=device.kind)
    other = torch.empty_like(buffer)
    runs = {**limits.bandwidth(buffer), "copy": Run(partial(other.copy_, buffer))}
    moved = {"read": 1, "in-place read-write": 2, "copy": 2}
    measured = take_turns({name: runs[name] for name in moved}, device, sizes.repetitions)
    found = {name: count * buffer.nbytes / (measured[name]["min_ms"] / 1e3) for name, count in moved.items()}
    del runs, buffer, other
    for dtype in (torch.bfloat16, torch.float32):
        a, b, out = (torch.ones(sizes.square, sizes.square, dtype=dtype, device=device.kind) for _ in range(3))
        key = f"{name_of(dtype)} product"
        seconds = take_turns({key: Run(partial(torch.mm, a, b, out=out))}, device, sizes.repetitions)
        found[key] = 2 * sizes.square**3 / (seconds[key]["min_ms"] / 1e3)
    return found


def _contenders(makers: Mapping[str, Callable[[], Any]], ours: Any, names: Sequence[str]) -> tuple[Any, dict[str, str]]:
    """Return the available contenders, name -> (backend or None, function), and the reason for each missing one."""
    found, missing = peers.available(makers, None)
    every = {f"{OURS}, {name}": (name, ours) for name in names}
    return every | {name: (None, function) for name, function in found.items()}, missing


def time_logits(sizes: Sizes, device: Device, names: Sequence[str], rate: Mapping[str, float]) -> Iterator[Result]:
    for dtype in (torch.bfloat16, torch.float32):
        batch = make_batch(sizes.rows, sizes.vocab, device)
        with torch.device(device.kind):
            pristine = torch.randn(sizes.rows, sizes.vocab, dtype=dtype).mul_(2.5)
        buffer = pristine.clone()
        shaped = buffer.view(*batch.targets.shape, sizes.vocab)
        found, missing = _contenders(LOGITS, peers.LOGITS[OURS](), names)
        for work in (logits.LOSS, logits.DRIVEN, logits.FORWARD):
            runs: dict[str, Run] = {}
            for name, (chosen, (of_statistics, of_loss)) in found.items():
                call: Callable[[], object] = partial(
                    logits.with_gradient, of_loss, shaped, batch, work == logits.DRIVEN
                )
                own = 0 if name.startswith(OURS) else buffer.nbytes  # a gradient in a buffer of its own
                if work == logits.FORWARD:
                    call, own = partial(logits.without_gradient, of_statistics, shaped, batch), 0
                run = call if chosen is None else with_backend(chosen, call)
                runs[name] = Run(run, partial(buffer.copy_, pristine), own)
            floor = {
                logits.LOSS: 2 * buffer.nbytes / rate["in-place read-write"],
                logits.DRIVEN: buffer.nbytes / rate["read"] + 2 * buffer.nbytes / rate["in-place read-write"],
                logits.FORWARD: buffer.nbytes / rate["read"],
            }[work]
            rows_of = take_turns(runs, device, sizes.repetitions)
            where = {"dtype": name_of(dtype), "rows": sizes.rows, "vocab": sizes.vocab}
            yield {"work": work, **where, "floor_ms": floor * 1e3, "contenders": rows_of, "missing": missing}


def time_head(sizes: Sizes, device: Device, names: Sequence[str], rate: Mapping[str, float]) -> Iterator[Result]:
    batch = make_batch(sizes.head_rows, sizes.vocab, device)
    dtype = torch.bfloat16
    states, weight = make_head(sizes.head_rows, sizes.vocab, sizes.hidden, dtype, batch, device)
    others, missing = peers.available(HEADS, None)
    problem = head_ways.problem_of(sizes.head_rows, sizes.vocab, sizes.hidden, dtype, device.kind)
    ours = head_ways.ways(names, problem)
    calls = head_ways.calls(names, problem, lambda loss: head.with_gradient(loss, states, weight, batch))
    calls |= {name: partial(head.with_gradient, loss, states, weight, batch) for name, loss in others.items()}
    prepare, own = partial(head.set_gradients, states, weight), states.nbytes + weight.nbytes
    runs = {name: Run(call, prepare, own) for name, call in calls.items()}
    rows_of = take_turns(runs, device, sizes.repetitions)
    floor = 6 * sizes.head_rows * sizes.vocab * sizes.hidden / rate["bfloat16 product"]
    where = {"dtype": name_of(dtype), "rows": sizes.head_rows, "vocab": sizes.vocab, "hidden": sizes.hidden}
    result = {"work": head.WORK, **where, "floor_ms": floor * 1e3, "contenders": rows_of, "missing": missing}
    yield result | {"head_plan": head_ways.constants(result, problem, ours, rate)}


def table(results: Sequence[Result]) -> Iterator[str]:
    yield f"{'':40} {'median ms':>10} {'smallest':>9} {'largest':>9} {'of the limit':>12} {'extra MB':>9}"
    for result in results:
        sizes = ", ".join(
            f"{key} = {result[name]:,}"
            for key, name in (("N", "rows"), ("V", "vocab"), ("D", "hidden"))
            if name in result
        )
        yield f"{result['work']}, {result['dtype']}, {sizes}; at the limit {result['floor_ms']:.3f} ms"
        for name, row in sorted(result["contenders"].items(), key=lambda item: item[1].get("median_ms", math.inf)):
            if "failed" in row:
                yield f"  {name:38} FAILED: {row['failed']}"
                continue
            extra = "" if math.isnan(row["extra_bytes"]) else f"{row['extra_bytes'] / 1e6:9,.0f}"
            times = f"{row['median_ms']:10.3f} {row['min_ms']:9.3f} {row['max_ms']:9.3f}"
            yield f"  {name:38} {times} {result['floor_ms'] / row['median_ms']:12.0%} {extra:>9}"
        for name, reason in result["missing"].items():
            yield f"  {name:38} left out: {reason}"
        if "head_plan" in result:
            yield from head_ways.describe(result)
