"""One process's part of a corrected step in TRL's trainer, with a vLLM server's client in the place of the server.

    python -m torch.distributed.run --nproc_per_node=2 trl_processes.py FOLDER NUM_GENERATIONS

Twelve responses on however many processes. Each process leaves its part of the batch and the gradient in FOLDER; the
client leaves who called it, and with how many prompts.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
import trl.generation.vllm_generation as vllm_generation
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, TrainerCallback
from trl_runs import TINY, make_trainer, problems

from edge_grpo.integrations.trl.head import use_edge_kernels
from edge_grpo.policy.head import LMHead
from edge_kernels import GRPOLossOutput, linear_edge_grpo_loss

NUM_RESPONSES = 12


class Client:
    """What TRL's client does for the main process: completions that depend on the prompt's tokens alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, **_: Any) -> Client:
        return self

    def init_communicator(self, device: Any) -> None:
        pass

    def reset_prefix_cache(self) -> None:
        pass

    def get_server_info(self) -> dict[str, Any]:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata: list[Any], params: Any) -> None:
        assert len(metadata) == len(list(params))

    def generate(self, prompts: list[list[int]], n: int, max_tokens: int, **_: Any) -> dict[str, Any]:
        with (self.folder / "calls.jsonl").open("a") as log:
            log.write(json.dumps({"rank": int(os.environ.get("RANK", 0)), "prompts": len(prompts), "n": n}) + "\n")
        completion_ids = []
        for prompt in prompts:
            for number in range(n):
                draw = random.Random(repr((prompt, number)))
                completion_ids.append([*draw.choices(range(10, 60), k=draw.randrange(3, min(12, max_tokens))), 1])
        return {
            "prompt_ids": prompts,
            "completion_ids": completion_ids,
            "logprobs": [[[-2.0] for _ in ids] for ids in completion_ids],
            "logprob_token_ids": None,
        }


def parity(completion_ids: list[list[int]], easy: list[bool], **_: Any) -> list[float]:
    """Right where the row is easy, else for two in five; so the first process has fewer wrong ones than the others."""
    return [float(all_right or sum(ids) % 5 < 2) for ids, all_right in zip(completion_ids, easy, strict=True)]


def length(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [len(ids) / 20 for ids in completion_ids]


class Gradient(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.value = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def step(folder: Path, num_generations: int, *, use_vllm: bool = True) -> dict[str, Any]:
    """Train for a step and return this process's part of the batch, the gradient, and the metrics.

    Without the server the model itself samples, on each process its own.
    """
    vllm_generation.VLLMClient = Client(folder)
    vllm_generation.is_vllm_available = lambda: True
    processes = int(os.environ.get("WORLD_SIZE", 1))
    rows = problems().select(range(NUM_RESPONSES // num_generations))
    trainer = make_trainer(
        folder / "run",
        reward_funcs=[parity, length],
        dataset=rows.add_column("easy", [True] + [False] * (len(rows) - 1)),
        num_generations=num_generations,
        per_device_train_batch_size=NUM_RESPONSES // processes,
        per_device_eval_batch_size=NUM_RESPONSES,
        gradient_accumulation_steps=1,
        shuffle_dataset=False,
        seed=2,  # an uneven number of reflections on two processes and on three
        injected="shaped",
        use_vllm=use_vllm,
        vllm_mode="server",
        vllm_importance_sampling_mode="token_truncate",
        max_grad_norm=0,
        max_steps=1,
    )
    gradient = Gradient()
    trainer.add_callback(gradient)
    batches = []
    score = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: batches.append(score(inputs)) or batches[-1]
    trainer.train()
    (batch,) = batches
    mask = batch["completion_mask"].bool()
    return {
        "completions": [ids[row].tolist() for ids, row in zip(batch["completion_ids"], mask, strict=True)],
        "advantages": batch["advantages"],
        "injected": [marks[row].tolist() for marks, row in zip(batch["injected_mask"], mask, strict=True)],
        "gradient": gradient.value,
        "metrics": trainer.state.log_history[0],
    }


def sharded_error() -> float:
    """The error of the fused gradient where FSDP2 shards layers and the rest, relative to that of whole parameters."""

    def loss(hidden: torch.Tensor, head: LMHead) -> GRPOLossOutput:
        targets = input_ids[:, 1:]
        return linear_edge_grpo_loss(
            hidden,
            head.weight,
            targets,
            torch.ones_like(targets, dtype=torch.bool),
            advantages=torch.tensor([1.0, -2.0]),
        )

    input_ids = torch.arange(24).view(2, 12) + 20
    gradients = []
    for is_sharded in (False, True):
        model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).train()
        use_edge_kernels(model, temperature=1.0, cast_to_fp32=False)
        if is_sharded:
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
        model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), edge_loss=loss).loss.backward()
        grads = [p.grad.full_tensor() if is_sharded else p.grad for p in model.parameters()]
        gradients.append(torch.cat([grad.flatten() for grad in grads]))
    return float((gradients[1] - gradients[0]).norm() / gradients[0].norm())


if __name__ == "__main__":
    os.environ["CI"] = "1"  # no telemetry
    torch.set_num_threads(1)
    where, size = Path(sys.argv[1]), int(sys.argv[2])
    parts: dict[str, Any] = {"server": step(where, size), "model": step(where, size, use_vllm=False)}
    parts["sharded"] = sharded_error()
    torch.save(parts, where / f"{os.environ['RANK']}.pt")
