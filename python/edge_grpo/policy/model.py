"""The policy: loading it, its hidden states, and the output head that turns them into logits.

The logits themselves are not made here: ``edge_kernels`` forms them from hidden states and head, a tile at a time.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.resources
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from edge_grpo.config import ModelConfig

BUILT_IN = {"edge_grpo:tiny": "tiny"}  # name -> folder inside this package
_HAS_GGUF_CONFIG = hasattr(transformers, "GgufConfig")
_ASSISTANT_TEXT = "EDGE"  # any text that a chat template passes through unchanged

T = TypeVar("T")


@dataclass(frozen=True)
class LMHead:
    """The output layer: ``logits = cap(logit_scale * (hidden @ weight.T + bias))``, ``cap(x) = c * tanh(x / c)``."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    softcap: float | None
    logit_scale: float

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of ``hidden`` (..., D), all at once: for a few rows, not for training."""
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class PolicyModel(nn.Module):
    """The policy as a trainer wraps it: calling it returns the last hidden states instead of logits.

    DistributedDataParallel and FSDP do their work in the wrapped module's own ``forward`` (the first arms the gradient
    reduction, the second gathers the weights). Reaching past the wrapper to the base model would skip both, silently:
    each process would train its own model. So the trainer prepares a ``PolicyModel``, and every training forward calls
    the prepared module. The head's weight may be used after the call: its gradient, too, arrives in the same backward.
    Under FSDP the head is gathered during the call only; ``then`` runs there, with the hidden states and the head, and
    its result is returned in place of the hidden states.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, then: Callable[[Tensor, LMHead], T] | None = None
    ) -> Tensor | T:
        hidden = _base_hidden_states(self.model, input_ids, attention_mask)
        return hidden if then is None else then(hidden, lm_head(self.model))


def load_model(config: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model and tokenizer that ``config.path`` names, on the CPU and in evaluation mode.

    The path is a Hub id, a folder written by ``save_pretrained``, a GGUF file (de-quantized), or ``edge_grpo:tiny``.
    The tokenizer has a padding token, padding goes to the left, and both can be saved as an ordinary folder. Raises
    ValueError when there is nothing to load under that name, or when the head of the architecture is of a form that
    ``LMHead`` does not describe.
    """
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    with _resolve(config.path) as (name, gguf_file):
        try:
            tokenizer = _load_tokenizer(name, gguf_file, config)
            model = _load_gguf(name, gguf_file, dtype) if gguf_file else _load_plain(name, dtype)
        except OSError as error:
            raise ValueError(f"model.path={config.path!r} could not be loaded: {error}") from error
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    _check_head(model)
    return model, tokenizer


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer that ``load_model`` would return, without reading the weights where they are elsewhere."""
    with _resolve(config.path) as (name, gguf_file):
        try:
            return _load_tokenizer(name, gguf_file, config)
        except OSError as error:
            raise ValueError(f"model.path={config.path!r} has no tokenizer to load: {error}") from error


def _load_tokenizer(name: str, gguf_file: str | None, config: ModelConfig) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        name, **({"gguf_file": gguf_file} if gguf_file else {})
    )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {config.path!r} has neither a pad nor an eos token; give it one")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass of every layer while in training mode."""
    # The second is its name in earlier releases of transformers 5.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


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
    """Return the output layer of ``model`` (wrapped or not); its weight is the parameter itself, not a copy."""
    inner = unwrap(model)
    layer = inner.get_output_embeddings()
    if layer is None:
        raise ValueError(f"{type(inner).__name__} has no output layer; use a causal language model")
    config = inner.config.get_text_config()
    scale = getattr(config, "logit_scale", None)  # Cohere
    divisor = getattr(config, "logits_scaling", None)  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return LMHead(
        weight=layer.weight,
        bias=getattr(layer, "bias", None),
        softcap=float(softcap) if softcap else None,
        logit_scale=float(scale if scale is not None else 1.0) / float(divisor if divisor is not None else 1.0),
    )


