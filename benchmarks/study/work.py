"""One run of the study, in this process: train, read what the run logged, keep what the outcomes need.

Its folder is removed afterwards; the same record follows from the same cell, rate and seed on the same machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn

from benchmarks.harness import machine
from benchmarks.study.design import Cell
from benchmarks.study.sampler import SmallLlamaEngine
from edge_grpo.config import TrainConfig, load_config, recipe_path
from edge_grpo.run.folder import claim
from edge_grpo.run.history import read_run
from edge_grpo.types import Provenance, Response, Sampling

Record = dict[str, Any]

# The curves that are kept, as means over the steps between two evaluations.
CURVES = {
    "entropy": "entropy/token_mean",
    "advantage_var": "advantage/var",
    "collapsed_before": "collapsed/before",
    "collapsed_after": "collapsed/after",
    "weight": "eda/weight_mean",
    "injected": "tokens/injected_share",
    "length": "length/mean",
}


def make_run(cell: Cell, rate: float, seed: int, folder: Path, extra: tuple[str, ...] = ()) -> Record:
    """Train as ``cell`` says at a learning rate and return the record of it; ``extra`` are overrides for tests.

    ``tokens`` are thousands of generated tokens, ``accuracy`` is held-out avg@4. A run that diverged has the
    evaluations before it did, and ``diverged``.
    """
    output = folder / f"{cell.key}-{rate:g}-{seed}".replace(" ", "-").replace(":", "").replace(",", "")
    overrides = [*cell.setting.overrides, *cell.overrides, *extra]
    last = {override.partition("=")[0]: override for override in overrides}  # a key may be given once
    config = load_config(
        recipe_path(cell.setting.recipe),
        [*last.values(), f"optim.learning_rate={rate!r}", f"seed={seed}", f"output={output}"],
    )
    started = time.perf_counter()
    diverged = None
    try:
        _train(config, supervised=cell.supervised)
    except FloatingPointError as error:
        diverged = str(error).partition(";")[0]
    run = read_run(output)
    record: Record = {"cell": cell.key, "rate": rate, "seed": seed, "seconds": round(time.perf_counter() - started, 1)}
    record |= made_by()
    if diverged:
        record |= {"diverged": diverged, "of_steps": config.steps}
    record["steps"] = [point.step for point in run.evals]
    record["tokens"] = [0.0 if cell.supervised else round(1000 * point.tokens, 1) for point in run.evals]
    record["accuracy"] = [round(point.accuracy, 4) for point in run.evals]
    ends = record["steps"][1:]
    for name, key in CURVES.items():
        values = dict(zip(run.steps, run.columns.get(key, []), strict=False))
        if values:
            record[name] = [_mean(values, start, end) for start, end in zip(record["steps"], ends, strict=False)]
    shutil.rmtree(output)
    return record


@cache
def made_by() -> Record:
    """The revision of the code, with a "+" where sources differ from it, and the instructions that it computes with."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)

    revision = git("rev-parse", "--short=10", "HEAD").stdout.strip() or "unknown"
    changed = git("diff", "--quiet", "HEAD", "--", "*.py", "*.yaml", "*.cpp", "*.h").returncode == 1
    return {"revision": revision + "+" * changed, "instructions": machine()["instruction_set"]}


def _mean(values: dict[int, float | None], after: int, last: int) -> float | None:
    """The mean of the steps in (after, last] that have a value."""
    found = [value for step, value in values.items() if after < step <= last and value is not None]
    return float(f"{fmean(found):.4g}") if found else None


def _train(config: TrainConfig, *, supervised: bool) -> None:
    from edge_grpo.trainer import Trainer

    with claim(Path(config.output), resume=False, overwrite=True):
        trainer = Trainer(config)
        try:
            if config.model.path == "edge_grpo:tiny":
                trainer.engine = trainer.collector.engine = SmallLlamaEngine.like(trainer.engine)
            if supervised:
                trainer.collector.engine = _NoAttempt(trainer.tokenizer.eos_token_id)
            trainer.run(resume=False)
        finally:
            trainer.close()


class _NoAttempt:
    """Every attempt ends at once: all are wrong, and all are replaced by their prompt's solution.

    With the solutions' negative log-likelihood as the only loss (``loss.injected=sft``; equal rewards have no
    advantage) the step is one of supervised fine-tuning on the same prompts in the same order.
    """

    def __init__(self, eos_token_id: int) -> None:
        self._eos = eos_token_id

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seed: int,
        places: Sequence[int] | None = None,
    ) -> list[Response]:
        empty = Response((self._eos,), (0.0,), (0.0,), (Provenance.SAMPLED,), "stop")
        return [empty] * len(prompts)

    def phase(self) -> AbstractContextManager[None]:
        return nullcontext()

    def update_weights(self, model: nn.Module) -> None:
        pass

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        pass


def silence(folder: Path) -> None:
    """Send what this process prints into a file of the folder."""
    log = os.open(folder / f"log-{os.getpid()}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.stdout.flush()
    for stream in (1, 2):
        os.dup2(log, stream)
