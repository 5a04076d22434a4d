"""The output head's record: what it reads off a model, its logits by hand, and the heads that it refuses."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from edge_grpo.policy.head import LMHead
from edge_grpo.policy.model import PolicyModel, check_head, lm_head


def test_head_reads_softcap_and_scales(make_model):
    gemma = {"head_dim": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 20.0}
    options = {"Gemma2": gemma, "Cohere": {"logit_scale": 0.25}, "Granite": {"logits_scaling": 4.0}, "Llama": {}}
    heads = {name: lm_head(make_model(name, **options[name])) for name in options}
    assert heads["Gemma2"].softcap == 3.0
    assert heads["Cohere"].logit_scale == 0.25
    assert heads["Granite"].logit_scale == 0.25
    assert (heads["Llama"].softcap, heads["Llama"].logit_scale, heads["Llama"].bias) == (None, 1.0, None)


def test_head_logits_by_hand():
    layer = nn.Linear(1, 2)
    layer.weight.data, layer.bias.data = torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 1.0])
    head = LMHead(layer, is_tied=False, softcap=2.0, logit_scale=0.5)
    expected = 2 * torch.tanh(torch.tensor([[1.5, 3.5]]) / 2)  # (3, 7) * 0.5, capped at 2
    torch.testing.assert_close(head.logits(torch.tensor([[3.0]])), expected)


def test_head_of_a_tied_model_is_the_parameter_itself(make_model):
    tied = make_model(tie_word_embeddings=True)
    head = lm_head(PolicyModel(tied))
    assert head.weight is tied.get_input_embeddings().weight
    assert head.is_tied
    assert not lm_head(make_model()).is_tied


def test_head_with_a_bias(make_model):
    model = make_model("Phi")
    head = lm_head(model)
    assert head.bias is model.lm_head.bias
    nn.init.normal_(head.bias)
    check_head(model)


# ---- Heads that are refused ----------------------------------------------------------------------------------------


class LoraLinear(nn.Module):
    """What peft puts in a target's place: the frozen layer, and two low-rank factors beside it."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base_layer(hidden) + self.lora_B(self.lora_A(hidden))


class ModulesToSave(nn.Module):
    """What peft puts in the place of a module that is trained as a whole: a copy of it for each adapter."""

    def __init__(self, original_module: nn.Linear) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(original_module)})
        self.active_adapters = ["default"]
        self.disable_adapters = False

    def forward(self, hidden: Tensor) -> Tensor:
        chosen = self.original_module if self.disable_adapters else self.modules_to_save[self.active_adapters[0]]
        return chosen(hidden)


class Bottleneck(nn.Sequential):
    """A head of two layers, with a weight that a reader might take for the whole."""

    @property
    def weight(self) -> Tensor:
        return self[1].weight


def with_head(model: PreTrainedModel, layer: nn.Module) -> PreTrainedModel:
    model.set_output_embeddings(layer)
    return model


def test_an_adapter_on_the_head_is_refused(tiny_model):
    adapted = with_head(tiny_model, LoraLinear(tiny_model.lm_head))
    with pytest.raises(ValueError, match=r"carries an adapter \(LoraLinear\).*exclude_modules=\['lm_head'\]"):
        lm_head(PolicyModel(adapted))


def test_a_head_that_peft_trains_as_a_whole_is_read_where_the_logits_are_made(tiny_model):
    wrapper = ModulesToSave(tiny_model.lm_head)
    model = with_head(tiny_model, wrapper)
    with torch.no_grad():
        wrapper.modules_to_save["default"].weight.mul_(2)
    assert lm_head(model).weight is wrapper.modules_to_save["default"].weight
    check_head(model)
    wrapper.disable_adapters = True
    assert lm_head(model).weight is wrapper.original_module.weight
    check_head(model)


def test_a_head_that_is_not_linear_is_refused(tiny_model):
    layers = Bottleneck(nn.Linear(32, 8), nn.Linear(8, 261))
    with pytest.raises(ValueError, match="must be linear with one weight; got Bottleneck"):
        lm_head(with_head(tiny_model, layers))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_quantized_head_is_refused(tiny_model, dtype):
    quantized = nn.Parameter(tiny_model.lm_head.weight.detach().to(dtype), requires_grad=False)
    tiny_model.lm_head.weight = quantized
    with pytest.raises(ValueError, match=rf"weight is quantized: Linear holds a Parameter of {dtype}; leave"):
        lm_head(tiny_model)


def test_a_weight_of_a_class_of_its_own_is_refused(tiny_model):
    """As torchao quantizes: the dtype shown is that of the values which the class computes."""

    class PackedTensor(Tensor):
        pass

    packed = tiny_model.lm_head.weight.detach().as_subclass(PackedTensor)
    tiny_model.lm_head.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match=r"weight is quantized: Linear holds a PackedTensor of torch\.float32"):
        lm_head(tiny_model)


def test_a_model_without_a_head_is_refused(tiny_model):
    with pytest.raises(ValueError, match="LlamaModel has no output layer; use a causal language model"):
        lm_head(tiny_model.model)


@pytest.fixture
def mesh(tmp_path) -> Iterator[DeviceMesh]:
    """A mesh of this process alone: its shards are whole, and yet DTensors."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_sharded_head_is_read_inside_the_forward_alone(mesh, tiny_model):
    ids, mask = torch.arange(5, 12)[None], torch.ones(1, 7)
    expected = tiny_model(input_ids=ids).logits
    policy = fully_shard(PolicyModel(tiny_model), mesh=mesh)
    with pytest.raises(ValueError, match=r"sharded here: it is a DTensor .* leave the output layer in the outermost"):
        lm_head(policy).weight  # noqa: B018
    logits = policy(ids, mask, lambda hidden, head: head.logits(hidden))
    torch.testing.assert_close(logits, expected)
    logits.logsumexp(-1).sum().backward()
    assert isinstance(tiny_model.lm_head.weight.grad, DTensor)


def test_a_head_sharded_apart_from_the_rest_is_refused(mesh, tiny_model):
    fully_shard(tiny_model.lm_head, mesh=mesh)
    policy = fully_shard(PolicyModel(tiny_model), mesh=mesh)
    with pytest.raises(ValueError, match=r"sharded here: .*full_tensor\(\) would give a wrong gradient"):
        policy(torch.arange(5, 12)[None], torch.ones(1, 7), lambda hidden, head: head.logits(hidden))


def test_a_tied_heads_remedy_names_the_embedding(mesh, make_model):
    policy = fully_shard(PolicyModel(make_model(tie_word_embeddings=True)), mesh=mesh)
    with pytest.raises(ValueError, match="leave the input embedding, whose weight it is, in the outermost FSDP unit"):
        lm_head(policy).weight  # noqa: B018


def test_a_flattened_weight_is_refused(tiny_model):
    """As FSDP1 leaves it outside its forward, and ZeRO-3, whose parameters are then empty."""
    tiny_model.lm_head.weight = nn.Parameter(torch.zeros(0))
    with pytest.raises(ValueError, match=r"sharded here: it is of shape \(0,\)"):
        lm_head(tiny_model).weight  # noqa: B018
