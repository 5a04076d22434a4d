"""Loading the policy and its tokenizer: from the Hub, a folder, a GGUF file, or the package itself.

What the loaded model computes is ``policy.model``; which tokens end a response is decided here, where both are known.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.resources
import importlib.util
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from edge_grpo.config import ModelConfig
from edge_grpo.policy.adapters import CONFIG_FILE, add_lora, base_of, load_lora
from edge_grpo.policy.chat import Chat
from edge_grpo.policy.hub import cached_if_unreachable
from edge_grpo.policy.model import check_head, enable_checkpointing, unwrap
from edge_grpo.policy.sharding import is_empty, whole

BUILT_IN = {"edge_grpo:tiny": "tiny"}  # name -> folder inside this package
_HAS_GGUF_CONFIG = hasattr(transformers, "GgufConfig")


def load_model(config: ModelConfig, *, empty: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model and tokenizer that ``config.path`` names, on the CPU and in evaluation mode.

    With ``empty`` no weights are read: they are on the meta device, for ``sharding.shard`` to bring. A GGUF file is
    read in any case.

    The path is a Hub id, a folder written by ``save_pretrained``, a GGUF file (de-quantized), ``edge_grpo:tiny``, or
    the folder of an adapter, whose base model is loaded under it. With ``config.lora`` fresh adapters are put in. Where
    there are adapters, all else is frozen.
    The tokenizer has a padding token, padding goes to the left, and both can be saved as an ordinary folder. Raises
    ValueError when there is nothing to load under that name, when weights are missing, damaged or not finite, when the
    tokenizer has more tokens than the model, or when the head of the architecture is of a form that ``LMHead`` does
    not describe.
    """
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    adapter = _adapter_folder(config)
    base = config if adapter is None else replace(config, path=base_of(adapter))
    with _resolve(base.path) as (name, gguf_file):
        tokenizer = load_tokenizer(config)
        with _said_of(base, "the model"):
            if gguf_file:
                model, missing = _load_gguf(name, gguf_file, dtype)
            else:
                options = {"device_map": "meta"} if empty else _quantization(config)
                model, missing = _load_plain(name, dtype, options)
    if adapter is not None:
        with _said_of(config, "the adapter"):
            load_lora(model, adapter)
    _check_weights(config, model, missing)
    _check_vocabulary(config, model, tokenizer)
    if config.lora:
        add_lora(model, config.lora, base=config.path)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    if not is_empty(model):
        check_head(model)
    return model, tokenizer


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer that ``load_model`` would return, without reading the weights where they are elsewhere."""
    adapter = _adapter_folder(config)
    if adapter is not None:
        if any(map(_is_of_tokenizer, adapter.iterdir())):
            return _load_tokenizer(str(adapter), None, config)
        return load_tokenizer(replace(config, path=base_of(adapter)))
    with _resolve(config.path) as (name, gguf_file):
        return _load_tokenizer(name, gguf_file, config)


def eos_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return every token id that ends a response, the tokenizer's own first.

    Besides what tokenizer and generation configuration name, that is the special token with which the chat template
    closes an assistant's turn: base models that ship a chat template often name only their end-of-document token.
    """
    return ending_token_ids(tokenizer, unwrap(model).generation_config)


def ending_token_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> tuple[int, ...]:
    """Return what ``eos_token_ids`` does where there is no model, but its generation configuration or not even that."""
    configured = None if generation_config is None else generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, *(configured if isinstance(configured, (list, tuple)) else [configured])]
    ids += _closing_token_ids(tokenizer)
    unique = tuple(dict.fromkeys(int(token) for token in ids if token is not None))
    if not unique:
        raise ValueError("neither the tokenizer nor the generation configuration names an end-of-sequence token")
    return unique


