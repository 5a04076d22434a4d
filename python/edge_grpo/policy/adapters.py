"""Low-rank adapters (LoRA) of the policy: put in, loaded, left out for a reference, merged into weights for a sampler.

Adapters are peft's, put into the model in place: it stays a ``PreTrainedModel``. (What transformers offers asks for a
release of peft that need not exist yet.) An adapter on the output layer is the business of ``head``.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from edge_grpo.policy.sharding import is_empty, whole

INSTALL = "install it with `pip install 'edge-grpo[lora]'`"
CONFIG_FILE = "adapter_config.json"  # peft's own name for it
_WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of names in its files
_NAME = "default"


def add_lora(model: PreTrainedModel, options: Mapping[str, Any], base: str) -> None:
    """Put adapters into ``model``, as ``model.lora`` says; from then on only they are trained.

    ``base`` is what the adapter's own files will name as the model that it belongs to. Adapters are float32, whatever
    the weights are. Raises ValueError for a configuration that peft refuses, or that matches no layer.
    """
    peft = _peft()
    if is_adapted(model):
        raise ValueError(f"model.path={base!r} carries an adapter, which is trained further; leave model.lora out")
    if "config" in options:
        config = _read_config(peft, Path(str(options["config"])).expanduser())
    else:
        targets = str(options.get("targets", "all-linear"))
        config = peft.LoraConfig(
            r=options["rank"],
            lora_alpha=options.get("alpha", 2 * options["rank"]),
            lora_dropout=options.get("dropout", 0.0),
            target_modules=targets if targets == "all-linear" else [name.strip() for name in targets.split(",")],
            task_type="CAUSAL_LM",
        )
    try:
        peft.inject_adapter_in_model(config, model, _NAME)
    except Exception as error:  # peft's own complaints are of many types
        raise ValueError(f"model.lora cannot be put into {base!r}: {' '.join(str(error).split())[:400]}") from error
    config.base_model_name_or_path = base
    _train_adapters(model)


def load_lora(model: PreTrainedModel, folder: Path) -> None:
    """Put the adapter in ``folder``, which peft or a run has saved, into its base model, to be trained further.

    In a model without weights the adapter has none either.
    """
    peft = _peft()
    peft.inject_adapter_in_model(_read_config(peft, folder), model, _NAME)
    _train_adapters(model)
    if is_empty(model):
        return
    weights = {name.removeprefix(_PREFIX): value for name, value in load_file(folder / _WEIGHTS_FILE).items()}
    found = peft.set_peft_model_state_dict(model, weights, _NAME)
    missing = [name for name in found.missing_keys if _is_trained(name)]
    if missing or found.unexpected_keys:
        raise ValueError(f"{folder / _WEIGHTS_FILE} does not fit the model: {[*missing, *found.unexpected_keys][:3]}")


def lora_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the adapter's weights by their names in peft's files. Where they are split, all processes iterate."""
    state = _peft().get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False)
    for name, value in state.items():
        yield f"{_PREFIX}{name}", whole(value)


def save_lora(model: PreTrainedModel, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write the adapter's ``weights`` into ``folder`` as peft does; the base model is named, not written."""
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: value.contiguous() for name, value in weights.items()}
    save_file(contiguous, folder / _WEIGHTS_FILE, metadata={"format": "pt"})
    config = copy.copy(model.peft_config[_NAME])
    config.inference_mode = True
    config.save_pretrained(str(folder))


def _train_adapters(model: PreTrainedModel) -> None:
    """Freeze all but the adapters, and make them float32: an update of 16 bits is mostly less than its last digit."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_trained(name))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def base_of(folder: Path) -> str:
    """Return the path or Hub id of the model that the adapter in ``folder`` belongs to."""
    try:
        base = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} cannot be read: {error}; save the adapter again") from error
    if not base or not isinstance(base, str):
        raise ValueError(f"{folder / CONFIG_FILE} does not name the adapter's base model; set base_model_name_or_path")
    return base


def is_adapted(model: nn.Module) -> bool:
    """Whether peft has replaced layers of ``model``."""
    return isinstance(getattr(model, "peft_config", None), dict)


def described(model: Any) -> str:
    """Return the configuration of the adapter in ``model`` as text that is equal for equal ones."""
    options = model.peft_config[_NAME].to_dict()
    return json.dumps({name: sorted(v) if isinstance(v, set) else v for name, v in options.items()}, default=str)


def adds_nothing(model: PreTrainedModel) -> bool:
    """Whether there are adapters and the base model's outputs are as without them: every product of factors is 0."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if not is_adapted(model) or not all(".lora_" in name for name in trained):
        return False
    return not any(bool(value.any()) for name, value in trained.items() if re.search(r"\.lora_(embedding_)?B\b", name))


