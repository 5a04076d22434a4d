"""Padding, its inverse, and the cuts into mini- and micro-batches."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_grpo.batching import Sample, micro_batches, minibatches, pack, pad, unpad
from edge_grpo.types import Example, Prompt, Provenance, Response, Reward

PAD = 9


def make_sample(prompt_ids, token_ids, *, group=0, injected=(), advantage=0.0) -> Sample:
    provenance = tuple(Provenance.INJECTED if i in injected else Provenance.SAMPLED for i in range(len(token_ids)))
    records = tuple(math.nan if i in injected else -float(token) for i, token in enumerate(token_ids))
    response = Response(tuple(token_ids), records, records, provenance, "stop")
    reward = Reward(0.0, {}, "wrong")
    prompt = Prompt(Example(0, "p"), "p", tuple(prompt_ids))
    return Sample(prompt, group, response, reward, response, reward, advantage=advantage)


def test_pad_aligns_everything_with_the_predicted_token():
    batch = pad([make_sample([1, 2], [3, 4, 5], injected=[1], advantage=2.0), make_sample([6], [7])], PAD)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 9, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.targets.tolist() == [[2, 3, 4, 5], [7, 9, 9, 9]]
    # Token 3 is the first of the completion: the position before it predicts it.
    assert batch.completion_mask.tolist() == [[False, True, True, True], [True, False, False, False]]
    assert batch.injected_mask.tolist() == [[False, False, True, False], [False] * 4]
    assert batch.advantages.tolist() == [2.0, 0.0]
    assert batch.logprobs is None
    assert batch.sampling_logprobs[0, 1] == -3
    assert torch.isnan(batch.sampling_logprobs[0, 2])


def test_pad_keeps_padding_apart_from_an_equal_token():
    """A sampled token may equal the padding token (a model whose padding is its end of sequence)."""
    batch = pad([make_sample([1], [PAD, PAD]), make_sample([1, 2, 3], [4])], PAD)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.completion_mask.tolist() == [[True, True, False], [False, False, True]]


def test_pack_aligns_everything_with_the_predicted_token():
    batch = pack([make_sample([1, 2], [3, 4, 5], injected=[1], advantage=2.0), make_sample([6], [7])])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert batch.attention_mask is None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert batch.targets.tolist() == [[2, 3, 4, 5, 6, 7]]
    # The last position of the first sequence predicts the second one's prompt, which nothing is learned from.
    assert batch.completion_mask.tolist() == [[False, True, True, True, False, True]]
    assert batch.injected_mask.tolist() == [[False, False, True, False, False, False]]
    assert batch.cu_seqlens.tolist() == [0, 5, 6]
    assert batch.advantages.tolist() == [2.0, 0.0]
    assert batch.sampling_logprobs[0, 1] == -3
    assert torch.isnan(batch.sampling_logprobs[0, 2])


sizes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7)), min_size=1, max_size=6)


@given(sizes)
def test_unpad_inverts_pad_and_pack(shapes):
    samples = [make_sample(range(p), range(10, 10 + t)) for p, t in shapes]
    for number, sample in enumerate(samples):
        sample.logprobs = torch.arange(len(sample.response.token_ids)) + 100.0 * number
    for batch in (pad(samples, PAD), pack(samples)):
        assert batch.logprobs is not None
        for sample, values in zip(samples, unpad(batch.logprobs, batch), strict=True):
            assert torch.equal(values, sample.logprobs)


def test_what_processes_exchange_of_a_sample_does_not_grow_with_its_micro_batch():
    """A view of the micro-batch's tensor would be pickled with all of it, 16 samples for one."""
    samples = [make_sample([1], [2] * 500) for _ in range(16)]
    for sample in samples:
        sample.logprobs = torch.zeros(500)
    parts = {size: unpad(pad(samples[:size], PAD).logprobs, pad(samples[:size], PAD)) for size in (1, 16)}
    sizes = {size: len(pickle.dumps(values[0])) for size, values in parts.items()}
    assert sizes[16] == sizes[1] < 500 * 4 + 1000


@given(sizes, st.integers(1, 4))
def test_micro_batches_hold_every_sample_once(shapes, size):
    samples = [make_sample(range(p), range(t)) for p, t in shapes]
    chunks = list(micro_batches(samples, size))
    assert all(1 <= len(chunk) <= size for chunk in chunks)
    assert sorted(id(s) for chunk in chunks for s in chunk) == sorted(map(id, samples))


@given(sizes, st.integers(1, 30), st.booleans())
def test_micro_batches_keep_to_their_tokens(shapes, max_tokens, packed):
    samples = [make_sample(range(p), range(t)) for p, t in shapes]
    chunks = list(micro_batches(samples, 4, max_tokens=max_tokens, packed=packed))
    assert sorted(id(s) for chunk in chunks for s in chunk) == sorted(map(id, samples))
    lengths = [[sample.length for sample in chunk] for chunk in chunks]
    sizes = [sum(each) if packed else max(each) * len(each) for each in lengths]
    for size, each in zip(sizes, lengths, strict=True):
        assert size <= max_tokens or len(each) == 1
    for (size, each), following in zip(zip(sizes, lengths, strict=True), lengths[1:], strict=False):
        more = following[0] if packed else each[0]
        assert size + more > max_tokens or len(each) == 4  # no cut without need


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_minibatches_keep_groups_whole(count):
    samples = [make_sample([1], [2], group=group) for group in range(6) for _ in range(4)]
    parts = minibatches(samples, count, seed=3)
    assert [len(part) for part in parts] == [24 // count] * count
    groups = [{sample.group for sample in part} for part in parts]
    assert sum(map(len, groups)) == 6
    assert set().union(*groups) == set(range(6))
    assert minibatches(samples, count, seed=3) == parts


@pytest.mark.parametrize("processes", [2, 4])  # 8 groups: parts of two groups from each process, and of one
def test_minibatches_are_the_same_on_any_number_of_processes(processes):
    samples = [make_sample([1], [2], group=group) for group in range(8) for _ in range(2)]
    share = len(samples) // processes
    whole = minibatches(samples, 2, seed=3)
    shares = [minibatches(samples[rank * share :][:share], 2, seed=3) for rank in range(processes)]
    together = [[sample for parts in shares for sample in parts[number]] for number in range(2)]
    assert [[id(sample) for sample in part] for part in together] == [[id(sample) for sample in part] for part in whole]
    assert minibatches(samples, 2, seed=4) != whole


def test_minibatches_reject_an_uneven_cut():
    with pytest.raises(ValueError, match="3 groups cannot be split into 2 minibatches"):
        minibatches([make_sample([1], [2], group=g) for g in range(3)], 2, seed=0)
