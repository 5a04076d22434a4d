"""The cost model of a step on many GPUs: against numbers worked by hand, real processes, and the page that shows it."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import pytest
import torch
from paths import ROOT
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.scaling import __main__ as command
from benchmarks.scaling import choice, collectives, knobs, measured, memory, processes, tables
from benchmarks.scaling.cluster import Links
from benchmarks.scaling.collectives import ALL_GATHER, ALL_REDUCE, Collective, Sent
from benchmarks.scaling.job import Job
from benchmarks.scaling.layouts import ALONE, DDP, FSDP, HYBRID, MIXED, VOCABULARY, Sampling, Setup
from benchmarks.scaling.step import DRIFT_BYTES, SAMPLE_BYTES, step_of
from benchmarks.scaling.transformer import MODELS, QWEN_1_5B, QWEN_7B, QWEN_32B
from edge_grpo.batching import Sample
from edge_grpo.types import Example, Prompt, Provenance, Response, Reward

SERVERS = Sampling(0.25)


def setup(model=QWEN_7B, gpus=8, layout=FSDP, sampling=SERVERS, **job) -> Setup:
    keys = {"num_prompts": 6 * gpus, "reduce_each_micro_batch": True} | job
    return Setup(model, gpus, layout, sampling, Job(**keys))


# --- against transformers, torch, and processes -----------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_parameters_are_those_of_the_published_configuration(model):
    config = Qwen2Config(
        vocab_size=model.vocab,
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        tie_word_embeddings=model.is_tied,
    )
    with torch.device("meta"):
        real = Qwen2ForCausalLM(config)
    assert sorted(tuple(parameter.shape) for parameter in real.parameters()) == sorted(model.shapes())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model", [processes.SHARDED, processes.TIED], ids=["untied", "tied"])
def test_flops_are_those_that_torch_counts(model, checkpointing):
    for one in measured.flops(model, checkpointing=checkpointing, length=24):
        assert one.measured == one.computed, one.what


@pytest.mark.parametrize("in_autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_that_autograd_saves(checkpointing, in_autocast):
    one = measured.activations(processes.SHARDED, checkpointing=checkpointing, in_autocast=in_autocast)
    assert one.measured == one.computed


@pytest.fixture(scope="module")
def found():
    return measured.run()


@pytest.mark.slow
def test_collectives_and_bytes_are_those_of_real_processes(found):
    """Of two and of four processes: DDP, FSDP2 (checkpointed, tied, replicated), a split vocabulary, objects."""
    every = list(measured.comparisons(found))
    assert {one.processes for one in every} == {2, 4}
    for one in every:
        assert one.measured == one.computed, one
        assert one.measured  # no empty list, and no 0 bytes


@pytest.mark.slow
def test_the_page_shows_what_was_measured(found):
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert command.block("measured", tables.measured(measured.shown(found))) in page


def test_bytes_of_a_token_that_processes_exchange():
    """Of vLLM's responses, which have no entropy, as the trainer scores them."""
    sizes = {}
    for length in (1000, 2000):
        ids = tuple(100_000 + place for place in range(length))
        logprobs, unknown = tuple(-1 / (place + 1) for place in range(length)), (math.nan,) * length
        response = Response(ids, logprobs, unknown, (Provenance.SAMPLED,) * length, "stop")
        reward = Reward(1.0, {"accuracy": 1.0}, "correct")
        sample = Sample(Prompt(Example(0, "p"), "p", (1, 2)), 0, response, reward, response, reward)
        sample.logprobs, sample.entropy = torch.zeros(length), torch.zeros(length)
        pair = (sample, sample.logprobs.tolist(), sample.entropy.tolist())
        sizes[length] = len(pickle.dumps([sample])), len(pickle.dumps([pair]))
    own, drift = ((after - before) / 1000 for before, after in zip(sizes[1000], sizes[2000], strict=True))
    assert own == pytest.approx(SAMPLE_BYTES, abs=2)
    assert drift == pytest.approx(DRIFT_BYTES, abs=2)


# --- against numbers worked by hand -----------------------------------------------------------------------------------


def test_a_ring_sends_all_parts_but_its_own():
    """1 GB over eight GPUs: 7/8 of it at 0.75 x 450 GB/s; an all-reduce sends it twice; nodes share 400 GB/s."""
    node, two_nodes = Links(8, 1), Links(16, 2)
    gather, sums = (Sent.of([Collective(name, 10**9)], node) for name in (ALL_GATHER, ALL_REDUCE))
    assert gather.nbytes == 875e6
    assert gather.seconds == pytest.approx(875e6 / 337.5e9 + 30e-6)
    assert sums.nbytes == 2 * 875e6
    assert Sent.of([Collective(ALL_GATHER, 10**9)], two_nodes, times=3).seconds == pytest.approx(
        3 * (937.5e6 / 300e9 + 80e-6)
    )
    assert Links(8, 8).rate == 0.75 * 50e9  # one GPU of each node: its own adapter
    assert Sent.of([Collective(ALL_REDUCE, 10**9)], Links(1, 1)).seconds == 0


