"""The time of a step by its phases, what bounds each, and what is sent in it."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.scaling import collectives, memory
from benchmarks.scaling.cluster import ASSUMED, DECODING_MEMORY, HEAD_RATES, LAYER_PRODUCTS, MEMORY, Links
from benchmarks.scaling.collectives import ALL_GATHER, ALL_REDUCE, BROADCAST, REDUCE_SCATTER, Collective, Sent
from benchmarks.scaling.layouts import Setup
from benchmarks.scaling.memory import Memory
from edge_kernels.ops.head_plan import COLUMNS

# What a step's samples pickle to, for each token of them: ids, two floats, provenance; and the same again, with what
# was recomputed, for the drift. tests/benchmarks/scaling has them from real samples.
SAMPLE_BYTES = 34
DRIFT_BYTES = 52


class Phase(NamedTuple):
    """What one GPU does in a phase: flops, bytes, and seconds by what bounds them."""

    name: str
    flops: float = 0.0
    memory_bytes: float = 0.0
    sent: tuple[Sent, ...] = ()
    computing: float = 0.0  # seconds in which products bound it
    moving: float = 0.0  # in which the GPU's own memory does
    launching: float = 0.0  # in which the host does
    hides: bool = False  # collectives run beside the rest, and only what is left of them is waited for

    @property
    def sending(self) -> float:
        return sum(sent.seconds for sent in self.sent)

    @property
    def seconds(self) -> float:
        own = self.computing + self.moving + self.launching
        return max(own, self.sending) if self.hides else own + self.sending

    @property
    def bound(self) -> str:
        """What most of the time is waited for."""
        own = self.computing + self.moving + self.launching
        parts = {"products": self.computing, "memory": self.moving, "launches": self.launching}
        parts["network"] = max(0.0, self.sending - own) if self.hides else self.sending
        return max(parts, key=lambda name: parts[name])


class Step(NamedTuple):
    """What a step takes with a setup."""

    setup: Setup
    memory: Memory
    sample: Phase
    correct: Phase
    score: Phase
    update: Phase
    optimizer: Phase
    weights: Phase
    samples: Phase

    @property
    def phases(self) -> tuple[Phase, ...]:
        return self[2:]

    @property
    def sampling_seconds(self) -> float:
        return self.sample.seconds + self.correct.seconds

    @property
    def training_seconds(self) -> float:
        return self.score.seconds + self.update.seconds + self.optimizer.seconds

    @property
    def seconds(self) -> float:
        """With ``ahead`` the servers sample the next step while this one is trained."""
        both = self.sampling_seconds, self.training_seconds
        return (max(both) if self.setup.sampling.ahead else sum(both)) + self.weights.seconds + self.samples.seconds

    @property
    def sent_bytes(self) -> float:
        return sum(sent.nbytes for phase in self.phases for sent in phase.sent)


def step_of(setup: Setup) -> Step | None:
    """Return what the step takes, or None where something does not fit."""
    job, room = setup.job, memory.cache_room(setup)
    if room < setup.model.cache_bytes() / setup.cache_parts * job.longest:
        return None
    try:
        held = memory.training(setup)
    except ValueError:  # no tile fits the head's budget
        return None
    if not held.fits():
        return None
    continued = job.responses * job.continued_share
    read = job.prompt_length + job.response_length
    first = (job.responses, job.num_prompts, job.prompt_length, job.response_length, job.max_completion_length)
    again = (continued, continued, read, job.correction_length, job.correction_max_length)
    return Step(
        setup=setup,
        memory=held,
        sample=_generate("sample", setup, room, *first),
        correct=_generate("correct", setup, room, *again) if continued else Phase("correct"),
        score=_score(setup),
        update=_update(setup),
        optimizer=_optimizer(setup),
        weights=_weights(setup),
        samples=_samples(setup),
    )


# --- sampling ---------------------------------------------------------------------------------------------------------


def _generate(
    name: str, setup: Setup, room: float, responses: float, prompts: float, read: float, mean: float, most: int
) -> Phase:
    """Return the time of sampling ``responses`` of ``mean`` tokens, ``most`` at most, after prompts of ``read`` tokens.

    Each of an engine's steps reads all weights, and the keys and values of the sequences that run. The last steps have
    few of those: an engine makes at least as many steps as the longest response has tokens.
    """
    model, size = setup.model, setup.sampling.tensor_parallel
    engines = (setup.servers or setup.gpus) / size
    responses, prompts = responses / engines, max(1.0, prompts / engines)
    at_once = min(responses, setup.cache_parts * room / (model.cache_bytes() * (read + most)))
    steps = max(float(most), responses * mean / at_once)
    reading = model.forward_flops([read]) * prompts / size
    flops = 2.0 * model.parameters * responses * mean / size
    cached = responses * mean * (read + mean / 2) * model.cache_bytes()
    moved = steps * 2 * model.parameters / size + cached / setup.cache_parts
    sums = Collective(ALL_REDUCE, round(2 * model.hidden * at_once), round(2 * model.layers * steps))
    seconds, is_bound_by_products = max((moved / DECODING_MEMORY, False), (flops / LAYER_PRODUCTS, True))
    return Phase(
        name,
        flops=reading + flops,
        memory_bytes=moved,
        sent=(Sent.of([sums], Links(size, 1)),),
        computing=reading / LAYER_PRODUCTS + (seconds if is_bound_by_products else 0),
        moving=0 if is_bound_by_products else seconds,
        launching=steps * ASSUMED.decoding_seconds,
    )


# --- training ---------------------------------------------------------------------------------------------------------


def _score(setup: Setup) -> Phase:
    """Return the pass without gradient over all responses: vLLM gives no entropy, and its logprobs are corrected."""
    model, times = setup.model, setup.micro_batches
    lengths = [setup.job.trained_length] * setup.micro_batch_size
    rows = sum(lengths)
    layers = model.forward_flops(lengths)
    head, logits = 2.0 * rows * model.hidden * model.vocab, 2 * 2 * rows * model.vocab  # written and read
    computing = layers / LAYER_PRODUCTS + head / HEAD_RATES.products
    moving = (logits + _cast_bytes(setup)) / MEMORY
    return Phase(
        "score",
        flops=(layers + head) * times,
        memory_bytes=(logits + _cast_bytes(setup)) * times,
        sent=tuple(_forward_traffic(setup, times)),
        computing=computing * times,
        moving=moving * times,
        launching=max(0.0, model.layers * ASSUMED.layer_seconds - computing - moving) * times,
        hides=True,
    )


def _update(setup: Setup) -> Phase:
    """Return forward and backward passes of all micro-batches."""
    model, times, recomputes = setup.model, setup.micro_batches, setup.job.gradient_checkpointing
    lengths = [setup.job.trained_length] * setup.micro_batch_size
    rows = round(sum(lengths))
    forward = model.forward_flops(lengths)
    backward = model.backward_flops(lengths, recomputes=recomputes)
    if not setup.layout.precision.trains_all:  # no gradients of the weights
        backward -= forward
    problem, plan = memory.head_problem(setup, rows), memory.head_plan(setup, rows)
    products = (3 if problem.advantages_known else 4) + (plan.way == COLUMNS) - (not problem.wants_weight)
    head = 2.0 * products * problem.rows * problem.hidden * problem.vocab
    computing = (forward + backward) / LAYER_PRODUCTS + plan.seconds
    cast = _cast_bytes(setup) * (2 if recomputes else 1)
    launching = (4 if recomputes else 3) * model.layers * ASSUMED.layer_seconds
    return Phase(
        "update",
        flops=(forward + backward + head) * times,
        memory_bytes=(2 * 2.0 * problem.rows * problem.vocab + cast) * times,
        sent=tuple(_update_traffic(setup, rows, times)),
        computing=computing * times,
        moving=cast / MEMORY * times,
        launching=max(0.0, launching - computing - cast / MEMORY) * times,
        hides=True,
    )


def _cast_bytes(setup: Setup) -> float:
    """Return what autocast reads and writes of the layers' weights in one pass."""
    return (4 + 2) * setup.model.layers * setup.model.matrices() if setup.is_cast_late else 0


