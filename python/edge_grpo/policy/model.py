"""The policy as a trainer calls it: a forward that returns hidden states instead of logits, under any wrapper.

Logits are not computed here: ``edge_kernels`` forms them from hidden states and the output head (``policy.head``), one
tile at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edge_grpo.policy.head import LMHead
from edge_kernels import cumulative_lengths

T = TypeVar("T")


class PolicyModel(nn.Module):
    """The policy as a trainer wraps it: calling it returns the last hidden states instead of logits.

    DistributedDataParallel and FSDP do their work in the wrapped module's own ``forward`` (the first prepares the
    gradient reduction, the second gathers the weights). Calling the base model directly would skip both without an
    error: each process would train its own model. So the trainer prepares a ``PolicyModel``, and every training forward
    calls the prepared module. Under DistributedDataParallel the head's weight may also be used after the call. Under
    FSDP it is gathered during the call only; ``then`` runs there, with the hidden states and the head, and its result
    is returned in place of the hidden states.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    @property
    def _no_split_modules(self) -> list[str]:
        """The classes of the layers, for what shards by them (accelerate, ``sharding``)."""
        return sorted(self.model._no_split_modules or ())

    base_model_prefix = "decoder"  # where accelerate looks for the final norm

    @property
    def decoder(self) -> nn.Module:
        return self.model.get_decoder()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.get_output_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        then: Callable[[Tensor, LMHead], T] | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor | T:
        hidden = _base_hidden_states(self.model, input_ids, attention_mask, position_ids)
        return hidden if then is None else then(hidden, lm_head(self.model))


def unwrap(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside any nesting of PolicyModel, accelerate, DDP and torch.compile wrappers."""
    inner: object = model
    while not isinstance(inner, PreTrainedModel):
        for attribute in ("_orig_mod", "module", "model"):
            if isinstance(getattr(inner, attribute, None), nn.Module):
                inner = getattr(inner, attribute)
                break
        else:
            raise TypeError(f"model must be or wrap a transformers PreTrainedModel; got {type(model).__name__}")
    return inner


def hidden_states(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the base model's last hidden states (B, L, D), after its final norm; no logits are formed.

    ``model`` is a transformers model, a PolicyModel, or a wrapped PolicyModel, which is then called as a whole.
    ``input_ids`` and ``attention_mask`` (nonzero at real tokens) are (B, L), padded on either side. Values at padding
    are undefined. Gradient flows to the parameters.
    """
    if isinstance(model, PreTrainedModel):
        return _base_hidden_states(model, input_ids, attention_mask)
    if not any(isinstance(module, PolicyModel) for module in model.modules()):
        raise TypeError(
            f"model must be a transformers model or wrap a PolicyModel; got {type(model).__name__} around "
            f"{type(unwrap(model)).__name__}; wrap PolicyModel(model) instead, whose forward returns hidden states"
        )
    return model(input_ids, attention_mask)


def lm_head(model: nn.Module) -> LMHead:
    """Return the output head of ``model``, wrapped or not."""
    return LMHead.of(unwrap(model))


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Raise ValueError unless LMHead reproduces the logits that ``model``, wrapped or not, computes itself.

    An architecture may apply more to its logits than LMHead knows; training would then fit a distribution other than
    the one sampled, and nothing else would show it.
    """
    inner = unwrap(model)
    input_ids = torch.arange(4, device=inner.device)[None] % inner.config.get_text_config().vocab_size
    mask = torch.ones_like(input_ids)
    expected = inner(input_ids=input_ids, attention_mask=mask, use_cache=False).logits.float()
    head = lm_head(inner)
    hidden = hidden_states(inner, input_ids, mask).to(head.weight.dtype)  # a head may be kept in float32
    error = (head.logits(hidden).float() - expected).abs().max()
    if not error <= 0.02 * expected.abs().max() + 1e-6:  # NaN fails too; bfloat16 rounds to 0.4 %
        raise ValueError(
            f"{type(inner).__name__} computes logits in a way that edge_grpo does not know: its head gives values off "
            f"by {error:.3g}; only linear heads with a scale and a soft cap are supported"
        )


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Raise ValueError unless sequences packed into one row have the hidden states that each has alone.

    Of architectures with a state (linear attention, Mamba), convolutions over tokens, or positions of their own, some
    carry it over from one sequence to the next, and nothing else would show it.
    """
    inner = unwrap(model)
    was_training = inner.training
    inner.eval()
    vocab = inner.config.get_text_config().vocab_size
    lengths = (5, 1, 9, 4)  # of several lengths, one of a single token
    parts = [(torch.arange(n, device=inner.device)[None] * 7 + 11 * n) % vocab for n in lengths]
    alone = torch.cat([_base_hidden_states(inner, part, torch.ones_like(part)) for part in parts], dim=1)
    position_ids = torch.cat([torch.arange(n, device=inner.device) for n in lengths])[None]
    packed = _base_hidden_states(inner, torch.cat(parts, dim=1), None, position_ids)
    inner.train(was_training)
    error, scale = (packed - alone).abs().max().float(), alone.abs().max().float()
    tolerance = 1e-4 if packed.dtype == torch.float32 else 0.02  # bfloat16 rounds to 0.4 %
    if not error <= tolerance * scale:  # NaN fails too
        raise ValueError(
            f"optim.packing needs a model whose sequences, packed into one row, do not see each other; of "
            f"{type(inner).__name__} with {inner.config._attn_implementation} attention the hidden states are off by "
            f"{float(error / scale):.3g} of their largest; set optim.packing=false"
        )


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass of every layer while in training mode."""
    # The second is its name in earlier releases of transformers 5.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _base_hidden_states(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None
) -> Tensor:
    """Return the last hidden states of padded sequences, or, with their positions, of sequences packed into one row."""
    if position_ids is not None or attention_mask is None:
        assert position_ids is not None, "a row without attention_mask is packed"
        options = _varlen_options(model, position_ids)
    else:
        mask = attention_mask.long()
        # Without a mask attention takes its fast causal path. With all padding on the right nothing is lost: no real
        # token looks that far ahead. Positions go on there: transformers takes one that does not for the start of a
        # packed sequence, and makes a mask.
        if bool((mask.diff(dim=1) <= 0).all()):
            positions = torch.arange(mask.shape[1], device=mask.device)[None].expand_as(mask)
            options = {"attention_mask": None, "position_ids": positions}
        else:
            options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    return model.get_decoder()(input_ids=input_ids, use_cache=False, **options).last_hidden_state


def _varlen_options(model: PreTrainedModel, position_ids: Tensor) -> dict[str, Any]:
    """Return the arguments that keep packed sequences apart.

    transformers makes a block-diagonal mask of positions that start again; FlashAttention wants cumulative lengths.
    """
    options: dict[str, Any] = {"attention_mask": None, "position_ids": position_ids}
    if "flash" in str(model.config._attn_implementation):
        cu_seqlens = cumulative_lengths(position_ids)
        longest = int(cu_seqlens.diff().max())
        options |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
        options |= {"max_length_q": longest, "max_length_k": longest}
    return options
