"""The same with DeepSpeed's ZeRO: the loss inside the engine's forward, where ZeRO-3 gathers the head that it reads.

torchrun --standalone --nproc-per-node 2 examples/zero.py --config examples/zero3.json --steps 20
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from rollouts import Rollout, load, sample
from torch import Tensor

from edge_grpo.policy.head import LMHead
from edge_grpo.policy.model import PolicyModel
from edge_kernels import linear_edge_grpo_loss


def main(steps: int, config: str) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # on a CPU gloo serves; this would be compiled first
    deepspeed.init_distributed()
    world, rank = dist.get_world_size(), dist.get_rank()
    (model, tokenizer), (sampler, _) = load(), load()  # whoever samples needs whole weights: an engine of its own
    auto = {"train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 1, "gradient_clipping": 1, "bf16": {}}
    options = json.loads(Path(config).read_text(encoding="utf-8")) | auto  # "auto" is for transformers, not DeepSpeed
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    policy = deepspeed.initialize(model=PolicyModel(model), optimizer=optimizer, config=options)[0]
    for step in range(steps):
        torch.manual_seed(step * world + rank)
        batch = sample(sampler, tokenizer, step * world + rank, num_prompts=2)
        batch = Rollout(*(value.to(policy.device) for value in batch))
        dist.all_reduce(num_items := batch.completion_mask.sum())  # of all processes, so that their losses add up

        def loss_of(hidden: Tensor, head: LMHead, batch: Rollout = batch, num_items: Tensor = num_items) -> Tensor:
            inputs = (hidden[:, :-1], head.weight, batch.input_ids[:, 1:], batch.completion_mask)
            options = {"rewards": batch.rewards, "group_ids": batch.group_ids, "num_items": num_items}
            return linear_edge_grpo_loss(*inputs, **options).loss

        loss = policy(batch.input_ids, batch.attention_mask, loss_of)
        policy.backward(loss * world)  # gradients are averaged over processes
        policy.step()
        for own, part in zip(sampler.parameters(), model.parameters(), strict=True):
            with deepspeed.zero.GatheredParameters(part):  # one at a time
                own.data.copy_(part)
        dist.all_reduce(report := torch.stack([batch.rewards.mean() / world, loss.detach()]))
        if rank == 0:
            print(f"step {step + 1}  reward {report[0]:.3f}  loss {report[1]:+.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--config", default="examples/zero3.json")
    main(**vars(parser.parse_args()))
