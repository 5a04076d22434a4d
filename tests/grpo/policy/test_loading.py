"""Loading from every kind of source, what a loaded model and tokenizer can do, and what cannot be loaded."""

from __future__ import annotations

import copy
import os
import shutil

import pytest
import torch
from paths import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from edge_grpo.commands.main import is_deliberate
from edge_grpo.config import ModelConfig
from edge_grpo.policy.loading import eos_token_ids, load_model
from edge_grpo.policy.model import PolicyModel, hidden_states, lm_head

SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


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
    ids = torch.randint(5, 261, (1, 6), generator=torch.Generator().manual_seed(1))
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
        ("./missing", "is not a folder"),
        ("one/two/three", "is not a folder"),
        ("{empty}", "config.json"),
    ],
)
def test_a_path_that_leads_nowhere_says_so(path, message, tmp_path):
    path = path.format(empty=tmp_path)
    with pytest.raises(ValueError, match=message):
        load_model(ModelConfig(path=path))


def lose(name):
    return lambda folder: (folder / name).unlink()


def overwrite(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def change_weights(change):
    def spoil(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def cut(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def lose_tokenizer(folder):
    for file in [*folder.glob("token*"), *folder.glob("chat*")]:
        file.unlink()


def shrink(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(100)
    model.save_pretrained(folder)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lose_tokenizer, r"holds no tokenizer; save the model's own there with tokenizer\.save_pretrained"),
        (overwrite("tokenizer.json", b"{"), r"the tokenizer could not be loaded \(JSONDecodeError"),
        (overwrite("config.json", b"{"), "not a valid JSON file"),
        (cut, r"the model could not be loaded \(SafetensorError: .*; check the spelling, or fetch the files again"),
        (overwrite("model.safetensors", b"weights"), r"the model could not be loaded \(SafetensorError"),
        (lose("model.safetensors"), r"the model could not be loaded \(OSError: .*no file named model\.safetensors"),
        (change_weights(lambda w: w.pop(NORM)), r"the weights model\.norm\.weight are not in its files"),
        (change_weights(lambda w: w[NORM].fill_(torch.nan)), r"the weights model\.norm\.weight are not finite"),
        (change_weights(lambda w: w[NORM].resize_(3)), r"the model could not be loaded \(RuntimeError"),
        (shrink, r"the token 'Ń' with id 260, but the model has embeddings for the ids below 100; use"),
    ],
)
def test_a_damaged_model_is_a_sentence(saved, tmp_path, spoil, message):
    folder = shutil.copytree(saved, tmp_path / "model")
    spoil(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(ModelConfig(path=str(folder)))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert is_deliberate(caught.value)


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
