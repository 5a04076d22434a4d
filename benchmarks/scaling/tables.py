"""The cost model's tables, as Markdown and as records: what docs/scaling.md shows and ``--json`` prints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import Any

from benchmarks.scaling import choice, memory
from benchmarks.scaling.cluster import ASSUMED, HEAD_RATES, SHEET
from benchmarks.scaling.job import Job
from benchmarks.scaling.layouts import FSDP, Layout, Sampling, Setup
from benchmarks.scaling.measured import Comparison
from benchmarks.scaling.step import Phase, Step
from benchmarks.scaling.transformer import MODELS, Transformer
from edge_kernels.ops.head_plan import MEMORY_BUDGET

GPUS = (1, 8, 64)
PROMPTS_OF_GPU = 6  # so that 6 of 8 GPUs, and 4 of 8, have whole numbers of them

Row = Sequence[str]


def job_of(gpus: int) -> Job:
    return Job(num_prompts=PROMPTS_OF_GPU * gpus)


@cache
def found(model: Transformer, gpus: int) -> dict[Layout, Step | None]:
    return choice.every_layout(model, gpus, job_of(gpus))


def cases() -> Iterator[tuple[Transformer, int]]:
    return ((model, gpus) for model in MODELS for gpus in GPUS)


def chosen() -> list[tuple[Transformer, int, Step | None]]:
    return [(model, gpus, choice.choose(found(model, gpus))) for model, gpus in cases()]


# --- Markdown ---------------------------------------------------------------------------------------------------------


def markdown(head: Row, rows: Iterable[Row]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def gigabytes(value: float) -> str:
    number = value / 1e9
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}" if number >= 0.05 else "0"


def seconds(value: float) -> str:
    return f"{value:.1f}" if value >= 0.05 else "0"


def with_bound(phase: Phase) -> str:
    return f"{seconds(phase.seconds)} {phase.bound}" if phase.seconds >= 0.05 else "0"


def micro_batches(step: Step) -> str:
    job = step.setup.job
    notes = ["checkpointed"] * job.gradient_checkpointing + ["each reduced"] * job.reduce_each_micro_batch
    return ", ".join([str(step.setup.micro_batch_size), *notes])


# --- tables -----------------------------------------------------------------------------------------------------------


def choices() -> str:
    head = ["model", "GPUs", "layout", "sampling", "micro-batch", "GB of 80", "s a step", "responses/s"]
    rows = []
    for model, gpus, step in chosen():
        if step is None:
            rows.append([model.name, str(gpus), "none fits", "", "", "", "", ""])
            continue
        setup = step.setup
        rows.append(
            [
                model.name,
                str(gpus),
                setup.layout.name,
                setup.sampling.name,
                micro_batches(step),
                gigabytes(step.memory.total),
                seconds(step.seconds),
                f"{setup.job.responses / step.seconds:.0f}",
            ]
        )
    return markdown(head, rows)


def layouts() -> str:
    head = ["GPUs", "layout", "sampling", "micro-batch", "GB", "s a step"]
    head += ["sample", "correct", "score", "update", "weights", "GB sent"]
    parts = []
    for model in MODELS:
        rows = [_layout_row(gpus, layout, step) for gpus in GPUS for layout, step in found(model, gpus).items()]
        parts.append(f"**{model.name}**, {model.parameters / 1e9:.2f} billion parameters\n\n{markdown(head, rows)}")
    return "\n\n".join(parts)


def _layout_row(gpus: int, layout: Layout, step: Step | None) -> Row:
    name = layout.name if layout.offered else f"{layout.name} *"
    if step is None:
        return [str(gpus), name, "does not fit", *[""] * 9]
    numbers = [gigabytes(step.memory.total), seconds(step.seconds)]
    phases = [with_bound(phase) for phase in (step.sample, step.correct, step.score, step.update, step.weights)]
    return [
        str(gpus),
        name,
        step.setup.sampling.name,
        micro_batches(step),
        *numbers,
        *phases,
        gigabytes(step.sent_bytes),
    ]


def collectives() -> str:
    """Of the chosen layouts: in each phase, how many of each kind, and the bytes that a GPU sends."""
    head = ["model", "GPUs", "score", "update", "weights", "samples"]
    rows = []
    for model, gpus, step in chosen():
        if step and gpus > 1:
            phases = (step.score, step.update, step.weights, step.samples)
            rows.append([model.name, str(gpus), *map(_sent, phases)])
    return markdown(head, rows)


def _sent(phase: Phase) -> str:
    counts: defaultdict[str, int] = defaultdict(int)
    nbytes: defaultdict[str, float] = defaultdict(float)
    for sent in phase.sent:
        for one in sent.collectives:
            counts[one.name] += one.count
            nbytes[one.name] += one.sent_bytes(sent.links.processes)
    return "<br>".join(f"{counts[name]:,} {name}, {_sent_bytes(nbytes[name])}" for name in counts) or "none"


def _sent_bytes(value: float) -> str:
    unit, name = (1e9, "GB") if value >= 1e8 else (1e6, "MB") if value >= 1e5 else (1e3, "kB")
    return f"{value / unit:,.1f} {name}"


def memories() -> str:
    head = ["model", "GPUs", "parameters, gradients, moments", "gathered, copies", "activations", "head"]
    head += ["reserved", "in training", "room for a cache", "first machine's own, at the start"]
    rows = []
    for model, gpus, step in chosen():
        if step:
            parts = [*step.memory, ASSUMED.reserved_bytes, step.memory.total, memory.cache_room(step.setup)]
            parts.append(memory.loading(step.setup))
            rows.append([model.name, str(gpus), *map(gigabytes, parts)])
    return markdown(head, rows)


def heads() -> str:
    """Of a micro-batch's head: what is in memory at once besides hidden states, the weight and their gradients."""
    head = ["model", "tokens", "ours, GB", "ours, ms", "as products", "logits and gradient in bfloat16, GB"]
    head += ["the same in float32, GB", "1,024 tokens at a time in float32, GB"]
    rows = []
    for model in MODELS:
        for size in (1, 8):
            setup = Setup(model, 8, FSDP, Sampling(), replace(job_of(8), micro_batch_size=size))
            tokens = memory.largest_rows(setup)
            plan = memory.head_plan(setup, tokens)
            logits, weight = tokens * model.vocab, 4 * model.vocab * model.hidden
            chunk = 2 * 4 * 1024 * model.vocab + weight
            product = 2 * tokens * model.vocab * model.hidden / HEAD_RATES.products
            numbers = [f"{plan.seconds * 1e3:.0f}", f"{plan.seconds / product:.1f}"]
            sizes = [gigabytes(value) for value in (4 * logits, 8 * logits, chunk)]
            rows.append([model.name, f"{tokens:,}", gigabytes(plan.extra_bytes), *numbers, *sizes])
    return markdown(head, rows)


