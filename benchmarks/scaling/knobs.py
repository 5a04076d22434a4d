"""What a step costs when one of its keys is changed and everything else stays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.scaling import choice, tables
from benchmarks.scaling.choice import MICRO_BATCH_SIZES
from benchmarks.scaling.layouts import ROUNDED, VOCABULARY, Setup, samplings
from benchmarks.scaling.step import Step, step_of
from benchmarks.scaling.transformer import QWEN_7B


def base(gpus: int) -> Setup:
    """The choice for 7 billion parameters, trained as in the recipe for 8 GPUs."""
    step = choice.choose(tables.found(QWEN_7B, gpus))
    assert step is not None
    setup = step.setup
    job = replace(setup.job, micro_batch_size=8, gradient_checkpointing=True, reduce_each_micro_batch=True)
    return replace(setup, job=job)


def changes(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """Yield a key with its value, and the setup that has it."""

    def key(name: str, **values: object) -> tuple[str, Setup]:
        return name, replace(setup, job=replace(setup.job, **values))  # type: ignore[arg-type]

    job, sampling = setup.job, setup.sampling
    yield "nothing", setup
    for size in MICRO_BATCH_SIZES:
        if size != setup.micro_batch_size:
            yield key(f"`optim.micro_batch_size` {size}", micro_batch_size=size)
    checkpointing, reduces = not job.gradient_checkpointing, not job.reduce_each_micro_batch
    yield key(f"`model.gradient_checkpointing` {str(checkpointing).lower()}", gradient_checkpointing=checkpointing)
    yield key(f"`optim.reduce_each_micro_batch` {str(reduces).lower()}", reduce_each_micro_batch=reduces)
    yield key("`rollout.num_generations` 16", num_generations=16)
    for length in (2048, 4096):
        yield key(f"`rollout.max_completion_length` {length}", max_completion_length=length)
    for gibibytes in (1, 8):
        yield key(f"`memory_budget` of the head {gibibytes} GiB", memory_budget=gibibytes * 2**30)
    yield key("no correction (`method` eda)", corrected=0.0)
    yield key("a quarter of the wrong responses corrected (`correction.scope`)", corrected=0.25)
    if sampling.server_share:
        other = replace(sampling, ahead=1 - sampling.ahead)
        yield f"`rollout.ahead` {other.ahead}", replace(setup, sampling=other)
    for other in samplings(setup.model, setup.gpus):
        if other != sampling and other.ahead == bool(other.server_share):
            yield other.name, replace(setup, sampling=other)
    for layout in (ROUNDED, VOCABULARY):
        yield f"{layout.name} *", replace(setup, layout=layout)


def table() -> str:
    head = ["changed", "GPUs", "GB of 80", "s a step", "responses/s", "sample, correct", "score", "update", "GB sent"]
    rows = []
    for gpus in (8, 64):
        for name, setup in changes(base(gpus)):
            step = step_of(setup)
            rows.append([name, str(gpus), *(["does not fit", *[""] * 6] if step is None else _numbers(step))])
    return tables.markdown(head, rows)


def _numbers(step: Step) -> list[str]:
    return [
        tables.gigabytes(step.memory.total),
        tables.seconds(step.seconds),
        f"{step.setup.job.responses / step.seconds:.0f}",
        tables.seconds(step.sampling_seconds),
        tables.seconds(step.score.seconds),
        tables.seconds(step.update.seconds),
        tables.gigabytes(step.sent_bytes),
    ]
