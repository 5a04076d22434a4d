"""LoRA in the policy: what is trained, merged, saved and loaded, held against peft itself; what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from edge_grpo.config import ModelConfig, RolloutConfig, TrainConfig, load_config
from edge_grpo.policy import adapters
from edge_grpo.policy.loading import load_model
from edge_grpo.policy.model import PolicyModel, hidden_states, lm_head
from edge_kernels import linear_token_stats, reference

peft = pytest.importorskip("peft", reason="adapters are peft's")

IDS = torch.tensor([[5, 9, 17, 40, 3], [8, 8, 200, 1, 2]])
LORA = {"rank": 4, "targets": "q_proj,down_proj", "alpha": 6}


def shaken(model):
    """Give every adapter weights that matter: fresh ones add nothing."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def load(path, **options):
    return load_model(ModelConfig(path=str(path), **options))[0]


def test_only_adapters_are_trained_and_they_are_float32(saved):
    model = load(saved, lora=LORA, precision="bfloat16")
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    layers = model.config.num_hidden_layers
    assert len(trained) == 2 * 2 * layers  # two factors of two targets
    assert all(".lora_" in name and value.dtype == torch.float32 for name, value in trained.items())
    assert adapters.adds_nothing(model)
    assert not adapters.adds_nothing(shaken(model))
    assert not adapters.adds_nothing(load(saved))


def test_hidden_states_and_gradients_are_those_of_peft(saved):
    ours = shaken(load(saved, lora=LORA))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32), config).eval()
    states = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(states[name.removeprefix("base_model.model.")])
    mask = torch.ones_like(IDS)
    own = PolicyModel(ours)(IDS, mask)
    expected = theirs.base_model.model.model(input_ids=IDS, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(own, expected)
    own.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(states[name.removeprefix("base_model.model.")].grad, parameter.grad, msg=name)


# DoRA's merged weight is not a sum of two; a copy that is trained whole replaces the layer.
@pytest.mark.parametrize("extra", [{}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["up_proj"]}])
def test_merged_weights_make_the_same_model_under_its_own_names(saved, tmp_path, extra):
    file = tmp_path / "lora.json"
    file.write_text(json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "down_proj"], **extra}))
    model = shaken(load(saved, lora={"config": str(file)}))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = load(saved)
    weights = dict(adapters.merged_weights(model))
    assert weights.keys() == plain.state_dict().keys()
    shapes = [(name, value.dtype, value.shape) for name, value in adapters.merged_shapes(model)]
    assert shapes == [(name, value.dtype, value.shape) for name, value in weights.items()]
    plain.load_state_dict(weights)
    mask = torch.ones_like(IDS)
    expected = hidden_states(model, IDS, mask)
    torch.testing.assert_close(hidden_states(plain, IDS, mask), expected, rtol=1e-4, atol=1e-4)
    assert (hidden_states(load(saved), IDS, mask) - expected).abs().max() > 0.1  # else nothing was merged
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_without_adapters_merged_weights_are_the_state_dict(tiny_model):
    weights = dict(adapters.merged_weights(tiny_model))
    assert weights.keys() == tiny_model.state_dict().keys()
    assert all(weights[name].data_ptr() == value.data_ptr() for name, value in tiny_model.state_dict().items())


def test_disabled_adapters_leave_the_base_model(saved):
    model, mask = shaken(load(saved, lora=LORA)), torch.ones_like(IDS)
    with torch.no_grad():
        adapted = hidden_states(model, IDS, mask)
        with adapters.disabled(model):
            base = hidden_states(model, IDS, mask)
        torch.testing.assert_close(base, hidden_states(load(saved), IDS, mask), rtol=0, atol=0)
        torch.testing.assert_close(hidden_states(model, IDS, mask), adapted, rtol=0, atol=0)
    assert all(value.requires_grad == (".lora_" in name) for name, value in model.named_parameters())


def test_a_saved_adapter_is_peft_s_and_loads_here_and_there(saved, tmp_path):
    model, tokenizer = load_model(ModelConfig(path=str(saved), lora=LORA))
    shaken(model)
    folder = tmp_path / "adapter"
    adapters.save_lora(model, dict(adapters.lora_weights(model)), folder)
    tokenizer.save_pretrained(folder)
    assert not (folder / "model.safetensors").exists()
    mask = torch.ones_like(IDS)
    expected = hidden_states(model, IDS, mask)

    again = load(folder)
    torch.testing.assert_close(hidden_states(again, IDS, mask), expected, rtol=0, atol=0)
    assert sum(value.requires_grad for value in again.parameters()) == sum(
        value.requires_grad for value in model.parameters()
    )
    base = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    found = theirs.base_model.model.model(input_ids=IDS, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found, expected)


def test_an_adapter_of_the_built_in_model_finds_its_base(tmp_path):
    model, tokenizer = load_model(ModelConfig(lora={"rank": 2}))
    adapters.save_lora(model, dict(adapters.lora_weights(shaken(model))), tmp_path)
    assert adapters.base_of(tmp_path) == "edge_grpo:tiny"
    again, retokenizer = load_model(ModelConfig(path=str(tmp_path)))
    mask = torch.ones_like(IDS)
    torch.testing.assert_close(hidden_states(again, IDS, mask), hidden_states(model, IDS, mask), rtol=0, atol=0)
    assert retokenizer.get_vocab() == tokenizer.get_vocab()  # the base model's, since the folder holds none


