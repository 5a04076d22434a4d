"""Log-probability and entropy from logits on the CPU: correctness, then time, against PyTorch, torch.compile and TRL.

    python benchmarks/token_stats.py [--rows-megabytes 40] [--repetitions 5]

Every contender computes both statistics of float32 or bfloat16 logits and, in "fwd+bwd", their joint gradient. First
each is held against float64; ours must be no worse than plain PyTorch, or nothing is timed. Times are medians with the
caches flushed between repetitions; GB/s counts one read of the logits forward, and a read and a write more backward.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

import edge_kernels
from edge_kernels import _extension

VOCABULARIES = {49_152: "SmolLM2", 151_936: "Qwen2.5"}
Statistics = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def ours(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    stats = edge_kernels.token_stats(logits, targets)
    return stats.logprobs, stats.entropy


def plain(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def trl(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    return selective_log_softmax(logits, targets), entropy_from_logits(logits)


def contenders() -> Iterator[tuple[str, Statistics]]:
    yield "edge_kernels", ours
    yield "PyTorch", plain
    yield "torch.compile", torch.compile(plain, dynamic=False)
    if importlib.util.find_spec("trl") is None:
        print("TRL left out: it is not installed")
    else:
        yield "TRL", trl


def make(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits as a language model's, a wide bulk and a few likely tokens; targets; and the two upstream gradients."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(rows, vocab, generator=generator) * 2.5
    targets = torch.randint(vocab, (rows,), generator=generator)
    logits[torch.arange(rows), targets] += 12
    return logits.to(dtype), targets, torch.randn(2, rows, generator=generator)


def gradient(function: Statistics, logits: Tensor, targets: Tensor, grads: Tensor) -> Tensor:
    leaf = logits.detach().requires_grad_()
    logprobs, entropy = function(leaf, targets)
    return torch.autograd.grad((logprobs, entropy), leaf, (grads[0].to(logprobs.dtype), grads[1].to(entropy.dtype)))[0]


def errors(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> dict[str, float]:
    """Largest absolute differences of log-probability, entropy and gradient."""
    names = ("logprob", "entropy", "gradient")
    return {name: float((a - b).abs().max()) for name, a, b in zip(names, got, wanted, strict=True)}


def compute(function: Statistics, logits: Tensor, targets: Tensor, grads: Tensor) -> list[Tensor]:
    """All three results of one contender."""
    with torch.no_grad():
        logprobs, entropy = function(logits, targets)
    return [logprobs, entropy, gradient(function, logits, targets, grads)]


class Timer:
    """Medians in milliseconds with cold caches, and the growth of the process while it ran."""

    def __init__(self, repetitions: int) -> None:
        self.repetitions = repetitions
        self.flush = torch.ones(64 << 20)  # 256 MB: more than most caches hold

    def __call__(self, run: Callable[[], object]) -> tuple[float, float, float]:
        """Return median, spread (largest less smallest) and peak megabytes beyond what was there before."""
        run()
        peak = peak_megabytes(run)
        times = []
        for _ in range(self.repetitions):
            self.flush.add_(1)
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times), max(times) - min(times), peak


def peak_megabytes(run: Callable[[], object]) -> float:
    """How much the resident set grew at its highest; NaN where /proc does not tell."""

    def read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = read("VmRSS")
        run()
        return max(0, read("VmHWM") - before) / 1024
    except OSError:
        return float("nan")


def bandwidth(timer: Timer) -> dict[str, float]:
    """What PyTorch's own loops reach on this machine, in GB/s: reading, and reading and writing in place."""
    data = torch.ones(32 << 20)
    gigabytes = data.numel() * 4 / 1e9
    read = timer(lambda: data.sum())[0] / 1e3
    update = timer(lambda: data.mul_(1.0))[0] / 1e3
    return {"read": gigabytes / read, "update": 2 * gigabytes / update}


def machine() -> dict[str, object]:
    extension = _extension.load()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return {
        "cpu": name,
        "threads": torch.get_num_threads(),
        "instruction_set": extension.instruction_set(),
        "torch": torch.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows-megabytes", type=float, default=40, help="size of the float32 logits")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    timer = Timer(options.repetitions)
    limits = bandwidth(timer)
    where = machine()
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    print(f"PyTorch's own loops: {limits['read']:.1f} GB/s reading, {limits['update']:.1f} GB/s in place")
    print("Time: median (spread). Memory: peak growth. Largest errors of logprob, entropy, gradient against float64.")

    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for vocab, model in VOCABULARIES.items():
            rows = max(1, round(options.rows_megabytes * 1e6 / 4 / vocab))
            logits, targets, grads = make(rows, vocab, dtype)
            size = logits.numel() * logits.element_size() / 1e9
            print(f"\n{str(dtype).removeprefix('torch.')}, V = {vocab:,} ({model}), N = {rows}: {size * 1e3:.0f} MB")
            torch.compiler.reset()
            functions = dict(contenders())
            wanted = compute(plain, logits.double(), targets, grads.double())
            accuracy = {name: errors(compute(f, logits, targets, grads), wanted) for name, f in functions.items()}
            del wanted
            for kind, error in accuracy["edge_kernels"].items():
                if not error <= 1.5 * accuracy["PyTorch"][kind] + 1e-6:
                    print(f"edge_kernels is wrong: {kind} off by {error}, PyTorch by {accuracy['PyTorch'][kind]}")
                    return 1
            for name, function in functions.items():
                with torch.no_grad():
                    forward = timer(lambda f=function, x=logits, y=targets: f(x, y))
                both = timer(lambda f=function, x=logits, y=targets, g=grads: gradient(f, x, y, g))
                error = " ".join(f"{value:.0e}" for value in accuracy[name].values())
                print(
                    f"  {name:14} fwd {forward[0]:7.1f} ms ({forward[1]:5.1f}) {size / forward[0] * 1e3:5.1f} GB/s"
                    f"   fwd+bwd {both[0]:7.1f} ms ({both[1]:5.1f}) {3 * size / both[0] * 1e3:5.1f} GB/s"
                    f"   +{both[2]:4.0f} MB   errors {error}"
                )
                results.append(
                    {
                        "name": name,
                        "dtype": str(dtype).removeprefix("torch."),
                        "vocab": vocab,
                        "rows": rows,
                        "forward_ms": forward[0],
                        "forward_backward_ms": both[0],
                        "peak_megabytes": both[2],
                        "errors": accuracy[name],
                    }
                )
    print(json.dumps({"machine": where, "bandwidth": limits, "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