def assumptions() -> str:
    sheet, assumed, job = "data sheet", "assumed", job_of(1)
    latency, between = ASSUMED.collective_seconds * 1e6, ASSUMED.collective_seconds_between_nodes * 1e6
    lengths = f"{job.prompt_length}; {job.response_length:.0f}; {job.correction_length:.0f} tokens"
    rows = [
        ["an H100 SXM's products in bfloat16", f"{SHEET.products / 1e12:.0f} Tflop/s", sheet],
        ["its memory", f"{SHEET.memory / 1e12:.2f} TB/s, {SHEET.memory_bytes / 1e9:.0f} GB", sheet],
        ["NVLink in one direction", f"{SHEET.nvlink / 1e9:.0f} GB/s", sheet],
        ["InfiniBand in one direction, for each GPU", f"{SHEET.infiniband / 1e9:.0f} GB/s", sheet],
        ["products of the layers", share(ASSUMED.layers), assumed],
        ["products of the head", f"{HEAD_RATES.products / 1e12:.0f} Tflop/s", "assumed: `head_plan.RATES`"],
        ["memory while training", f"{HEAD_RATES.memory / 1e12:.1f} TB/s", "assumed: `head_plan.RATES`"],
        ["memory while sampling", share(ASSUMED.decoding), assumed],
        ["NVLink and InfiniBand", share(ASSUMED.network), assumed],
        ["a collective besides its bytes", f"{latency:.0f} us, between nodes {between:.0f} us", assumed],
        ["a step of vLLM besides memory", f"{ASSUMED.decoding_seconds * 1e3:.0f} ms", assumed],
        ["launching a layer's kernels", f"{ASSUMED.layer_seconds * 1e6:.0f} us, twice that backward", assumed],
        ["an optimizer step", f"{ASSUMED.adam_bytes:.0f} bytes of memory for each parameter", assumed],
        ["taken by CUDA, NCCL, the allocator", f"{ASSUMED.reserved_bytes / 1e9:.0f} GB", assumed],
        ["a plan fits", f"up to {ASSUMED.usable * SHEET.memory_bytes / 1e9:.0f} GB", assumed],
        ["an engine besides weights and cache", f"{ASSUMED.engine_bytes / 1e9:.0f} GB", assumed],
        ["prompts for each GPU; responses of each", f"{PROMPTS_OF_GPU}; {job.num_generations}", "setting"],
        [
            "longest response; correction",
            f"{job.max_completion_length:,}; {job.correction_max_length} tokens",
            "setting",
        ],
        ["mean prompt; response; correction", lengths, assumed],
        ["responses that are wrong", f"{job.wrong:.0%}".replace("%", " %"), assumed],
        ["of these corrected; continued by the policy", "all; half", "`correction`'s defaults"],
        ["memory of the head", f"at most {MEMORY_BUDGET / 2**30:.0f} GiB", "its default"],
    ]
    return markdown(["", "", ""], rows)


