"""The best settings of each layout, and of all layouts the one to choose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product

from benchmarks.scaling.job import Job
from benchmarks.scaling.layouts import BFLOAT16, LORA, MIXED, Layout, Sampling, Setup, layouts, samplings
from benchmarks.scaling.step import Step, step_of
from benchmarks.scaling.transformer import Transformer

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)
AS_FAST = 1.05  # of two times: a difference that the model does not know


def every_step(model: Transformer, gpus: int, layout: Layout, sampling: Sampling, job: Job) -> Iterator[Step]:
    """Yield the step with each size of micro-batches, checkpointing, and time of reduction, where it fits."""
    for size in MICRO_BATCH_SIZES:
        for checkpointing, reduces in product((False, True), (False, True) if layout.is_sharded else (False,)):
            own = replace(
                job,
                micro_batch_size=size,
                gradient_checkpointing=checkpointing,
                reduce_each_micro_batch=reduces,
            )
            if step := step_of(Setup(model, gpus, layout, sampling, own)):
                yield step


def best(steps: Iterable[Step]) -> Step | None:
    """Return the fastest step; of those about as fast the one that trains fastest; of these the one of least memory.

    A step that waits for servers leaves open how it is trained.
    """
    fast = _least(steps, lambda step: step.seconds)
    return min(_least(fast, lambda step: step.training_seconds), key=lambda step: step.memory.total, default=None)


def _least(steps: Iterable[Step], seconds: Callable[[Step], float]) -> list[Step]:
    every = list(steps)
    limit = AS_FAST * min(map(seconds, every), default=0.0)
    return [step for step in every if seconds(step) <= limit]


def best_of(model: Transformer, gpus: int, layout: Layout, job: Job) -> Step | None:
    """Return the step with the sampling, the micro-batches and the checkpointing that suit a layout best."""
    every = list(samplings(model, gpus))
    return best(step for sampling in every for step in every_step(model, gpus, layout, sampling, job))


def every_layout(model: Transformer, gpus: int, job: Job) -> dict[Layout, Step | None]:
    return {layout: best_of(model, gpus, layout, job) for layout in layouts(model, gpus)}


def choose(found: dict[Layout, Step | None]) -> Step | None:
    """Return the step of a layout that the trainer runs: with float32 weights if that fits, else with adapters.

    Of layouts about as fast it is the simplest, which ``layouts`` yields first.
    Weights in bfloat16 come last: at the learning rates of reinforcement learning most updates are lost in rounding.
    """
    for precision in (MIXED, LORA, BFLOAT16):
        fitting = [step for layout, step in found.items() if step and layout.offered and layout.precision is precision]
        if fitting:
            return _least(fitting, lambda step: step.seconds)[0]
    return None