def test_equal_seeds_give_equal_adapters(saved):
    def fresh():
        torch.manual_seed(7)
        return dict(load(saved, lora=LORA).named_parameters())

    torch.testing.assert_close(fresh(), fresh(), rtol=0, atol=0)


# ---- What is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": {"rnk": 4}}, "lora takes rank, alpha, targets, dropout, config; got 'rnk'; did you mean rank"),
        ({"lora": {"rank": 0}}, "lora.rank must be a whole number of at least 1; got 0"),
        ({"lora": {"alpha": 4}}, "lora.rank must be a whole number of at least 1; got None"),
        ({"lora": {"rank": 4, "alpha": 0}}, "lora.alpha must be a number > 0; got 0"),
        ({"lora": {"rank": 4, "dropout": 1.0}}, r"lora.dropout must lie in \[0, 1\); got 1.0"),
        ({"lora": {"rank": 4, "config": "x"}}, "lora.config holds the whole configuration; leave out rank"),
        ({"load_in_4bit": True}, "only adapters can be trained; set lora.rank"),
    ],
)
def test_settings_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**options)


def test_4_bit_weights_are_not_for_vllm():
    with pytest.raises(ValueError, match=r"model\.load_in_4bit and rollout\.engine = vllm cannot be combined"):
        TrainConfig(model=ModelConfig(lora=LORA, load_in_4bit=True), rollout=RolloutConfig(engine="vllm"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a peft configuration"),
        ("{}", "is not a peft configuration"),
        ('{"peft_type": "IA3", "target_modules": ["q_proj"]}', "describes IA3; only LORA is supported"),
        ('{"peft_type": "LORA", "target_modules": ["nothing"]}', "cannot be put into .*nothing"),
        ('{"peft_type": "LORA", "megatron_config": {}, "megatron_core": "antigravity"}', "has a megatron_config"),
    ],
)
def test_peft_configurations_that_are_refused(saved, tmp_path, content, message):
    file = tmp_path / "lora.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=message):
        load(saved, lora={"config": str(file)})


def test_an_adapter_on_an_adapter_is_refused(saved, tmp_path):
    folder = tmp_path / "adapter"
    model = load(saved, lora=LORA)
    adapters.save_lora(model, dict(adapters.lora_weights(model)), folder)
    with pytest.raises(ValueError, match="carries an adapter, which is trained further"):
        load(folder, lora=LORA)


@pytest.mark.parametrize("text", ["{}", "not json", "[]"])
def test_an_adapter_without_a_base_is_refused(tmp_path, text):
    (tmp_path / adapters.CONFIG_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json (does not name|cannot be read)"):
        load(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_4_bit_weights_are_refused_on_a_cpu(saved):
    with pytest.raises(ValueError, match=r"model\.load_in_4bit needs a CUDA GPU, and there is none; model\.lora alone"):
        load(saved, lora=LORA, load_in_4bit=True)


def test_missing_peft_is_a_sentence(saved, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"needs peft, which is missing; install it with `pip install .*\[lora\]"):
        load(saved, lora=LORA)


def test_settings_on_the_command_line():
    config = load_config(overrides=["model.lora.rank=16", "model.lora.targets=q_proj,v_proj", "model.lora.dropout=0.1"])
    assert config.model.lora == {"rank": 16, "targets": "q_proj,v_proj", "dropout": 0.1}


# ---- An adapter on the output layer --------------------------------------------------------------------------------

HEAD_LORA = {"rank": 4, "targets": "q_proj,lm_head"}


@pytest.mark.parametrize("tied", [False, True])
def test_the_gradient_of_an_adapter_on_the_head_is_that_of_the_whole_logits(make_model, tiny_tokenizer, tmp_path, tied):
    make_model(tie_word_embeddings=tied).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model = shaken(load(tmp_path, lora=HEAD_LORA))
    mask = torch.ones_like(IDS)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert any("lm_head.lora_B" in name for name in trained)

    def stats(hidden, head):
        low_rank = head.low_rank(hidden[:, :-1])
        return linear_token_stats(hidden[:, :-1], head.weight, IDS[:, 1:], head.bias, low_rank=low_rank).logprobs

    fused = PolicyModel(model)(IDS, mask, stats)
    logits = model(input_ids=IDS, attention_mask=mask, use_cache=False).logits[:, :-1]
    whole = reference.token_stats(logits, IDS[:, 1:]).logprobs
    torch.testing.assert_close(fused, whole)
    weights = torch.arange(1.0, 9).view_as(whole)
    expected = torch.autograd.grad((whole * weights).sum(), list(trained.values()))
    got = torch.autograd.grad((fused * weights).sum(), list(trained.values()))
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))

    with adapters.disabled(model):
        assert lm_head(model).low_rank(torch.ones(1, 32)) is None
    assert "lm_head.weight" in dict(adapters.merged_weights(model))


def test_an_adapter_on_the_head_that_is_not_plain_is_refused(saved, tmp_path):
    file = tmp_path / "lora.json"
    file.write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["lm_head"], "use_dora": True}))
    with pytest.raises(ValueError, match=r"carries an adapter \(Linear\) that is not plain LoRA"):
        load(saved, lora={"config": str(file)})
