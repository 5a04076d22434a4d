"""A model's output head: one record of its weight, bias, adapter, scale and soft cap; it refuses what it cannot read.

The base model under it is ``policy.model``; ``edge_kernels`` takes the weight and the bias that the record reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class LMHead:
    """The output layer: ``logits = cap(logit_scale * (hidden @ weight.T + bias))``, ``cap(x) = c * tanh(x / c)``.

    With an adapter (LoRA), ``states @ factor.T`` of ``low_rank(hidden)`` is added to the product.

    The record holds the layer, not its tensors: a trainer that shards parameters puts whole ones in place for a while
    (FSDP2: during the forward of the unit that shards them), so weight and bias are read where they are used. Both are
    the parameters themselves, not copies, and receive gradient.
    """

    layer: nn.Linear
    is_tied: bool  # whether the weight is the input embedding's
    softcap: float | None = None
    logit_scale: float = 1.0
    adapter: Any = None  # peft's LoRA layer around the output layer, where one is active

    @classmethod
    def of(cls, model: PreTrainedModel) -> LMHead:
        """Return the output head of ``model``.

        Raises ValueError where there is none, and where its logits are not those of one weight: a layer that is not
        linear, an adapter other than plain LoRA, a quantized weight.
        """
        layer = model.get_output_embeddings()
        if layer is None:
            raise ValueError(f"{type(model).__name__} has no output layer; use a causal language model")
        embedding = model.get_input_embeddings()
        config = model.config.get_text_config()
        scale = getattr(config, "logit_scale", None)  # Cohere
        divisor = getattr(config, "logits_scaling", None)  # Granite
        softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
        adapter = layer if _is_plain_lora(layer) else None
        layer = _linear(layer if adapter is None else layer.get_base_layer())
        return cls(
            layer=layer,
            is_tied=embedding is not None and getattr(embedding, "weight", None) is layer.weight,
            softcap=float(softcap) if softcap else None,
            logit_scale=float(scale if scale is not None else 1.0) / float(divisor if divisor is not None else 1.0),
            adapter=None if adapter is None or adapter.disable_adapters or adapter.merged else adapter,
        )

    @property
    def weight(self) -> Tensor:
        """The weight (V, D). Raises ValueError where this process holds a shard of it."""
        weight = self.layer.weight
        if isinstance(weight, DTensor):
            found = f"a DTensor placed as {weight.placements} over {weight.device_mesh}"
        elif weight.dim() != 2:  # FSDP1 flattens parameters, ZeRO-3 empties them
            found = f"of shape {tuple(weight.shape)}"
        else:
            return weight
        unit = "the input embedding, whose weight it is," if self.is_tied else "the output layer"
        raise ValueError(
            f"the output head's weight is sharded here: it is {found}; read it inside PolicyModel's forward (its "
            f"argument `then`) and leave {unit} in the outermost FSDP unit; gathering it with full_tensor() would give "
            "a wrong gradient"
        )

    @property
    def bias(self) -> Tensor | None:
        """The bias (V,), or None."""
        return self.layer.bias

    def low_rank(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return an adapter's states (..., r) of ``hidden`` (..., D) and its factor (V, r); None where there is none.

        Gradient flows to both of the adapter's matrices. With several active adapters r is the sum of their ranks.
        """
        if self.adapter is None:
            return None
        states, factors = [], []
        for name in self.adapter.active_adapters:
            if name in self.adapter.lora_A:
                down, up = self.adapter.lora_A[name], self.adapter.lora_B[name]
                dropped = self.adapter.lora_dropout[name](hidden.to(down.weight.dtype))
                states.append(down(dropped) * self.adapter.scaling[name])
                factors.append(up.weight)
        return torch.cat(states, dim=-1), torch.cat(factors, dim=1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of ``hidden`` (..., D), all at once: for a few rows, not for training."""
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        if (low_rank := self.low_rank(hidden)) is not None:
            logits = logits + nn.functional.linear(*low_rank).to(logits.dtype)
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def _is_plain_lora(layer: Any) -> bool:
    """Whether ``layer`` is peft's LoRA around another one, and adds a product of two matrices to its output."""
    if not isinstance(getattr(layer, "lora_A", None), nn.ModuleDict) or not hasattr(layer, "lora_variant"):
        return False
    return not layer.lora_variant and all(up.bias is None for up in layer.lora_B.values()) and bool(layer.lora_B)


def _linear(layer: Any) -> nn.Linear:
    """Return the linear layer whose weight makes the logits, or raise ValueError with what was found instead."""
    copies = getattr(layer, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):  # peft: a copy that is trained whole, or the original while it is disabled
        active = [name for name in layer.active_adapters if name in copies and not layer.disable_adapters]
        layer = copies[active[0]] if active else layer.original_module
    name = type(layer).__name__
    if hasattr(layer, "base_layer"):  # peft: every kind of adapter has it
        raise ValueError(
            f"the output layer carries an adapter ({name}) that is not plain LoRA, which fused losses would leave out "
            "and never train; leave it out of target_modules (exclude_modules=['lm_head']), or train all of it "
            "(modules_to_save=['lm_head'])"
        )
    weight = getattr(layer, "weight", None)
    if not isinstance(layer, nn.Linear) or not isinstance(weight, Tensor):
        raise ValueError(
            f"the output layer must be linear with one weight; got {name}; only linear heads with a scale and a soft "
            "cap are supported"
        )
    is_plain = type(weight) in (Tensor, nn.Parameter) or isinstance(weight, DTensor)
    if not is_plain or weight.dtype.itemsize == 1:  # by a class of its own, or as integers or 8-bit floats
        raise ValueError(
            f"the output layer's weight is quantized: {name} holds a {type(weight).__name__} of {weight.dtype}; leave "
            "the output layer out of the quantization (llm_int8_skip_modules or modules_to_not_convert: ['lm_head'])"
        )
    return layer