def share(value: float) -> str:
    return f"{value:.0%} of the data sheet".replace("%", " %")


def measured(comparisons: Iterable[Comparison]) -> str:
    rows = [[one.what, str(one.processes), _amount(one.measured), _amount(one.computed)] for one in comparisons]
    return markdown(["", "processes", "measured", "computed"], rows)


def _amount(value: Any) -> str:
    if not isinstance(value, list):
        return f"{value:,.0f}"
    count, nbytes = sum(one.count for one in value), sum(one.count * one.nbytes for one in value)
    return f"{count} of {nbytes:,} bytes"


def records() -> list[dict[str, Any]]:
    """Return every layout's step as numbers."""
    return [
        {
            "model": model.name,
            "gpus": gpus,
            "layout": layout.name,
            "offered": layout.offered,
            **({} if step is None else _record(step)),
        }
        for model, gpus in cases()
        for layout, step in found(model, gpus).items()
    ]


def _record(step: Step) -> dict[str, Any]:
    job = step.setup.job
    return {
        "sampling": step.setup.sampling.name,
        "micro_batch_size": step.setup.micro_batch_size,
        "gradient_checkpointing": job.gradient_checkpointing,
        "reduce_each_micro_batch": job.reduce_each_micro_batch,
        "responses": job.responses,
        "seconds": step.seconds,
        "memory": {**step.memory._asdict(), "total": step.memory.total},
        "phases": {
            phase.name: {
                "seconds": phase.seconds,
                "bound": phase.bound,
                "flops": phase.flops,
                "memory_bytes": phase.memory_bytes,
                "collectives": [
                    {**asdict(one), "processes": sent.links.processes, "nodes": sent.links.nodes}
                    for sent in phase.sent
                    for one in sent.collectives
                ],
            }
            for phase in step.phases
        },
    }