@contextmanager
def disabled(model: PreTrainedModel) -> Iterator[None]:
    """Within the block ``model`` computes what its base model does."""
    wrappers = _wrappers(model)
    for wrapper in wrappers.values():
        wrapper.enable_adapters(False)
    try:
        yield
    finally:
        for wrapper in wrappers.values():
            wrapper.enable_adapters(True)


@torch.no_grad()
def merged_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the base model's weights by their names in its checkpoint, each adapter merged into its layer's weight.

    One layer is merged at a time, in a copy, so that what is trained keeps every bit. Without adapters it yields the
    state dict. Of weights that are split over processes one tensor is whole at a time, for which all processes must
    iterate to the end.
    """
    for name, value in _base_weights(model, _merged):
        yield name, whole(value)


def merged_shapes(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the names of ``merged_weights`` in their order, each with a tensor on the meta device for shape and dtype.

    It merges and gathers nothing, so a process may call it alone.
    """
    for name, value in _base_weights(model, _unmerged):
        yield name, torch.empty(value.shape, dtype=value.dtype, device="meta")


def _base_weights(model: PreTrainedModel, layer_of: Callable[[Any], nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Yield the base model's weights as they lie; in the place of an adapted layer those of ``layer_of`` it."""
    wrappers = _wrappers(model)
    done: set[str] = set()
    for name, value in model.state_dict().items():
        wrapper = next((prefix for prefix in wrappers if name.startswith(f"{prefix}.")), None)
        if wrapper is None:
            yield name, value
        elif wrapper not in done:
            done.add(wrapper)
            layer = layer_of(wrappers[wrapper])
            yield from ((f"{wrapper}.{part}", tensor) for part, tensor in layer.state_dict().items())


def _is_trained(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name


def _wrappers(model: PreTrainedModel) -> dict[str, Any]:
    """Return what peft has put in the place of layers, by name; nothing where there are no adapters."""
    modules = model.named_modules() if is_adapted(model) else ()
    return {name: module for name, module in modules if hasattr(module, "base_layer") or _has_copies(module)}


def _has_copies(module: nn.Module) -> bool:
    """Whether peft trains the module as a whole (modules_to_save)."""
    return isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict)


def _merged(wrapper: Any) -> nn.Module:
    """Return the layer that computes what an adapted one does."""
    if not _has_copies(wrapper):
        wrapper = copy.deepcopy(wrapper)
        wrapper.merge()
    return _unmerged(wrapper)


def _unmerged(wrapper: Any) -> nn.Module:
    """Return a layer with the shapes and dtypes of ``_merged``."""
    layer: nn.Module = wrapper.modules_to_save[_NAME] if _has_copies(wrapper) else wrapper.get_base_layer()
    return layer


def _read_config(peft: Any, path: Path) -> Any:
    """Return the peft configuration in a file, or in the folder of an adapter."""
    folder = path.parent if path.is_file() and path.name == CONFIG_FILE else path
    try:
        if path.is_file() and path.name != CONFIG_FILE:
            config = peft.get_peft_config(json.loads(path.read_text(encoding="utf-8")))
        else:
            config = peft.PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # peft's own complaints are of many types
        raise ValueError(
            f"model.lora.config={str(path)!r} is not a peft configuration ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}); name an {CONFIG_FILE}, or a folder that holds one"
        ) from error
    if config.is_prompt_learning or str(config.peft_type.value) != "LORA":
        raise ValueError(f"model.lora.config={str(path)!r} describes {config.peft_type.value}; only LORA is supported")
    if config.megatron_config is not None:  # peft would import the module that it names
        raise ValueError(f"model.lora.config={str(path)!r} has a megatron_config, which is not supported; remove it")
    config.inference_mode = False
    return config


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"an adapter needs peft, which is missing; {INSTALL}") from error
    return peft