def test_ddp_sends_each_gradient_once_and_fsdp_gathers_twice():
    sums = collectives.ddp(QWEN_1_5B, 4)
    assert sum(one.count * one.nbytes for one in sums if one.name == ALL_REDUCE) == 4 * 1_543_714_304
    assert sums[1].nbytes >= 2**20
    assert all(one.nbytes >= 25 * 2**20 for one in sums[2:-1])
    gathers = collectives.fsdp_forward(QWEN_7B, 8, 2) + collectives.fsdp_backward(QWEN_7B, 8, 2)
    layers = 28 * 233_057_792  # of each: 2 x 3584^2 + 2 x 512 x 3584 + 3 x 3584 x 18944, biases and norms
    root = 7_615_616_512 - layers
    assert sum(one.count * one.nbytes for one in gathers) == 2 * (2 * layers + root)
    assert sum(one.count for one in gathers) == 28 + 28 + 1


def test_memory_of_parameters_gradients_and_moments():
    """16 bytes a parameter: 122 GB of 7 billion, 15 on each of eight."""
    assert step_of(setup(layout=DDP)) is None
    assert step_of(setup(gpus=1, layout=ALONE[0], sampling=Sampling())) is None
    held = memory.training(setup(sampling=Sampling()))
    assert held.states == pytest.approx(16 * 7_615_616_512 / 8, rel=1e-3)
    assert memory.training(setup(layout=DDP, model=QWEN_1_5B)).states == 16 * 1_543_714_304
    whole = memory.training(setup(sampling=Sampling(), reduce_each_micro_batch=False))
    assert whole.gathered - held.gathered == 4 * 7_615_616_512  # gradients that are added up before they are split


def test_weights_are_read_once_where_they_are_split():
    """In float32; without a split, by every process of a machine."""
    for gpus in (8, 64):
        assert memory.loading(setup(gpus=gpus, sampling=Sampling())) == 4 * 7_615_616_512
        assert memory.loading(setup(gpus=gpus, layout=DDP, sampling=Sampling())) == 8 * 4 * 7_615_616_512
    assert memory.loading(setup(gpus=1, layout=ALONE[0], sampling=Sampling())) == 4 * 7_615_616_512
    assert memory.loading(setup(gpus=8, layout=DDP)) == 6 * 4 * 7_615_616_512  # two sample


def test_sampling_reads_all_weights_for_each_token_of_the_longest_response():
    """1,024 times 15.2 GB at 0.7 x 3.35 TB/s, and 3 ms each; two GPUs halve the reading."""
    alone, shared = (step_of(setup(sampling=Sampling(0.25, size))) for size in (1, 2))
    reading = 1024 * 2 * 7_615_616_512 / (0.7 * 3.35e12)
    assert alone.sample.seconds > reading + 1024 * 3e-3
    assert alone.sample.launching == shared.sample.launching == pytest.approx(1024 * 3e-3)
    cache = 8 * 6 * 8 / 2 * 614.4 * (150 + 307.2) * 57_344  # of one engine's responses: bytes of keys and values read
    assert alone.sample.memory_bytes == pytest.approx(1024 * 2 * 7_615_616_512 + cache)
    assert shared.sample.memory_bytes == pytest.approx((1024 * 2 * 7_615_616_512 + 2 * cache) / 2)


def test_update_is_eight_times_the_parameters_and_the_head():
    """Forward, its repetition without the last product, twice that backward; and the head's three products."""
    step = step_of(setup())
    tokens = 64 * 828.4  # of one of six trainers: 150 + 614.4 + 0.5 x 128
    matrices = 28 * (2 * 3584**2 + 2 * 512 * 3584 + 3 * 3584 * 18_944)
    last = 28 * 3584 * 18_944
    layers = 2 * tokens * (4 * matrices - last)
    head = 3 * 2 * tokens * 3584 * 152_064
    assert layers + head < step.update.flops < 1.02 * (layers + head)  # attention


# --- what must hold whatever the numbers ------------------------------------------------------------------------------


