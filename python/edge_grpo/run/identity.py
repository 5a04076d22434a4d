"""What a run was made of and with: hashes of its data, model and reward functions, versions, hardware.

``identity.json`` in the run's folder holds one entry for each time that any of it was different, so that a resumed run
is known to be the same run. Its configuration is ``checkpoint``'s to compare.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from edge_grpo.config import TrainConfig
from edge_grpo.policy.adapters import described, is_adapted
from edge_grpo.policy.loading import weights_fingerprint
from edge_grpo.run.files import write_json
from edge_grpo.run.state import reading
from edge_grpo.types import Prompt
from edge_kernels.info import cpu_name

NAME = "identity.json"
_PACKAGES = (
    "edge-grpo",
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "numpy",
    "datasets",
    "math-verify",
    "peft",
    "vllm",
)
Identity = dict[str, dict[str, str]]  # section -> name -> hash, version or name


def identify(
    config: TrainConfig,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    eval_prompts: Sequence[Prompt],
    *,
    device: torch.device,
    processes: int,
) -> Identity:
    """Return the identity of a run whose model has the weights that it was loaded with.

    Hashes: of every prompt's row and token ids, of the loaded weights, of an adapter's configuration, of the tokenizer
    (its vocabulary, rules and special tokens) and its chat template, and of the file in which each reward function's
    module lies, without importing it.
    """
    data = {"data.train": _hash_prompts(prompts)}
    if eval_prompts:
        data["eval.data"] = _hash_prompts(eval_prompts)
    inputs = data | {
        "weights": weights_fingerprint(model),
        "tokenizer": _hash(_describe(tokenizer)),
        "chat template": _hash(str(tokenizer.chat_template)),
    }
    if is_adapted(model):
        inputs["adapter"] = _hash(described(model))
    inputs |= {f"reward function {path}": _hash_module(path.partition(":")[0]) for path in config.reward.functions}
    hardware = {
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "processes": str(processes),
        "threads": str(torch.get_num_threads()),
    }
    return {"inputs": inputs, "versions": _versions(), "hardware": hardware}


def compare(output: Path, now: Identity, *, accept: bool) -> list[str]:
    """Return what is new since the run in ``output`` last began, in sentences, after refusing what changes the run.

    Raises ValueError if data, model or reward functions have changed, unless that is to be ``accept``-ed.
    """
    path = output / NAME
    if not path.is_file():
        return [f"{output} holds no {NAME}: whether data, model and reward functions are still the same is not known"]
    with reading(path):
        before: Identity = _entries(path)[-1]["identity"]
        changed = _names(before, now, "inputs")
        others = {section: _names(before, now, section) for section in ("versions", "hardware")}
    if changed and not accept:
        raise ValueError(
            f"cannot resume {output}: {', '.join(changed)} changed since the run last began; restore what it "
            "was, or add --accept-changes to go on with what it is now"
        )
    said = [f"resumed although it changed: {name}" for name in changed]
    return said + [
        f"{name} was {before[section].get(name)}, is {now[section].get(name)}: the next steps may differ in rounding"
        for section, names in others.items()
        for name in names
    ]


def record(output: Path, now: Identity, *, after_step: int) -> None:
    """Write the identity of the run that goes on after ``after_step``, where it is not that of the entry before."""
    path = output / NAME
    entries = _entries(path) if after_step and path.is_file() else []
    if not entries or entries[-1]["identity"] != now:
        write_json(path, [*entries, {"after_step": after_step, "identity": now}])


def _entries(path: Path) -> list[dict[str, Any]]:
    with reading(path):
        entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        if not entries or not all(isinstance(entry["identity"]["inputs"], dict) for entry in entries):
            raise ValueError("it holds no identity")
    return entries


def _names(before: Identity, now: Identity, section: str) -> list[str]:
    """The names whose values differ, or that only one of the two has."""
    old, new = before[section], now[section]
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def _hash_prompts(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        example = prompt.example
        row = [
            example.index,
            example.problem,
            example.answer,
            example.solution,
            prompt.token_ids,
            _plain(example.extra),
        ]
        digest.update(json.dumps(row, default=repr, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _plain(extra: Mapping[str, Any]) -> dict[str, Any]:
    return {str(name): value for name, value in extra.items()}


def _describe(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    for of_last_call in ("truncation", "padding") if backend is not None else ():
        rules.pop(of_last_call, None)
    return f"{type(tokenizer).__name__} {json.dumps(rules, sort_keys=True)} {tokenizer.special_tokens_map}"


def _hash_module(name: str) -> str:
    """The hash of a module's file, found as an import would find it (the working directory last), and not imported."""
    places: Sequence[str] | None = [*sys.path, str(Path.cwd())]
    found = None
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        found = importlib.machinery.PathFinder.find_spec(".".join(parts[:depth]), places)
        if found is None:
            return "not found as a file"
        places = found.submodule_search_locations
    if found is None or found.origin is None or not Path(found.origin).is_file():
        return "not found as a file"
    return hashlib.blake2b(Path(found.origin).read_bytes(), digest_size=16).hexdigest()
