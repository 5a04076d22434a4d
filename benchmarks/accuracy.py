"""Errors against float64 of every contender, on ordinary rows and on those that break formulas; nothing is timed.

Forbidden: every other token at -inf. Offset: all logits 30,000 higher. Sharp: the target up to 42 above the rest.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import head, logits, peers
from benchmarks.harness import COMPILED, OURS, Config, Result, WrongError, main

ROWS = ("ordinary", "forbidden", "offset", "sharp")


def configs(quick: bool) -> Sequence[Config]:
    base: Config = {"pages": "huge", "vocab": 49_152, "rows": 16, "contenders": None}
    if quick:
        base |= {"vocab": 5_000, "contenders": [COMPILED, peers.TRL, peers.TRL_HEAD]}
    return [{**base, "dtype": dtype} for dtype in ("float32", "bfloat16")]


def make_rows(kind: str, config: Config, targets: Tensor) -> Tensor:
    dtype = getattr(torch, config["dtype"])
    rows = logits.make_logits(config["rows"], config["vocab"], torch.float32, targets)
    if kind == "forbidden":
        allowed = rows[torch.arange(len(rows)), targets.flatten()]
        rows[:, ::2] = -math.inf
        rows[torch.arange(len(rows)), targets.flatten()] = allowed
    elif kind == "offset":
        rows += 3e4
    elif kind == "sharp":
        rows[torch.arange(len(rows)), targets.flatten()] += torch.linspace(0, 30, len(rows))
    return rows.to(dtype)


def measure(config: Config) -> list[Result]:
    """Errors from logits of every kind, and of the head with ordinary and with sharp logits."""
    batch = peers.make_batch(*peers.split(config["rows"]), config["vocab"])
    where = {key: config[key] for key in ("dtype", "vocab", "rows", "pages")}
    found, missing = peers.available(peers.LOGITS, config["contenders"])
    results = []
    for kind in ROWS:
        pristine = make_rows(kind, config, batch.targets)
        buffer = pristine.clone()
        shaped = buffer.view(*batch.targets.shape, -1)
        smallest: dict[str, float] = {}

        def call(name: str, loss: peers.LogitsLoss, shaped: Tensor = shaped, smallest: Any = smallest) -> Any:
            got = logits.with_gradient(loss, shaped, batch, False)
            smallest[name] = got[1].min().item()
            return got

        calls = {name: lambda n=name, f=loss, c=call: c(n, f) for name, (_, loss) in found.items()}
        refill: Callable[[], object] = lambda b=buffer, p=pristine: b.copy_(p)  # noqa: E731
        errors, failed = logits.check(calls, refill, pristine, batch, logits.LOSS)
        results.append(_result(f"errors from logits, {kind} rows", where, errors, failed, smallest, missing))

    found, missing = peers.available(peers.HEADS, config["contenders"])
    for kind, scale in (("ordinary", 1.0), ("sharp", 8.0)):
        hidden, weight = head.make_head(*where_head(config), getattr(torch, config["dtype"]), batch.targets)
        hidden = (hidden.detach() * scale).requires_grad_()
        smallest = {}

        def run(name: str, loss: peers.HeadLoss, hidden: Tensor = hidden, weight: Tensor = weight) -> peers.Answer:
            out = loss(hidden, weight, batch)
            out.loss.backward()
            if out.entropy is not None:
                smallest[name] = out.entropy.min().item()  # noqa: B023
            return out

        def drop(hidden: Tensor = hidden, weight: Tensor = weight) -> None:
            hidden.grad = weight.grad = None

        head_calls = {name: lambda n=name, f=loss, r=run: r(n, f) for name, loss in found.items()}
        errors, failed = head.check(head_calls, drop, hidden, weight, batch)
        results.append(_result(f"errors of the head, {kind} rows", where, errors, failed, smallest, missing))
    return results


def where_head(config: Config) -> tuple[int, int, int]:
    return config["rows"], config["vocab"], 256


def _result(
    work: str,
    where: dict[str, Any],
    errors: dict[str, dict[str, float]],
    failed: dict[str, str],
    smallest: dict[str, float],
    missing: dict[str, str],
) -> Result:
    peers.require_exact(errors, work)
    if not smallest[OURS] >= 0:
        raise WrongError(f"{work}: an entropy of {smallest[OURS]:.3g}")
    rows: dict[str, Result] = {name: {"errors": values} for name, values in errors.items()}
    for name, value in smallest.items():
        if name in rows and value < 0:
            rows[name]["note"] = f"NEGATIVE ENTROPY {value:.1e}"
    rows |= {name: {"failed": reason} for name, reason in failed.items()}
    return {"work": work, **where, "contenders": rows, "missing": missing}


if __name__ == "__main__":
    sys.exit(main("accuracy", __doc__, configs))
