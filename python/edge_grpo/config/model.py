"""The keys of the model and of the adapters in it; those of everything else are in ``keys``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from edge_grpo.config.checks import did_you_mean, real, refuse, whole

Precision = Literal["float32", "bfloat16", "mixed"]
Sharding = Literal["none", "fsdp2"]
_OF_LORA = ("rank", "alpha", "targets", "dropout", "config")


@dataclass(frozen=True)
class ModelConfig:
    """The section ``model``.

    ``lora``  train adapters alone: rank, alpha (2 * rank), dropout, targets (all-linear, or layers' names with commas);
              or all of it in config, a file or folder with a configuration of peft
    """

    path: str = "edge_grpo:tiny"  # hub id, folder, .gguf file, or edge_grpo:tiny, the model shipped in the package
    precision: Precision = "float32"  # of parameters; mixed: float32 parameters under bfloat16 autocast
    gradient_checkpointing: bool = False  # recompute activations in the backward pass to save memory
    lora: dict[str, bool | int | float | str] = field(default_factory=dict)
    sharding: Sharding = "none"  # over processes: none, each holds all parameters, or fsdp2, each holds a part of them
    load_in_4bit: bool = False  # frozen weights in bitsandbytes' NF4 under the adapters (QLoRA); needs a GPU

    def __post_init__(self) -> None:
        refuse(self._lora_problems())

    def _lora_problems(self) -> list[str]:
        lora = self.lora
        problems = [
            f"lora takes {', '.join(_OF_LORA)}; got {name!r}{did_you_mean(name, _OF_LORA)}"
            for name in lora
            if name not in _OF_LORA
        ]
        if self.load_in_4bit and not lora:
            problems.append("load_in_4bit freezes the weights, so that only adapters can be trained; set lora.rank")
        if self.load_in_4bit and self.sharding != "none":
            problems.append("load_in_4bit and sharding cannot be combined: packed 4-bit weights cannot be split")
        if "config" in lora and len(lora) > 1:
            others = ", ".join(sorted(lora.keys() - {"config"}))
            problems.append(f"lora.config holds the whole configuration; leave out {others}")
        elif lora and "config" not in lora:
            problems += whole(1, **{"lora.rank": lora.get("rank")})
            problems += real("> 0", **{"lora.alpha": lora.get("alpha", 1)})
            dropout = lora.get("dropout", 0)
            if isinstance(dropout, str) or not 0 <= dropout < 1:
                problems.append(f"lora.dropout must lie in [0, 1); got {dropout!r}")
        return problems
