"""Loading from every kind of source, hidden states under padding and wrappers, and the output head."""

from __future__ import annotations

import copy
import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from paths import ROOT
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from edge_grpo.config import ModelConfig
from edge_grpo.policy.model import LMHead, PolicyModel, eos_token_ids, hidden_states, lm_head, load_model, unwrap

SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
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


@pytest.fixture
def saved(tmp_path, tiny_model, tiny_tokenizer) -> Path:
    tiny_model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    return tmp_path


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


def test_head_reads_softcap_and_scales(make_model):
    heads = {name: lm_head(make_model(name, **options)) for name, options in ARCHITECTURES.items()}
    assert heads["Gemma2"].softcap == 3.0
    assert heads["Cohere"].logit_scale == 0.25
    assert heads["Granite"].logit_scale == 0.25
    assert (heads["Llama"].softcap, heads["Llama"].logit_scale, heads["Llama"].bias) == (None, 1.0, None)


def test_head_logits_by_hand():
    head = LMHead(torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 1.0]), softcap=2.0, logit_scale=0.5)
    expected = 2 * torch.tanh(torch.tensor([[1.5, 3.5]]) / 2)  # (3, 7) * 0.5, capped at 2
    torch.testing.assert_close(head.logits(torch.tensor([[3.0]])), expected)


def test_head_of_a_tied_model_is_the_parameter_itself(make_model):
    tied = make_model(tie_word_embeddings=True)
    assert lm_head(PolicyModel(tied)).weight is tied.get_input_embeddings().weight


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


def test_folder_round_trip(saved, tmp_path, tiny_tokenizer):
    model, tokenizer = load_model(ModelConfig(path=str(saved)))
    again = tmp_path / "again"
    model.save_pretrained(again)
    tokenizer.save_pretrained(again)
    reloaded, retokenizer = load_model(ModelConfig(path=str(again)))
    torch.testing.assert_close(reloaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert retokenizer.chat_template == tiny_tokenizer.chat_template
    assert retokenizer("a<|end|>")["input_ids"] == tiny_tokenizer("a<|end|>")["input_ids"]


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("mixed", torch.float32)],
)
def test_precision_of_parameters(saved, precision, dtype):
    model, _ = load_model(ModelConfig(path=str(saved), precision=precision))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_gradient_checkpointing_gives_the_same_gradient(saved):
    ids = sequences(6)[0][None]
    gradients = []
    for checkpointing in (False, True):
        model, _ = load_model(ModelConfig(path=str(saved), gradient_checkpointing=checkpointing))
        model.train()
        hidden_states(model, ids, torch.ones_like(ids)).pow(2).sum().backward()
        gradients.append([p.grad for p in model.get_decoder().parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_pad_token_falls_back_to_eos(tmp_path, tiny_model, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = None
    tiny_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    _, loaded = load_model(ModelConfig(path=str(tmp_path)))
    assert loaded.pad_token_id == loaded.eos_token_id == 1


def test_eos_ids_join_tokenizer_generation_config_and_chat_template(tiny_model, tiny_tokenizer):
    assert eos_token_ids(tiny_model, tiny_tokenizer) == (1,)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = "<|system|>"  # id 2; the chat template still closes a turn with <|end|>, id 1
    tiny_model.generation_config.eos_token_id = [2, 7]
    assert eos_token_ids(PolicyModel(tiny_model), tokenizer) == (2, 7, 1)


def test_no_eos_is_an_error(tiny_model, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token, tokenizer.chat_template = None, None
    tiny_model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="end-of-sequence"):
        eos_token_ids(tiny_model, tokenizer)


def test_built_in_model_loads():
    model, tokenizer = load_model(ModelConfig())
    assert lm_head(model).weight.shape[0] >= len(tokenizer)
    assert tokenizer.pad_token_id is not None


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("edge_grpo:huge", "edge_grpo:tiny"),
        ("models/missing.gguf", "make smollm2"),
        ("./missing", "no folder"),
        ("one/two/three", "no folder"),
        ("{empty}", "config.json"),
    ],
)
def test_a_path_that_leads_nowhere_says_so(path, message, tmp_path):
    path = path.format(empty=tmp_path)
    with pytest.raises(ValueError, match=message):
        load_model(ModelConfig(path=path))


def test_an_unknown_form_of_head_is_refused(saved, monkeypatch):
    llama = type(load_model(ModelConfig(path=str(saved)))[0])
    forward = llama.forward

    def shifted(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 3
        return output

    monkeypatch.setattr(llama, "forward", shifted)
    with pytest.raises(ValueError, match="in a way that edge_grpo does not know"):
        load_model(ModelConfig(path=str(saved)))


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.skipif(not SMOLLM2.is_file(), reason="SmolLM2 is not there; `make smollm2` fetches it")
def test_gguf_becomes_an_ordinary_model(tmp_path):
    pytest.importorskip("gguf", reason="reading GGUF files needs the gguf package")
    model, tokenizer = load_model(ModelConfig(path=os.path.relpath(SMOLLM2)))
    assert model.config.vocab_size == 49152
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert eos_token_ids(model, tokenizer) == (2,)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reloaded, retokenizer = load_model(ModelConfig(path=str(tmp_path)))
    torch.testing.assert_close(reloaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    chat = [{"role": "user", "content": "What is 12 + 7?"}]
    render = {"add_generation_prompt": True, "return_dict": False}
    assert retokenizer.apply_chat_template(chat, **render) == tokenizer.apply_chat_template(chat, **render)
