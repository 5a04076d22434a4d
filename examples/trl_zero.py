"""TRL's GRPOTrainer with both methods and the fused loss, under DeepSpeed's ZeRO; options are EdgeGRPOConfig's.

torchrun --standalone --nproc-per-node 2 examples/trl_zero.py --deepspeed examples/zero3.json --max_steps 20
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from rollouts import MAX_NEW_TOKENS, TINY
from transformers import AutoTokenizer, HfArgumentParser
from trl import ModelConfig, get_peft_config

from edge_grpo.integrations.trl import EdgeGRPOConfig, EdgeGRPOTrainer


def right(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    return [float(f"\\boxed{{{sum_}}}" in said[0]["content"]) for said, sum_ in zip(completions, answer, strict=True)]


def additions() -> Dataset:
    sums = [(a, 10 + (7 * a) % 40) for a in range(10, 50)]
    prompts = [[{"role": "user", "content": f"What is {a} + {b}?"}] for a, b in sums]
    return Dataset.from_dict({"prompt": prompts, "answer": [str(a + b) for a, b in sums]})


def main(arguments: list[str]) -> None:
    on_gpu, zero = torch.cuda.is_available(), any(word.startswith("--deepspeed") for word in arguments)
    if zero and not on_gpu:
        # On a CPU transformers leaves DeepSpeed's start to the script; gloo serves, and nothing is compiled for it.
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
        arguments = [*arguments, "--accelerator_config", '{"use_configured_state": true}']
    parser = HfArgumentParser((EdgeGRPOConfig, ModelConfig))
    parser.set_defaults(model_name_or_path=TINY, output_dir="runs/zero", report_to="none", save_strategy="no")
    parser.set_defaults(use_cpu=not (on_gpu or zero), bf16=on_gpu, learning_rate=3e-4, logging_steps=1)
    parser.set_defaults(max_completion_length=MAX_NEW_TOKENS, per_device_train_batch_size=16)
    args, model = parser.parse_args_into_dataclasses(arguments)
    name, adapter = model.model_name_or_path, get_peft_config(model)  # --use_peft: LoRA
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    trainer = EdgeGRPOTrainer(name, right, args, additions(), processing_class=tokenizer, peft_config=adapter)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()  # all of it, under ZeRO-3 too


if __name__ == "__main__":
    main(sys.argv[1:])
