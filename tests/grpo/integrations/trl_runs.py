"""TRL's trainer and ours on the shipped model and twelve problems: one call makes either."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from edge_grpo.data.sources import load_examples
from edge_grpo.integrations.trl import EdgeGRPOConfig, EdgeGRPOTrainer
from edge_grpo.text import last_box

TINY = str(importlib.resources.files("edge_grpo") / "tiny")


def accuracy(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    return [
        float(last_box(messages[0]["content"]) == right) for messages, right in zip(completions, answer, strict=True)
    ]


def brevity(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A second reward, so that no group collapses and advantages are not all of one size."""
    return [-len(ids) / 50 for ids in completion_ids]


def problems() -> Dataset:
    examples = load_examples("arithmetic:1,2", {}, seed=0, limit=12)
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": one.problem}], "answer": one.answer, "solution": one.solution}
            for one in examples
        ]
    )


def make_trainer(
    output: Path | str,
    cls: type[GRPOTrainer] = EdgeGRPOTrainer,
    *,
    reward_funcs: Any = None,
    dataset: Dataset | None = None,
    model: Any = None,
    peft_config: Any = None,
    **options: Any,
) -> GRPOTrainer:
    """Return a trainer of two groups of four responses a step, in two micro-batches."""
    config = EdgeGRPOConfig if issubclass(cls, EdgeGRPOTrainer) else GRPOConfig
    arguments = {
        "output_dir": str(output),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 24,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "seed": 0,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        **options,
    }
    return cls(
        model=AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32) if model is None else model,
        reward_funcs=[accuracy, brevity] if reward_funcs is None else reward_funcs,
        args=config(**arguments),
        train_dataset=problems() if dataset is None else dataset,
        eval_dataset=problems().select(range(2)),
        processing_class=AutoTokenizer.from_pretrained(TINY),
        peft_config=peft_config,
    )


def history(trainer: GRPOTrainer) -> list[dict[str, float]]:
    """What the trainer logged at each step, without times."""
    return [
        {name: value for name, value in entry.items() if name not in ("step_time", "epoch")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