def _forward_traffic(setup: Setup, times: int) -> list[Sent]:
    if not setup.layout.is_sharded:
        return []
    gathers = collectives.fsdp_forward(setup.model, setup.shards, setup.gathered_itemsize)
    return [Sent.of(gathers, setup.links(setup.shards), times)]


def _update_traffic(setup: Setup, rows: int, times: int) -> list[Sent]:
    model, layout, shards = setup.model, setup.layout, setup.shards
    trains_all = layout.precision.trains_all
    adapters = 4 * memory.lora_parameters(model)
    if not layout.is_sharded:
        once = collectives.ddp(model, layout.precision.gradient) if trains_all else [Collective(ALL_REDUCE, adapters)]
        return [Sent.of(once, setup.links(setup.trainers))]
    has_head = not layout.splits_vocabulary
    gathers = collectives.fsdp_forward(model, shards, setup.gathered_itemsize, has_head=has_head)
    gathers += collectives.fsdp_backward(model, shards, setup.gathered_itemsize)
    sums = collectives.fsdp_reduction(model, shards, 4, has_head=has_head)
    if not trains_all:
        sums = [Collective(REDUCE_SCATTER, adapters // model.layers, model.layers)]
    reductions = times if setup.job.reduce_each_micro_batch else 1
    found = [Sent.of(gathers, setup.links(shards), times), Sent.of(sums, setup.links(shards), reductions)]
    if setup.replicas > 1:  # a process and those of its number in the other nodes
        between = collectives.replicas_reduction(model, shards, 4)
        found.append(Sent.of(between, Links(setup.replicas, setup.replicas), reductions))
    if layout.splits_vocabulary:
        parts, whole = setup.vocabulary_shards, setup.vocabulary_shards * rows
        own = [Collective(ALL_GATHER, 2 * whole * model.hidden), *collectives.vocabulary_forward(whole)]
        own += collectives.vocabulary_backward(whole, model.hidden)
        found.append(Sent.of(own, Links(parts, 1), times))
        if (groups := setup.trainers // parts) > 1:
            gradient = Collective(ALL_REDUCE, 4 * model.vocab * model.hidden // parts)
            found.append(Sent.of([gradient], Links(groups, groups)))
    return found


def _optimizer(setup: Setup) -> Phase:
    trained = setup.model.parameters if setup.layout.precision.trains_all else memory.lora_parameters(setup.model)
    moved = trained / setup.shards * ASSUMED.adam_bytes * setup.layout.precision.weight / 4
    norm = Sent.of([Collective(ALL_REDUCE, 4)], setup.links(setup.trainers))
    return Phase("optimizer", memory_bytes=moved, sent=(norm,), moving=moved / MEMORY)


def _weights(setup: Setup) -> Phase:
    """Return the time until the engines sample with the new weights: one server after the other, by NCCL."""
    model, itemsize, size = setup.model, setup.layout.precision.weight, setup.sampling.tensor_parallel
    servers = setup.servers // size
    moved = (itemsize + 2) * model.parameters / size
    gathers = collectives.full_tensors(model, setup.shards, itemsize)
    sent = [Sent.of(gathers, setup.links(setup.shards), max(1, servers))]
    if servers:  # from the first process, through its adapter
        links = Links(size + 1, 1 if setup.gpus == setup.trainers_of_node + setup.servers else size + 1)
        sent.append(Sent.of([Collective(BROADCAST, itemsize * model.parameters)], links, servers))
    return Phase("weights", memory_bytes=moved, sent=tuple(sent), moving=moved / MEMORY)


def _samples(setup: Setup) -> Phase:
    """Return the exchange of all samples, from which every process makes the step's metrics."""
    tokens = setup.sequences * setup.job.trained_length
    sent: list[Collective] = []
    for nbytes in (SAMPLE_BYTES, DRIFT_BYTES):
        sent += collectives.gathered_objects(round(tokens * nbytes), setup.trainers)
    return Phase("samples", sent=(Sent.of(sent, setup.links(setup.trainers)),))
