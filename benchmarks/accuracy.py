"""Errors of every contender against float64, on ordinary rows and on rows that break formulas; nothing is timed.

Forbidden: every other token at -inf. Offset: all logits 30,000 higher. Sharp: the target up to 42 above the rest.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import head, logits, peers
from benchmarks.harness import OURS, Config, Result, WrongError, main

ROWS = ("ordinary", "forbidden", "offset", "sharp")
HIDDEN = 256  # of the head


def configs(quick: bool) -> Sequence[Config]:
    base: Config = {"pages": "huge", "vocab": 49_152, "rows": 16, "contenders": None}
    if quick:
        return [{**base, "vocab": 5_000, "contenders": [peers.TRL, peers.TRL_HEAD], "dtype": "float32"}]
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
    """Return the errors from logits of every kind, and of the head with ordinary and with sharp logits."""
    dtype, batch = getattr(torch, config["dtype"]), peers.make_batch(*peers.split(config["rows"]), config["vocab"])
    results = []
    found, missing = peers.available(peers.LOGITS, config["contenders"])
    for kind in ROWS:
        pristine = make_rows(kind, config, batch.targets)
        buffer = pristine.clone()
        shaped = buffer.view(*batch.targets.shape, -1)
        exact = logits.Exact.of(pristine, batch.targets.flatten())
        calls = {name: partial(logits.with_gradient, f, shaped, batch, False) for name, (_, f) in found.items()}
        checked = logits.check(calls, partial(buffer.copy_, pristine), exact, batch, logits.LOSS)
        results.append(_result(f"errors from logits, {kind} rows", config, checked, missing))
    found, missing = peers.available(peers.HEADS, config["contenders"])
    for kind, scale in (("ordinary", 1), ("sharp", 8)):
        hidden, weight = head.make_head(config["rows"], config["vocab"], HIDDEN, dtype, batch.targets)
        hidden = (hidden.detach() * scale).requires_grad_()
        head_calls = {name: partial(head.with_gradient, f, hidden, weight, batch) for name, f in found.items()}
        checked = head.check(head_calls, hidden, weight, batch)
        results.append(_result(f"errors of the head, {kind} rows", config, checked, missing))
    return results


def _result(work: str, config: Config, checked: peers.Checked, missing: dict[str, str]) -> Result:
    peers.require_exact(checked.errors, work)
    if not checked.lowest_entropy[OURS] >= 0:
        raise WrongError(f"{work}: an entropy of {checked.lowest_entropy[OURS]:.3g}")
    rows: dict[str, Result] = {name: {"errors": values} for name, values in checked.errors.items()}
    for name, entropy in checked.lowest_entropy.items():
        if entropy < 0:
            rows[name]["note"] = f"NEGATIVE ENTROPY {entropy:.1e}"
    rows |= {name: {"failed": reason} for name, reason in checked.failed.items()}
    where = {key: config[key] for key in ("dtype", "vocab", "rows", "pages")}
    return {"work": work, **where, "contenders": rows, "missing": missing}


if __name__ == "__main__":
    sys.exit(main("accuracy", __doc__, configs))
