"""What a run would take, as ``edge-grpo train --dry-run`` prints it: steps, tokens, memory, disk and time.

The trainer measures it, by loading everything and making a step of which nothing is kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_grpo.config import TrainConfig
from edge_grpo.text import clock, percent

KEPT_CHECKPOINTS = 2
_OF_ADAMW = 2  # numbers that it keeps for each parameter


@dataclass(frozen=True)
class Plan:
    """The figures of a run on ``processes`` processes; those of a step were measured on ``device``."""

    config: TrainConfig
    prompt_lengths: Sequence[int]  # tokens
    num_held_out: int
    parameters: int
    weight_bytes: int
    trained_bytes: int  # of the weights that have a gradient: less where adapters are trained
    generated_tokens: int  # in the step
    truncated: float  # share of responses that the length limit cut off
    peak_bytes: int
    device: str
    processes: int
    step_seconds: float

    @property
    def checkpoint_bytes(self) -> int:
        """The size of a checkpoint at most, nearly all of which is weights and what AdamW keeps."""
        return self.weight_bytes + _OF_ADAMW * self.trained_bytes

    def lines(self) -> list[str]:
        """Return the plan in lines for a terminal."""
        config, rollout = self.config, self.config.rollout
        responses = rollout.num_prompts * rollout.num_generations
        updates = config.optim.epochs * config.optim.minibatches
        drawn = config.steps * rollout.num_prompts
        longest = rollout.max_completion_length + (config.correction.max_length if config.use_gec else 0)
        mean = sum(self.prompt_lengths) / len(self.prompt_lengths)
        state = (1 + bool(config.loss.beta)) * self.weight_bytes + (1 + _OF_ADAMW) * self.trained_bytes
        checkpoints = (
            f"{KEPT_CHECKPOINTS} checkpoints of {_size(self.checkpoint_bytes)}" if config.save_every else "none"
        )
        needed = KEPT_CHECKPOINTS * self.checkpoint_bytes * bool(config.save_every) + 2 * self.weight_bytes
        free = _free_bytes(Path(config.output))
        rows = [
            (
                "steps",
                f"{config.steps:,} of {rollout.num_prompts} prompts x {rollout.num_generations} responses, with "
                f"{updates} optimizer step{'s' * (updates > 1)} each",
            ),
            (
                "data",
                f"{len(self.prompt_lengths):,} prompts, of which the run draws {drawn:,} "
                f"({drawn / len(self.prompt_lengths):.2g} epochs); {self.num_held_out:,} held out",
            ),
            (
                "tokens",
                f"prompts {mean:.0f} on average, {max(self.prompt_lengths)} at most; responses {longest} at most, "
                f"corrections included; a step {responses * longest:,} at most; the one measured generated "
                f"{self.generated_tokens:,}, and cut off {percent(self.truncated)} of its responses",
            ),
            ("model", f"{self.parameters:,} parameters, {config.model.precision}"),
            (
                "memory",
                f"{_size(self.peak_bytes)} at the peak of a step on {self.device}; of it {_size(state)} for "
                "weights, gradients and AdamW" + (", reference model" if config.loss.beta else ""),
            ),
            ("disk", f"checkpoints: {checkpoints}; final model {_size(self.weight_bytes)}; {_size(free)} free"),
            (
                "time",
                f"{self.step_seconds:.3g} s a step on {self.processes} process{'es' * (self.processes > 1)}: "
                f"{clock(self.step_seconds * config.steps)} for all of them, evaluations not counted",
            ),
            ("output", config.output),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:{width}}  {text}" for name, text in rows]
        if free < needed:
            lines.append(f"{'':{width}}  the disk is too small: the run writes {_size(needed)}")
        if (Path(config.output) / "config.yaml").exists():
            lines.append(f"{'':{width}}  it holds a run: --overwrite replaces it, --resume continues it")
        return lines


def _free_bytes(output: Path) -> int:
    """The free bytes where the folder is, or will be made."""
    place = output.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    raise AssertionError("the last unit has no limit")
