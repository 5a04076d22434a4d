"""Loss and gradient from logits, and the statistics alone: correctness first, then time, against peers and memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import limits, peers
from benchmarks.harness import COMPILED, OURS, Config, Result, Run, main, take_turns

LOSS, DRIVEN, FORWARD = "loss from logits", "EDA loss from logits", "token_stats"
FLOORS = {LOSS: "in-place read-write", DRIVEN: "read, then in-place read-write", FORWARD: "read"}
Call = Callable[[], tuple[Tensor, ...]]  # -> logprobs, entropy and, of a loss, the gradient
NUM_EXACT_ROWS = 64  # rows whose gradient is compared; logprobs and entropy are compared in all


def configs(quick: bool) -> Sequence[Config]:
    base: Config = {"works": list(FLOORS), "repetitions": 7, "contenders": None, "pages": "huge"}
    if quick:
        few = {"repetitions": 5, "works": [LOSS, FORWARD], "contenders": [peers.PLAIN, COMPILED, peers.TRL]}
        return [{**base, **few, "vocab": 49_152, "rows": 64, "dtype": dtype} for dtype in ("float32", "bfloat16")]
    dtypes = [{**base, "rows": 512, "dtype": dtype} for dtype in ("float32", "bfloat16")]
    large = [{**config, "vocab": 151_936} for config in dtypes]
    few = {"pages": "ordinary", "contenders": [COMPILED, peers.TRL], "works": [LOSS, DRIVEN]}
    return [*large, *({**c, "vocab": 49_152} for c in dtypes), *({**c, **few} for c in large), *sweep(base)]


def sweep(base: Config) -> list[Config]:
    """Return what the plot of time over N and V needs in addition to the tables."""
    few = {**base, "dtype": "float32", "works": [LOSS], "contenders": [COMPILED, peers.TRL], "repetitions": 5}
    sizes = [(32, 151_936), (128, 151_936), (512, 12_288), (512, 262_144)]
    return [{**few, "rows": rows, "vocab": vocab} for rows, vocab in sizes]


def make_logits(rows: int, vocab: int, dtype: torch.dtype, targets: Tensor) -> Tensor:
    """Return logits (rows, V) like a language model's: a broad bulk and a few likely tokens, among them the targets."""
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)).mul_(2.5)
    logits[torch.arange(rows), targets.flatten()] += 12
    return logits.to(dtype)


class Exact(NamedTuple):
    """The float64 result."""

    logprobs: Tensor  # (N,), as entropy
    entropy: Tensor
    sample: Tensor  # the rows whose gradient is compared
    p: Tensor  # their probabilities

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor) -> Exact:
        parts = [peers.exact_statistics(*part)[:2] for part in zip(logits.split(64), targets.split(64), strict=True)]
        sample = torch.linspace(0, len(targets) - 1, min(NUM_EXACT_ROWS, len(targets))).long()
        p = peers.exact_statistics(logits[sample], targets[sample])[2]
        logprobs, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
        return cls(logprobs, entropy, sample, p)


def measure(config: Config) -> list[Result]:
    """Return the results of each work of a configuration, checked and timed on the same logits."""
    rows, vocab, dtype = config["rows"], config["vocab"], getattr(torch, config["dtype"])
    batch = peers.make_batch(*peers.split(rows), vocab)
    pristine = make_logits(rows, vocab, dtype, batch.targets)
    buffer = pristine.clone()
    found, missing = peers.available(peers.LOGITS, config["contenders"])
    logits = buffer.view(*batch.targets.shape, vocab)
    exact = Exact.of(pristine, batch.targets.flatten())
    results = []
    for work in config["works"]:
        calls: dict[str, Call] = {}
        for name, (statistics, loss) in found.items():
            if work == FORWARD and name != peers.NEW_BUFFER:
                calls[name] = partial(without_gradient, statistics, logits, batch)
            elif work != FORWARD and (work == DRIVEN or name != peers.PUBLISHED):
                calls[name] = partial(with_gradient, loss, logits, batch, work == DRIVEN)
        refill = partial(buffer.copy_, pristine)
        errors, failed, _ = check(calls, refill, exact, batch, work)
        peers.require_exact(errors, work)
        own = 0 if work == FORWARD else buffer.nbytes
        runs = {
            name: Run(call, refill, 0 if name == OURS else own)
            for name, call in calls.items()
            if name not in failed and peers.is_timed(name, config["contenders"])
        }
        floor = {name: run._replace(prepare=refill) for name, run in limits.bandwidth(buffer).items()}
        rows_of = take_turns({**runs, **floor, **limits.first_touch(buffer.nbytes)}, config["repetitions"])
        floors = {name: rows_of.pop(name) for name in (*floor, "first touch")}
        for name, row in rows_of.items():
            row |= {"errors": errors[name]} | ({"note": peers.NOTES[name]} if name in peers.NOTES else {})
        rows_of |= {name: {"failed": reason} for name, reason in failed.items()}
        where = {key: config[key] for key in ("dtype", "vocab", "rows", "pages")}
        measured = {"contenders": rows_of, "limits": limits.rates(floors, buffer.nbytes)}
        results.append({"work": work, **where, "floor": FLOORS[work], **measured, "missing": missing})
    return results


def without_gradient(statistics: peers.Statistics, logits: Tensor, batch: peers.Batch) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return statistics(logits, batch.targets)


def with_gradient(loss: peers.LogitsLoss, logits: Tensor, batch: peers.Batch, driven: bool) -> tuple[Tensor, ...]:
    leaf = logits.detach().requires_grad_()
    out = loss(leaf, batch, driven)
    assert out.logprobs is not None
    assert out.entropy is not None
    return out.logprobs, out.entropy, torch.autograd.grad(out.loss, leaf)[0]


def check(
    calls: Mapping[str, Call],
    refill: Callable[[], object],
    exact: Exact,
    batch: peers.Batch,
    work: str,
) -> peers.Checked:
    """Return each contender's errors against float64. It is also the warm-up."""
    logprobs, entropy, sample, p = exact
    coefficients = peers.exact_coefficients(entropy, batch, work == DRIVEN)
    gradient = peers.exact_gradient(p, batch.targets.flatten()[sample], coefficients[sample])
    errors, failed, lowest_entropy = checked = peers.Checked({}, {}, {})
    for name, call in calls.items():
        refill()
        got = peers.attempt(name, call, failed)
        if got is None:
            continue
        lowest_entropy[name] = got[1].min().item()
        errors[name] = {"logprob": peers.error(got[0], logprobs), "entropy": peers.error(got[1], entropy)}
        if work != FORWARD and name != peers.PUBLISHED:  # its loss differs
            rows = got[2].flatten(0, 1)[sample]
            errors[name]["gradient"] = peers.error(rows, gradient, relative=True)
    return checked


if __name__ == "__main__":
    sys.exit(main("logits", __doc__, configs))
