"""A trainer that only remembers what it was asked for, for the tests of the command line."""

from __future__ import annotations

import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from edge_grpo.config import TrainConfig, to_dict
from edge_grpo.run.folder import claim, discard


@dataclass
class FakeTrainer:
    """Stands in for ``trainer.train``: remembers what it was asked for and leaves a run folder behind."""

    calls: list[tuple[TrainConfig, bool]] = field(default_factory=list)
    error: BaseException | None = None
    fails_to_load: bool = False
    accepted: list[bool] = field(default_factory=list)

    def train(
        self, config: TrainConfig, *, resume: bool = False, overwrite: bool = False, accept_changes: bool = False
    ) -> Any:
        self.accepted.append(accept_changes)
        with claim(Path(config.output), resume=resume, overwrite=overwrite):
            return self._train(config, resume)

    def _train(self, config: TrainConfig, resume: bool) -> Any:
        self.calls.append((config, resume))
        if self.fails_to_load:
            raise KeyboardInterrupt
        output = Path(config.output)
        if not resume:
            discard(output)
        (output / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
        (output / "metrics.jsonl").write_text(
            '{"step": 0, "eval/accuracy": 0.2, "eval/stderr": 0.03}\n'
            '{"step": 3, "reward/mean": 0.5, "eval/accuracy": 0.65, "eval/stderr": 0.034}\n'
        )
        if self.error is not None:
            raise self.error
        return types.SimpleNamespace(steps=config.steps, seconds=75.0)

    @property
    def config(self) -> TrainConfig:
        return self.calls[-1][0]