def _closing_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens with which the tokenizer's chat templates close an assistant's turn."""
    templates = tokenizer.chat_template
    ids = []
    for name in templates if isinstance(templates, dict) else [None] if templates else []:
        try:
            closing = Chat(tokenizer, {} if name is None else {"chat_template": name}).closing()
        except ValueError:
            continue  # said where it is used
        first = tokenizer.encode(closing, add_special_tokens=False)[:1]
        added = tokenizer.added_tokens_decoder
        ids += [int(token) for token in first if token in added and added[token].special]
    return ids


def weights_fingerprint(model: nn.Module) -> str:
    """Return a hash of the weights as they were loaded: of each saved tensor the name, type, shape and bytes.

    All processes call it for weights that are split over them.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, own in sorted(unwrap(model).state_dict().items()):
        tensor = whole(own)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _load_tokenizer(name: str, gguf_file: str | None, config: ModelConfig) -> PreTrainedTokenizerBase:
    options = {"gguf_file": gguf_file} if gguf_file else {}
    if Path(name).is_dir() and not gguf_file and not any(map(_is_of_tokenizer, Path(name).iterdir())):
        raise ValueError(
            f"model.path={config.path!r} holds no tokenizer; save the model's own there with tokenizer.save_pretrained"
        )
    with _said_of(config, "the tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
    if tokenizer.pad_token_id is None:
        ends = [tokenizer.eos_token_id, *_closing_token_ids(tokenizer)]
        ids = [token for token in ends if token is not None]
        if not ids:
            raise ValueError(f"the tokenizer of {config.path!r} has neither a pad nor an eos token; give it one")
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ids[0])
    tokenizer.padding_side = "left"
    return tokenizer


def _adapter_folder(config: ModelConfig) -> Path | None:
    """Return the folder that ``config.path`` names, if an adapter is all that it holds."""
    folder = Path(config.path).expanduser()
    is_adapter = (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()
    return folder if is_adapter else None


def _quantization(config: ModelConfig) -> dict[str, Any]:
    """Return what ``from_pretrained`` needs for 4-bit weights, or nothing; ValueError where they cannot be had."""
    if not config.load_in_4bit:
        return {}
    if not torch.cuda.is_available():
        raise ValueError("model.load_in_4bit needs a CUDA GPU, and there is none; model.lora alone works without one")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("model.load_in_4bit needs bitsandbytes, which is missing; pip install bitsandbytes")
    compute = torch.float32 if config.precision == "float32" else torch.bfloat16
    options: Any = transformers.BitsAndBytesConfig
    quantization = options(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    return {"quantization_config": quantization, "device_map": {"": torch.cuda.current_device()}}


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
        with cached_if_unreachable():
            yield path, None


@contextmanager
def _said_of(config: ModelConfig, part: str) -> Iterator[None]:
    """Turn whatever the libraries raise while they load a part of the model into a sentence."""
    try:
        yield
    except Exception as error:  # a damaged file can fail anywhere
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            raise ValueError(
                f"model.path={config.path!r} is a model with Python code of its own (trust_remote_code), which is not "
                "run here; use an architecture that transformers has"
            ) from error
        raise ValueError(
            f"model.path={config.path!r}: {part} could not be loaded ({type(error).__name__}: {reason[:400]}); check "
            "the spelling, or fetch the files again"
        ) from error


def _is_of_tokenizer(file: Path) -> bool:
    return file.name.startswith(("tokenizer", "vocab", "spiece")) or file.suffix in (".model", ".tiktoken")


def _check_weights(config: ModelConfig, model: PreTrainedModel, missing: Iterable[str]) -> None:
    """Refuse weights that the files lack, which transformers would draw at random, and those that are no numbers."""
    named = [] if is_empty(model) else list(model.named_parameters())
    for names, fault in (
        (sorted(missing), "are not in its files"),
        (
            [name for name, weight in named if not math.isfinite(weight.detach().sum(dtype=torch.float32))],
            "are not finite",
        ),
    ):
        if names:
            more = f" and {len(names) - 3} others" if names[3:] else ""
            raise ValueError(
                f"model.path={config.path!r}: the weights {', '.join(names[:3])}{more} {fault}; fetch or save the "
                "model again"
            )


def _check_vocabulary(config: ModelConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    embeddings: Any = model.get_input_embeddings()
    rows: int = embeddings.weight.shape[0]
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if largest >= rows:
        raise ValueError(
            f"model.path={config.path!r}: its tokenizer knows the token {token!r} with id {largest}, but the model has "
            f"embeddings for the ids below {rows}; use the model's own tokenizer, or resize_token_embeddings"
        )


def _load_plain(name: str, dtype: torch.dtype, options: Mapping[str, Any]) -> tuple[PreTrainedModel, Iterable[str]]:
    """Return the model, and the names of the weights that its files lack."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, trust_remote_code=False, output_loading_info=True, **options
    )
    model, found = loaded
    return model, found["missing_keys"]


def _load_gguf(folder: str, file_name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, Iterable[str]]:
    """Return an ordinary model with the file's weights, de-quantized, and the names of those that it lacks.

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
    return model.eval(), ()