def test_half_as_large_micro_batches_gather_twice_as_often():
    few, many = (step_of(setup(micro_batch_size=size)).update for size in (4, 2))
    assert many.sent[0].nbytes == 2 * few.sent[0].nbytes
    assert many.flops == pytest.approx(few.flops)
    once = step_of(setup(gpus=64, reduce_each_micro_batch=False, num_prompts=384)).update
    assert once.sent[1].count == 29  # 28 layers and the root


def test_sampling_ahead_takes_the_longer_of_both():
    waits, ahead = (step_of(setup(sampling=Sampling(0.25, 1, ahead))) for ahead in (0, 1))
    others = waits.weights.seconds + waits.samples.seconds
    assert waits.seconds == pytest.approx(waits.sampling_seconds + waits.training_seconds + others)
    assert ahead.seconds == pytest.approx(max(waits.sampling_seconds, waits.training_seconds) + others)


def test_replicated_nodes_gather_within_a_node():
    spread, nodes = (step_of(setup(gpus=64, layout=layout)) for layout in (FSDP, HYBRID))
    assert [sent.links for sent in spread.update.sent] == [Links(48, 6)] * 2
    assert [sent.links for sent in nodes.update.sent] == [Links(8, 1), Links(8, 1), Links(6, 6)]
    assert nodes.memory.states == pytest.approx(6 * spread.memory.states, rel=3e-3)


def test_a_split_vocabulary_takes_the_head_out_of_the_root():
    whole, split = (step_of(setup(layout=layout)) for layout in (FSDP, VOCABULARY))
    head = 4 * 152_064 * 3584
    assert whole.update.sent[0].collectives[0].nbytes - split.update.sent[0].collectives[0].nbytes == head
    assert split.memory.gathered < whole.memory.gathered
    assert split.update.flops > whole.update.flops  # the fourth product


def test_the_budget_bounds_the_head():
    large, small = (memory.training(setup(micro_batch_size=16, memory_budget=size)).head for size in (0, 2**30))
    assert small <= 2**30 < large <= 3 * 2**30
    assert step_of(setup(memory_budget=2**20)) is None  # no tile fits


def test_the_choice_fits_and_no_simpler_layout_is_as_fast():
    for model, gpus, step in tables.chosen():
        every = tables.found(model, gpus)
        if step is None:
            assert not any(every.values())
            continue
        assert step.memory.fits()
        assert step.setup.layout.offered
        same = [other for layout, other in every.items() if other and layout.precision is MIXED and layout.offered]
        if same:
            assert step.setup.layout.precision is MIXED
            assert step.seconds <= choice.AS_FAST * min(other.seconds for other in same)
    assert choice.choose(tables.found(QWEN_32B, 1)) is None


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", command.COMPUTED)
def test_the_page_shows_what_is_computed(name):
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert command.block(name, command.COMPUTED[name]()) in page, "run python -m benchmarks.scaling --write"


def test_writing_replaces_tables_and_refuses_a_page_without_a_place():
    page = f"before\n\n{command.block('knobs', 'old')}\n\nafter\n"
    assert command.written(page, {"knobs": "new \\1"}) == page.replace("old", "new \\1")
    with pytest.raises(ValueError, match=r"one place for 'choices'.* got 0"):
        command.written(page, {"choices": "new"})


def test_json_has_every_layout(capsys):
    assert command.main(["--json"]) == 0
    records = tables.records()
    assert len(records) == sum(len(tables.found(model, gpus)) for model, gpus in tables.cases())
    assert '"collectives": [{"name": "all-gather"' in capsys.readouterr().out


def test_every_key_that_is_changed_is_one():
    from edge_grpo.config import TrainConfig

    config = TrainConfig()
    for text, _ in knobs.changes(knobs.base(8)):
        for key in (word.split("`")[0] for word in text.split("`")[1::2] if "." in word):
            section, name = key.split(".")
            assert hasattr(getattr(config, section), name), key


def test_changes_change_one_thing():
    base = knobs.base(8)
    for _, other in list(knobs.changes(base))[1:]:
        parts = [name for name in ("layout", "sampling", "job") if getattr(other, name) != getattr(base, name)]
        assert len(parts) == 1
        assert replace(other, **{parts[0]: getattr(base, parts[0])}) == base


def test_each_server_gets_the_weights_by_itself():
    """In float32: 339 tensors gathered for each of four servers, and sent to the two GPUs of each."""
    weights = step_of(setup(gpus=32, sampling=Sampling(0.25, 2))).weights
    gathers, sent = weights.sent
    assert gathers.count == 4 * 339
    assert sent.count == 4
    assert sent.links.processes == 3
    assert sent.collectives[0].nbytes == 4 * 7_615_616_512
