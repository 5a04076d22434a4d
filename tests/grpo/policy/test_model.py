"""Hidden states under padding and wrappers, and the head on top of them, against the models' own logits."""

from __future__ import annotations

import copy
import itertools
import time
from datetime import timedelta

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from edge_grpo.config import ModelConfig
from edge_grpo.policy.loading import load_model
from edge_grpo.policy.model import PolicyModel, check_packing, hidden_states, lm_head, unwrap

# One architecture for each form of head: plain, biased attention, soft cap, scale, divisor.
ARCHITECTURES = {
    "Llama": {},
    "Qwen2": {},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 20.0},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request, make_model):
    return make_model(request.param, **ARCHITECTURES[request.param])


def sequences(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, 261, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("side", ["left", "right"])
def test_head_of_hidden_states_gives_each_sequences_own_logits(model, side):
    rows = sequences(9, 4, 1)
    width = max(map(len, rows))
    ids, mask = torch.full((3, width), 0), torch.zeros(3, width, dtype=torch.bool)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, True
    with torch.no_grad():
        logits = lm_head(model).logits(hidden_states(model, ids, mask))
        for index, row in enumerate(rows):
            alone = model(input_ids=row[None]).logits[0]
            torch.testing.assert_close(logits[index][mask[index]], alone, atol=2e-5, rtol=1e-5)


def test_packed_sequences_do_not_see_each_other(model):
    """Their own logits, and gradients that end at their first token: of every architecture."""
    check_packing(model)
    rows = sequences(9, 4, 1, 6)
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    policy = PolicyModel(model)
    hidden = policy(torch.cat(rows)[None], None, None, positions)[0]
    for row, own in zip(rows, hidden.split([len(row) for row in rows]), strict=True):
        alone = model(input_ids=row[None]).logits[0]
        torch.testing.assert_close(lm_head(model).logits(own), alone, atol=2e-5, rtol=1e-5)
    others = torch.cat([sequences(9)[0].flip(0), *rows[1:]])[None]
    with torch.no_grad():
        changed = policy(others, None, None, positions)[0]
    assert torch.equal(changed[9:], hidden[9:])  # to the bit: nothing of the first sequence is in the others
    assert not torch.equal(changed[:9], hidden[:9])


def test_flash_attention_is_told_where_packed_sequences_end(make_model, monkeypatch):
    """It sees lengths only, no mask: of these a stand-in of its name makes what the padded rows give."""
    model, rows, calls = make_model("Qwen2"), sequences(9, 4, 1, 6), []

    def attend(module, query, key, value, attention_mask, *, scaling, is_causal=None, **told):
        calls.append((attention_mask, is_causal, told))
        parts = []
        for start, end in itertools.pairwise(told["cu_seq_lens_q"].tolist()):
            own = (states[:, :, start:end] for states in (query, key, value))
            parts.append(
                nn.functional.scaled_dot_product_attention(*own, is_causal=True, scale=scaling, enable_gqa=True)
            )
        return torch.cat(parts, dim=2).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_stand_in", attend)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "flash_stand_in", flash_attention_mask)
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.stack([torch.arange(9) < len(row) for row in rows])
    expected = hidden_states(model, padded, mask)[mask]
    assert not calls
    model.config._attn_implementation = "flash_stand_in"
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    hidden = PolicyModel(model)(torch.cat(rows)[None], None, None, positions)[0]
    torch.testing.assert_close(hidden, expected, atol=2e-5, rtol=1e-5)
    assert len(calls) == 2  # one for each layer
    for attention_mask, is_causal, told in calls:
        assert attention_mask is None
        assert is_causal in (None, True)
        for side in "qk":
            ends = told[f"cu_seq_lens_{side}"]
            assert ends.dtype == torch.int32  # its kernels take no other
            assert ends.tolist() == [0, 9, 13, 14, 20]
            assert told[f"max_length_{side}"] == 9
            assert isinstance(told[f"max_length_{side}"], int)
        assert torch.equal(told["position_ids"], positions)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),  # convolutions over the row
        ("Mamba", {}),  # a state
        ("Bloom", {"n_head": 4}),  # biases by the place in the row
    ],
)
def test_an_architecture_that_reads_past_a_sequence_is_not_packed(make_model, name, options):
    with pytest.raises(ValueError, match=rf"optim.packing needs a model .* of {name}ForCausalLM with .* attention"):
        check_packing(make_model(name, **options))


def test_attention_needs_no_mask_for_padding_on_the_right(tiny_model, monkeypatch):
    masks = []
    attend = nn.functional.scaled_dot_product_attention

    def recording(*arguments, attn_mask=None, is_causal=False, **options):
        masks.append(attn_mask)
        return attend(*arguments, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", recording)
    ids, mask = torch.ones(2, 5, dtype=torch.long), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    hidden_states(tiny_model, ids, mask)
    assert masks == [None, None]  # one for each layer
    hidden_states(tiny_model, ids, mask.flip(1))
    assert all(found is not None for found in masks[2:])


def test_gradients_do_not_depend_on_wrapping(tiny_model):
    ids, mask = sequences(7)[0][None], torch.ones(1, 7)
    compiled = torch.compile(PolicyModel(copy.deepcopy(tiny_model)), backend="eager")
    gradients = []
    for policy in (tiny_model, PolicyModel(copy.deepcopy(tiny_model)), compiled):
        hidden_states(policy, ids, mask).pow(2).sum().backward()
        gradients.append([p.grad for p in unwrap(policy).parameters()])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


def test_policy_runs_a_function_of_states_and_head_inside_its_forward(tiny_model):
    ids, mask = sequences(5)[0][None], torch.ones(1, 5)
    logits = PolicyModel(tiny_model)(ids, mask, lambda hidden, head: head.logits(hidden))
    torch.testing.assert_close(logits, tiny_model(input_ids=ids).logits)


def test_hidden_states_refuse_a_wrapper_that_would_be_bypassed(tiny_model):
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = tiny_model

    with pytest.raises(TypeError, match=r"wrap PolicyModel\(model\)"):
        hidden_states(Wrapper(), torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2))


def test_unwrap_refuses_what_is_no_model():
    with pytest.raises(TypeError, match="Linear"):
        unwrap(nn.Linear(1, 1))


def _train_on_two_processes(rank: int, folder: str) -> None:
    """Each process backpropagates its own sequence; DDP must leave the mean of both gradients on each."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    model, _ = load_model(ModelConfig(path=folder))
    policy = nn.parallel.DistributedDataParallel(PolicyModel(model))
    ids = sequences(6, 6)[rank][None]
    hidden = hidden_states(policy, ids, torch.ones_like(ids))
    lm_head(policy).logits(hidden).logsumexp(-1).sum().backward()  # the head is used outside of the wrapper's call
    torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/gradient{rank}.pt")
    torch.distributed.barrier()  # neither may leave while the other still talks to it
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_distributed_data_parallel_averages_gradients(saved, tiny_model):
    processes = spawn(_train_on_two_processes, (str(saved),), nprocs=2, join=False)
    assert processes is not None
    try:
        deadline = time.monotonic() + 120
        while not processes.join(timeout=5):
            assert time.monotonic() < deadline, "the two processes did not finish"
    finally:
        for process in processes.processes:
            process.kill()
    for ids in sequences(6, 6):
        loss = tiny_model(input_ids=ids[None]).logits.logsumexp(-1).sum() / 2
        loss.backward()
    expected = {name: p.grad for name, p in tiny_model.named_parameters()}
    for rank in range(2):
        torch.testing.assert_close(torch.load(saved / f"gradient{rank}.pt"), expected, atol=1e-4, rtol=1e-4)
