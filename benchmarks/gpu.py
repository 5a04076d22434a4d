"""On a GPU: our backends against float64 first, then the rates of memory and products, then our times and the peers'.

``--rehearse`` does the same with a few small rows on the CPU: only the clock, the shapes and the backends differ. A
time is the median between two events around one call, after a write larger than the L2 cache; contenders take turns.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import accuracy, gpu_peers, head, limits, logits, peers
from benchmarks.harness import OURS, Result, Run, WrongError, clean, explain
from benchmarks.peers import PLAIN, Answer, Batch
from edge_kernels import backend as edge_backend
from edge_kernels import info, linear_token_stats, token_entropy, token_stats, use_backend

NO_GPU = 2  # exit code
PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "verl")


class Sizes(NamedTuple):
    """What is run: on a GPU, and as a rehearsal."""

    checked: Sequence[tuple[int, int]]  # rows and V from logits: few rows, V = 1, an odd V, more rows than a GPU's SMs
    checked_head: Sequence[tuple[int, int, int]]  # rows, V and D
    dtypes: Sequence[torch.dtype]
    rows: int
    vocab: int
    hidden: int
    head_rows: int
    square: int  # of the product that gives the rate
    repetitions: int
    seconds: float  # after which nothing new is started


ON_GPU = Sizes(
    checked=[(4, 151_936), (64, 1), (320, 50_257), (1024, 4_099)],
    checked_head=[(64, 151_936, 1536), (320, 5_003, 896)],
    dtypes=[torch.float32, torch.bfloat16, torch.float16],
    rows=4096,
    vocab=151_936,
    hidden=1536,
    head_rows=4096,
    square=8192,
    repetitions=10,
    seconds=270,
)
REHEARSAL = Sizes(
    checked=[(8, 301), (4, 1)],
    checked_head=[(8, 301, 16)],
    dtypes=[torch.float32, torch.bfloat16],
    rows=16,
    vocab=1_003,
    hidden=32,
    head_rows=16,
    square=64,
    repetitions=2,
    seconds=270,
)


# --- the device -------------------------------------------------------------------------------------------------------


class Device:
    """The clock and the memory of where everything runs. ``kind`` is "cuda" (ROCm too), or "cpu" for the rehearsal."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._flush = torch.empty(1, device=kind)
        if kind == "cuda":
            cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
            self._flush = torch.empty(2 * cache_bytes // 4, device=kind)

    def milliseconds(self, call: Callable[[], object]) -> float:
        if self.kind == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            self._flush.zero_()
            torch.cuda._sleep(5_000_000)  # some 3 ms, in which the host puts the whole call on the stream
            start.record()
            result = call()
            end.record()
            torch.cuda.synchronize()
            del result
            return start.elapsed_time(end)
        self._flush.zero_()
        began = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - began
        del result
        return elapsed * 1e3

    def extra_bytes(self, call: Callable[[], object]) -> float:
        """Return how much memory was in use at most during the call, beyond what was before; NaN on a CPU."""
        if self.kind != "cuda":
            call()
            return math.nan
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before

    def describe(self) -> dict[str, Any]:
        about = info.collect()
        where: dict[str, Any] = {"device": about["cpu"]["name"], "driver": None}
        if self.kind == "cuda":
            properties = torch.cuda.get_device_properties(0)
            where = {
                "device": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_bytes": properties.total_memory,
                "driver": about["cuda"]["driver"],
                "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
            }
        versions = {package: _version(package) for package in PACKAGES}
        return {**where, "versions": versions, OURS: about["edge_kernels"]}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def backends(device: Device) -> tuple[list[str], dict[str, str]]:
    """Return our backends that can be had there, and why others cannot."""
    names = ("cuda", "triton") if device.kind == "cuda" else ("cpu",)
    reasons = {name: edge_backend.unavailable(name) for name in names}
    missing = {f"{OURS}, {name}": reason for name, reason in reasons.items() if reason is not None}
    return [name for name, reason in reasons.items() if reason is None], missing


def _with(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """The call with one of our backends; the backward pass has to be inside."""

    def run(*arguments: Any) -> Any:
        with use_backend(name):
            return call(*arguments)

    return run


# --- correctness ------------------------------------------------------------------------------------------------------


def make_batch(rows: int, vocab: int, device: Device) -> Batch:
    return Batch(*(value.to(device.kind) for value in peers.make_batch(*peers.split(rows), vocab)))


def check(sizes: Sizes, device: Device, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the largest errors of each backend and dtype; raises WrongError where plain PyTorch's are smaller."""
    largest: dict[str, dict[str, float]] = {}
    checks = (_check_logits, _check_head, _check_statistics, _check_linear_statistics)
    for dtype, name, work, errors in itertools.chain.from_iterable(c(sizes, device, names) for c in checks):
        kept = largest.setdefault(f"{name}, {dtype}, {work}", {})
        for kind, error in errors.items():
            kept[kind] = max(kept.get(kind, 0.0), error)
    return largest


Errors = Iterator[tuple[str, str, str, dict[str, float]]]  # dtype, contender, work, errors by kind


def _judged(dtype: str, checked: peers.Checked, work: str, where: str) -> Errors:
    for name, reason in checked.failed.items():
        raise WrongError(f"{where}: {name} failed: {reason}")
    plain = checked.errors[PLAIN]
    if work not in (logits.LOSS, logits.FORWARD, head.WORK):
        # A quotient of entropies, a soft cap, sums of three gradients: below this who errs less is chance.
        plain = {kind: max(error, 2e-5) for kind, error in plain.items()}
    peers.require_exact({**checked.errors, PLAIN: plain}, where)
    for name, found in checked.errors.items():
        lowest = checked.lowest_entropy.get(name, 0.0)
        if name.startswith(OURS) and not lowest >= 0:
            raise WrongError(f"{where}: an entropy of {lowest:.3g} by {name}")
        yield dtype, name, work, found


def _check_logits(sizes: Sizes, device: Device, names: Sequence[str]) -> Errors:
    for dtype, (rows, vocab), kind in itertools.product(sizes.dtypes, sizes.checked, accuracy.ROWS):
        if vocab == 1 and kind != "ordinary":
            continue
        batch = make_batch(rows, vocab, device)
        config = {"rows": rows, "vocab": vocab, "dtype": _name(dtype)}
        pristine = accuracy.make_rows(kind, config, batch.targets.cpu()).to(device.kind)
        buffer = pristine.clone()
        shaped = buffer.view(*batch.targets.shape, vocab)
        refill = partial(buffer.copy_, pristine)
        for work in (logits.LOSS, logits.DRIVEN, logits.FORWARD):
            if vocab == 1 and work == logits.DRIVEN:
                continue  # an entropy of 0 relative to a mean of 0
            calls: dict[str, logits.Call] = {}
            for name, chosen in [(PLAIN, None), *((f"{OURS}, {name}", name) for name in names)]:
                of_statistics, of_loss = peers.LOGITS[PLAIN if chosen is None else OURS]()
                call: logits.Call = partial(logits.with_gradient, of_loss, shaped, batch, work == logits.DRIVEN)
                if work == logits.FORWARD:
                    call = partial(logits._forward, of_statistics, shaped, batch)
                calls[name] = call if chosen is None else _with(chosen, call)
            with torch.device(device.kind):
                exact = logits.Exact.of(pristine, batch.targets.flatten())
                checked = logits.check(calls, refill, exact, batch, work)
            where = f"{work}, {_name(dtype)}, {rows} x {vocab}, {kind} rows"
            yield from _judged(_name(dtype), checked, work, where)


def _check_head(sizes: Sizes, device: Device, names: Sequence[str]) -> Errors:
    for dtype, (rows, vocab, hidden) in itertools.product(sizes.dtypes, sizes.checked_head):
        batch = make_batch(rows, vocab, device)
        states, weight = make_head(rows, vocab, hidden, dtype, batch, device)
        calls: dict[str, Callable[[], Answer]] = {
            PLAIN: partial(head.with_gradient, peers.plain_head, states, weight, batch)
        }
        for name in names:
            call = partial(head.with_gradient, peers.HEADS[OURS](), states, weight, batch)
            calls[f"{OURS}, {name}"] = _with(name, call)
        with torch.device(device.kind):
            checked = head.check(calls, states, weight, batch)
        yield from _judged(_name(dtype), checked, head.WORK, f"{head.WORK}, {_name(dtype)}, {rows} x {vocab}")


Op = Callable[..., tuple[Tensor, ...]]  # of leaves, to outputs with a gradient


def _check_statistics(sizes: Sizes, device: Device, names: Sequence[str]) -> Errors:
    """The statistics with gradients of all of them, and with rows that are ignored or broken."""
    for dtype, (rows, vocab), kind in itertools.product(sizes.dtypes, sizes.checked, accuracy.ROWS):
        if vocab == 1 and kind != "ordinary":
            continue
        targets = peers.make_batch(1, rows, vocab).targets[0]
        config = {"rows": rows, "vocab": vocab, "dtype": _name(dtype)}
        values = accuracy.make_rows(kind, config, targets).to(device.kind)
        targets = targets.to(device.kind)
        targets[1::3] = -100
        ops: dict[str, Op] = {
            "token_stats with gradients": lambda x, y=targets: tuple(token_stats(x, y, temperature=0.7)),
            "token_stats with a soft cap": lambda x, y=targets: tuple(token_stats(x, y, softcap=30.0)),
            "token_entropy": lambda x: (token_entropy(x),),
        }
        for work, op in ops.items():
            where = f"{work}, {_name(dtype)}, {rows} x {vocab}, {kind} rows"
            yield from _judged(_name(dtype), _against_reference(op, (values,), names), work, where)
        if kind == "ordinary" and rows >= 4:
            _check_broken(values, names, f"{_name(dtype)}, {rows} x {vocab}")


def _check_linear_statistics(sizes: Sizes, device: Device, names: Sequence[str]) -> Errors:
    for dtype, (rows, vocab, hidden) in itertools.product(sizes.dtypes, sizes.checked_head):
        batch = make_batch(rows, vocab, device)
        states, weight = make_head(rows, vocab, hidden, dtype, batch, device)
        bias = torch.linspace(-1, 1, vocab, dtype=dtype, device=device.kind)
        leaves = states.detach().flatten(0, 1), weight.detach(), bias
        targets = batch.targets.flatten()
        op: Op = partial(_linear_statistics, targets)
        where = f"linear_token_stats, {_name(dtype)}, {rows} x {vocab}"
        yield from _judged(_name(dtype), _against_reference(op, leaves, names), "linear_token_stats", where)


def _linear_statistics(targets: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return tuple(linear_token_stats(hidden, weight, targets, bias))


def _against_reference(op: Op, leaves: tuple[Tensor, ...], names: Sequence[str]) -> peers.Checked:
    """Return the errors of our backends and, as plain PyTorch's, of the reference in the leaves' dtype."""

    def outputs_and_gradients(values: tuple[Tensor, ...]) -> dict[str, Tensor]:
        inputs = [value.detach().requires_grad_() for value in values]
        outputs = op(*inputs)
        # Weights between 0.5 and 1.5, no two outputs with the same: a gradient that is mixed up shows.
        total = torch.zeros((), dtype=torch.float64, device=inputs[0].device)
        for i, out in enumerate(outputs):
            weight = torch.arange(out.numel(), device=out.device) * (i + 1) % 7 / 7 + 0.5
            total = total + (out.double().flatten() * weight).sum()
        gradients = torch.autograd.grad(total, inputs)
        named = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
        return named | {f"gradient {i}": gradient for i, gradient in enumerate(gradients)}

    with use_backend("reference"):
        exact = outputs_and_gradients(tuple(leaf.double() for leaf in leaves))
    errors, failed, _ = checked = peers.Checked({}, {}, {})
    for name, backend in [(PLAIN, "reference"), *((f"{OURS}, {name}", name) for name in names)]:
        with use_backend(backend):
            got = peers.attempt(name, lambda: outputs_and_gradients(leaves), failed)
        if got is not None:
            errors[name] = {}
            for kind, value in exact.items():
                # A row that is all but one-hot has no gradient to be relative to.
                scale = value.abs().max().clamp(min=1e-6).item() if kind.startswith("gradient") else 1.0
                errors[name][kind] = peers.error(got[kind].double() / scale, value / scale)
    return checked


def _check_broken(values: Tensor, names: Sequence[str], where: str) -> None:
    """Raise WrongError unless a NaN, a +inf and a row of -inf make their rows NaN, and no others."""
    broken = values.clone()
    broken[0, 0], broken[2, -1], broken[3] = math.nan, math.inf, -math.inf
    expected = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    expected[[0, 2, 3]] = True
    for name in names:
        with use_backend(name):
            found = token_entropy(broken).isnan()
        if not torch.equal(found, expected):
            raise WrongError(
                f"token_entropy, {where}: NaN in rows {found.nonzero().flatten().tolist()[:8]}, not 0, 2, 3"
            )


def make_head(
    rows: int, vocab: int, hidden: int, dtype: torch.dtype, batch: Batch, device: Device
) -> tuple[Tensor, Tensor]:
    states, weight = head.make_head(rows, vocab, hidden, dtype, batch.targets.cpu())
    return states.detach().to(device.kind).requires_grad_(), weight.detach().to(device.kind).requires_grad_()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- contenders that a CPU does not have ------------------------------------------------------------------------------


def _trl_fused() -> tuple[peers.Statistics, peers.LogitsLoss]:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    def of_statistics(values: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return selective_log_softmax_and_entropy(values, targets, entropy_requires_grad=False)

    def of_loss(values: Tensor, batch: Batch, driven: bool) -> Answer:
        return peers.answer(*of_statistics(values, batch.targets), batch, driven)

    return of_statistics, of_loss


def _cut_fused() -> peers.HeadLoss:
    from cut_cross_entropy import linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, batch: Batch) -> Answer:
        nll = linear_cross_entropy(hidden, weight, batch.targets, reduction="none", impl="cce")
        return peers.answer(-nll, None, batch)

    return loss


def _verl_fused() -> peers.HeadLoss:
    major, minor = torch.cuda.get_device_capability()
    kernels = gpu_peers.verl_kernels(10 * major + minor)
    options = kernels.get_entropy_reduction_enum_number("none"), 1.0, None  # reduction, temperature, process group

    class Function(torch.autograd.Function):  # as verl's own, whose module needs ray
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            logprobs, entropy, *kept = kernels.efficient_entropy_forward(hidden, weight, labels, *options)
            ctx.save_for_backward(hidden, weight, labels, *kept)
            return logprobs, entropy

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            reduction, temperature, group = options
            given = (*gradients, *ctx.saved_tensors, reduction, False, temperature, group)
            return (*kernels.efficient_entropy_backward(*given), None)

    def loss(hidden: Tensor, weight: Tensor, batch: Batch) -> Answer:
        logprobs, entropy = Function.apply(hidden.flatten(0, 1), weight, batch.targets.flatten())
        return peers.answer(logprobs.view_as(batch.targets), entropy.view_as(batch.targets), batch)

    return loss


CUT_FUSED, VERL_FUSED = "cut-cross-entropy (Triton)", "verl kernels (Triton)"
LOGITS = {name: peers.LOGITS[name] for name in (PLAIN, peers.COMPILED)} | {peers.TRL: _trl_fused}
HEADS = {name: peers.HEADS[name] for name in (PLAIN, peers.COMPILED, peers.TRL_HEAD, peers.LIGER)} | {
    CUT_FUSED: _cut_fused,
    VERL_FUSED: _verl_fused,
}


# --- times ------------------------------------------------------------------------------------------------------------


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
            except Exception as error:  # a peer's failure is a result, whatever it is
                failed[name] = explain(error)
    answers: dict[str, Result] = {name: {"failed": reason} for name, reason in failed.items()}
    for name in (name for name in runs if name not in failed):
        values = times[name]
        answers[name] = {
            "median_ms": statistics.median(values),
            "min_ms": min(values),
            "max_ms": max(values),
            "extra_bytes": extra[name],
        }
    return answers


def rates(sizes: Sizes, device: Device) -> dict[str, float]:
    """Return what the memory moves, in bytes/s read plus written, and the products' flops/s."""
    buffer = torch.ones(sizes.rows * sizes.vocab, dtype=torch.bfloat16, device=device.kind)
    other = torch.empty_like(buffer)
    runs = {**limits.bandwidth(buffer), "copy": Run(partial(other.copy_, buffer))}
    moved = {"read": 1, "in-place read-write": 2, "copy": 2}
    measured = take_turns({name: runs[name] for name in moved}, device, sizes.repetitions)
    found = {name: count * buffer.nbytes / (measured[name]["min_ms"] / 1e3) for name, count in moved.items()}
    del runs, buffer, other
    for dtype in (torch.bfloat16, torch.float32):
        a, b, out = (torch.ones(sizes.square, sizes.square, dtype=dtype, device=device.kind) for _ in range(3))
        key = f"{_name(dtype)} product"
        seconds = take_turns({key: Run(partial(torch.mm, a, b, out=out))}, device, sizes.repetitions)
        found[key] = 2 * sizes.square**3 / (seconds[key]["min_ms"] / 1e3)
    return found


def _contenders(makers: Mapping[str, Callable[[], Any]], ours: Any, names: Sequence[str]) -> tuple[Any, dict[str, str]]:
    """Return what can be had: (backend or None, function) by name; and why others cannot."""
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
                    call, own = partial(logits._forward, of_statistics, shaped, batch), 0
                run = call if chosen is None else _with(chosen, call)
                runs[name] = Run(run, partial(buffer.copy_, pristine), own)
            floor = {
                logits.LOSS: 2 * buffer.nbytes / rate["in-place read-write"],
                logits.DRIVEN: buffer.nbytes / rate["read"] + 2 * buffer.nbytes / rate["in-place read-write"],
                logits.FORWARD: buffer.nbytes / rate["read"],
            }[work]
            rows_of = take_turns(runs, device, sizes.repetitions)
            where = {"dtype": _name(dtype), "rows": sizes.rows, "vocab": sizes.vocab}
            yield {"work": work, **where, "floor_ms": floor * 1e3, "contenders": rows_of, "missing": missing}


def time_head(sizes: Sizes, device: Device, names: Sequence[str], rate: Mapping[str, float]) -> Iterator[Result]:
    batch = make_batch(sizes.head_rows, sizes.vocab, device)
    dtype = torch.bfloat16
    states, weight = make_head(sizes.head_rows, sizes.vocab, sizes.hidden, dtype, batch, device)
    found, missing = _contenders(HEADS, peers.HEADS[OURS](), names)
    runs = {}
    for name, (chosen, loss) in found.items():
        call = partial(head.with_gradient, loss, states, weight, batch)
        run = call if chosen is None else _with(chosen, call)
        runs[name] = Run(run, partial(head.set_gradients, states, weight), states.nbytes + weight.nbytes)
    rows_of = take_turns(runs, device, sizes.repetitions)
    floor = 6 * sizes.head_rows * sizes.vocab * sizes.hidden / rate["bfloat16 product"]
    where = {"dtype": _name(dtype), "rows": sizes.head_rows, "vocab": sizes.vocab, "hidden": sizes.hidden}
    yield {"work": head.WORK, **where, "floor_ms": floor * 1e3, "contenders": rows_of, "missing": missing}


# --- what is printed --------------------------------------------------------------------------------------------------


def describe(where: Mapping[str, Any], rate: Mapping[str, float]) -> Iterator[str]:
    yield ", ".join(f"{key} {value}" for key, value in where.items() if key != "versions")
    yield ", ".join(f"{package} {number}" for package, number in where["versions"].items() if number)
    for name, value in rate.items():
        yield f"  {name:24} {value / 1e12:8.3f} {'Tflop/s' if name.endswith('product') else 'TB/s'}"


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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="the same on the CPU, with a few small rows")
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
        print("none of our backends can be had: nothing was run")
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
            print(f"after {sizes.seconds:.0f} s nothing more was started")
        message |= {"rates": rate, "results": results}
    message["seconds"] = time.perf_counter() - start
    print(json.dumps(clean(message)))
    rows = [row for result in message.get("results", ()) for row in result["contenders"].items()]
    return int(any(name.startswith(OURS) and "failed" in row for name, row in rows))


if __name__ == "__main__":
    sys.exit(main())
