"""The head's ways on a GPU: a contender for each, and the constants of edge_kernels/ops/head_plan.py by their times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import OURS, Result
from benchmarks.peers import Answer, Batch
from edge_kernels import linear_edge_grpo_loss, use_backend
from edge_kernels.ops import head_plan
from edge_kernels.ops.head_plan import COLUMNS, FUSED, TILES, Plan, Problem, Rates, use_way


class Way(NamedTuple):
    """One of our contenders: a backend, a way (None: the one that the cost model takes), and its budget."""

    backend: str
    way: str | None
    memory_budget: int | None

    def run(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a call returns that goes this way; it must contain the backward pass."""
        with use_backend(self.backend), use_way(self.way):
            return call(*arguments)

    def loss(self, hidden: Tensor, weight: Tensor, batch: Batch) -> Answer:
        given, budget = (hidden, weight, batch.targets, batch.mask), self.memory_budget
        out = linear_edge_grpo_loss(*given, advantages=batch.advantages, memory_budget=budget)
        return Answer(out.loss, out.logprobs, out.entropy)


def problem_of(rows: int, vocab: int, hidden: int, dtype: torch.dtype, device: str) -> Problem:
    sums = head_plan.sums_in_place(device, dtype)
    return Problem(rows, hidden, vocab, dtype.itemsize, dtype.itemsize, True, True, sums, True, True)


def _plans(problem: Problem, memory_budget: int, rates: Rates) -> dict[str, Plan]:
    return {plan.way: plan for plan in head_plan.every_plan(problem, memory_budget, rates)}


def ways(names: Sequence[str], problem: Problem) -> dict[str, Way]:
    """Return our contenders by name: of each backend its choice, its tiles in one and in some three, and the others."""
    one_row, one_tile = (_plans(problem, b, head_plan.RATES["sm_90"])[TILES].extra_bytes for b in (1, 2**60))
    found: dict[str, Way] = {}
    for name in names:
        ours = f"{OURS}, {name}"
        found[ours] = Way(name, None, None)
        found[f"{ours}, one tile"] = Way(name, TILES, one_tile)
        found[f"{ours}, tiles"] = Way(name, TILES, one_row + one_tile // 3)
        if problem.weight_itemsize < 4:
            found[f"{ours}, by columns"] = Way(name, COLUMNS, None)
        if name == "triton":
            found[f"{ours}, fused"] = Way(name, FUSED, None)
    return found


def constants(result: Result, problem: Problem, ours: Mapping[str, Way], rate: Mapping[str, float]) -> Result:
    """Return the constants of this device, and the times in ms that they predict for each way that was measured."""
    rates = head_plan.RATES["sm_90"]._replace(
        products=rate["bfloat16 product"], float32_products=rate["float32 product"], memory=rate["in-place read-write"]
    )
    measured = {name: row["min_ms"] / 1e3 for name, row in result["contenders"].items() if "min_ms" in row}
    fused = [measured[name] for name, way in ours.items() if way.way == FUSED and name in measured]
    if fused:  # whose prediction is a part that the share divides, and one that it does not
        whole, half = (_plans(problem, 2**60, rates._replace(fused_share=share))[FUSED].seconds for share in (1.0, 0.5))
        rates = rates._replace(fused_share=(half - whole) / max(min(fused) - (2 * whole - half), 1e-12))
    predicted = {}
    for name, way in ours.items():
        if name in measured and way.way is not None:
            plan = _plans(problem, way.memory_budget or head_plan.MEMORY_BUDGET, rates)[way.way]
            predicted[name] = plan.seconds * 1e3
    return {"rates": rates._asdict(), "share_was_measured": bool(fused), "predicted_ms": predicted}


def describe(result: Result) -> Iterator[str]:
    """Yield the lines that say what to write into head_plan.py, and how far its model then is from the times."""
    found = result["head_plan"]
    values = ", ".join(f"{name}={value:.3g}" for name, value in found["rates"].items())
    yield f"edge_kernels/ops/head_plan.py, constants of this device: Rates({values})"
    if not found["share_was_measured"]:
        yield "  (fused_share is the assumed one: the fused kernels did not run)"
    for name, predicted in found["predicted_ms"].items():
        yield f"  {name:38} {result['contenders'][name]['min_ms']:10.3f} ms, predicted {predicted:.3f}"


def calls(names: Sequence[str], problem: Problem, call: Callable[..., Any]) -> dict[str, Callable[[], Any]]:
    """Return for each contender ``call(loss)`` by its way."""
    return {name: partial(way.run, call, way.loss) for name, way in ways(names, problem).items()}