def eos_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return every token id that ends a response, the tokenizer's own first.

    Besides what tokenizer and generation configuration name, that is the special token with which the chat template
    closes an assistant's turn: base models that ship a chat template often name only their end-of-document token.
    """
    configured = unwrap(model).generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, *(configured if isinstance(configured, (list, tuple)) else [configured])]
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "."}, {"role": "assistant", "content": _ASSISTANT_TEXT}]
        rendered = str(tokenizer.apply_chat_template(turn, tokenize=False))
        closing = tokenizer(rendered.rpartition(_ASSISTANT_TEXT)[2], add_special_tokens=False)["input_ids"]
        added = tokenizer.added_tokens_decoder
        ids += [token for token in closing[:1] if token in added and added[token].special]
    unique = tuple(dict.fromkeys(int(token) for token in ids if token is not None))
    if not unique:
        raise ValueError("neither the tokenizer nor the generation configuration names an end-of-sequence token")
    return unique


def weights_fingerprint(model: nn.Module) -> str:
    """Return a hash of the weights as they were loaded: of each saved tensor the name, type, shape and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(unwrap(model).state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _base_hidden_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    mask = attention_mask.long()
    # Without a mask attention takes its fast causal path. With all padding on the right nothing is lost: no real token
    # looks that far ahead.
    right_padded = bool((mask.diff(dim=1) <= 0).all())
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model.get_decoder()(
        input_ids=input_ids,
        attention_mask=None if right_padded else mask,
        position_ids=positions,
        use_cache=False,
    )
    return output.last_hidden_state


@contextmanager
def _resolve(path: str) -> Iterator[tuple[str, str | None]]:
    """Yield the name to give ``from_pretrained`` and, for a GGUF file, the file's name."""
    if path.startswith("edge_grpo:"):
        if path not in BUILT_IN:
            raise ValueError(f"model.path must be one of {', '.join(BUILT_IN)} for a built-in model; got {path!r}")
        packaged = importlib.resources.files("edge_grpo") / BUILT_IN[path]
        if not packaged.is_dir():
            raise ValueError(f"{path!r} is missing from this installation of edge_grpo; reinstall the package")
        with importlib.resources.as_file(packaged) as folder:
            yield str(folder), None
        return
    local = Path(path).expanduser()
    if local.suffix == ".gguf":
        if not local.is_file():
            raise ValueError(f"model.path={path!r} is not a file; `make smollm2` fetches the SmolLM2 of the recipes")
        yield str(local.parent), local.name
    elif local.is_dir():
        if not (local / "config.json").is_file():
            raise ValueError(f"model.path={path!r} is a folder without config.json; name one that was saved whole")
        yield str(local), None
    elif local.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1 or local.exists():
        raise ValueError(f"model.path={path!r} is no folder, no .gguf file and no Hub id; check the spelling")
    else:
        yield path, None


def _load_plain(name: str, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype)


def _load_gguf(folder: str, file_name: str, dtype: torch.dtype) -> PreTrainedModel:
    """Return an ordinary model with the file's weights, de-quantized.

    transformers marks what it reads from GGUF as quantized, refuses to save it, and may graft inference-only kernels
    onto it. So the weights move into a fresh model of the same configuration.
    """
    # Earlier releases de-quantize without being asked, and have no such option.
    options = {"quantization_config": transformers.GgufConfig(dequantize=True)} if _HAS_GGUF_CONFIG else {}
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file_name, dtype=dtype, **options)
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model.eval()


@torch.no_grad()
def _check_head(model: PreTrainedModel) -> None:
    """Require that LMHead reproduces the model's own logits.

    An architecture may do more to its logits than we know of; training would then fit another distribution than the one
    sampled, and nothing else would show it.
    """
    input_ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    mask = torch.ones_like(input_ids)
    expected = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits.float()
    error = (lm_head(model).logits(hidden_states(model, input_ids, mask)).float() - expected).abs().max()
    if not error <= 0.02 * expected.abs().max() + 1e-6:  # NaN fails too; bfloat16 rounds to 0.4 %
        raise ValueError(
            f"{type(model).__name__} computes logits in a way that edge_grpo does not know: its head gives values off "
            f"by {error:.3g}; only linear heads with a scale and a soft cap are supported"
        )
