"""Loading the policy and its tokenizer: from the Hub, a folder, a GGUF file, or the package itself.

What the loaded model computes is ``policy.model``; which tokens end a response is decided here, where both are known.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.resources
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from edge_grpo.config import ModelConfig
from edge_grpo.policy.model import check_head, enable_checkpointing, unwrap

BUILT_IN = {"edge_grpo:tiny": "tiny"}  # name -> folder inside this package
_HAS_GGUF_CONFIG = hasattr(transformers, "GgufConfig")
_ASSISTANT_TEXT = "EDGE"  # any text that a chat template passes through unchanged


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
    check_head(model)
    return model, tokenizer


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer that ``load_model`` would return, without reading the weights where they are elsewhere."""
    with _resolve(config.path) as (name, gguf_file):
        try:
            return _load_tokenizer(name, gguf_file, config)
        except OSError as error:
            raise ValueError(f"model.path={config.path!r} has no tokenizer to load: {error}") from error


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


def _load_tokenizer(name: str, gguf_file: str | None, config: ModelConfig) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        name, trust_remote_code=False, **({"gguf_file": gguf_file} if gguf_file else {})
    )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {config.path!r} has neither a pad nor an eos token; give it one")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


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
        raise ValueError(f"model.path={path!r} is not a folder, a .gguf file or a Hub id; check the spelling")
    else:
        yield path, None


def _load_plain(name: str, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False)


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
