"""The fused loss's gradient and AdamW step under DeepSpeed's ZeRO, against one process. Prints JSON.

    python -m torch.distributed.run --standalone --nproc_per_node=2 deepspeed_gradients.py EXAMPLES

EXAMPLES is the folder with zero2.json and zero3.json. DeepSpeed's collectives go over gloo: its own for shared memory
would be compiled first.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor, nn

from edge_grpo.config import ModelConfig
from edge_grpo.policy.head import LMHead
from edge_grpo.policy.loading import load_model
from edge_grpo.policy.model import PolicyModel, enable_checkpointing
from edge_kernels import GRPOLossOutput, linear_edge_grpo_loss

MAX_NORM = 1.0
LENGTHS = torch.tensor([23, 15, 9, 4])  # the second process has a third of the first one's tokens
INPUT_IDS = torch.randint(10, 60, (4, 24), generator=torch.Generator().manual_seed(0))
ATTENTION_MASK = (torch.arange(24) <= LENGTHS[:, None]).long()
MASK = (torch.arange(23) >= 3) & (torch.arange(23) < LENGTHS[:, None])
ADVANTAGES = torch.tensor([1.0, -2.0, 0.5, 3.0])


def policy_of(*, is_tied: bool, checkpointing: bool = False) -> PolicyModel:
    model, _ = load_model(ModelConfig())
    if not is_tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 1.5)
    if checkpointing:
        enable_checkpointing(model)
    return PolicyModel(model).train()


def loss_of(model: nn.Module, rows: slice) -> Tensor:
    def loss(hidden: Tensor, head: LMHead) -> GRPOLossOutput:
        return linear_edge_grpo_loss(
            hidden[:, :-1],
            head.weight,
            INPUT_IDS[rows, 1:],
            MASK[rows],
            advantages=ADVANTAGES[rows],
            num_items=int(MASK.sum()),
        )

    out: GRPOLossOutput = model(INPUT_IDS[rows], ATTENTION_MASK[rows], loss)
    return out.loss


def adamw(policy: PolicyModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(policy.parameters(), lr=1e-3, eps=1e-3)  # eps: a tiny gradient's rounding moves nothing


def on_one_process(*, is_tied: bool) -> tuple[dict[str, Tensor], float, dict[str, Tensor]]:
    """Return the gradient, its norm, and the weights after a clipped step."""
    policy = policy_of(is_tied=is_tied)
    loss_of(policy, slice(0, 4)).backward()
    gradient = {name: value.grad.clone() for name, value in policy.named_parameters() if value.grad is not None}
    norm = float(nn.utils.clip_grad_norm_(policy.parameters(), MAX_NORM))
    adamw(policy).step()
    return gradient, norm, {name: value.detach().clone() for name, value in policy.named_parameters()}


def errors(stage: int, *, is_tied: bool, checkpointing: bool) -> dict[str, float]:
    gradient, norm, weights = on_one_process(is_tied=is_tied)
    policy = policy_of(is_tied=is_tied, checkpointing=checkpointing)
    total = sum(value.numel() for value in policy.parameters())
    recipe = Path(sys.argv[1]) / f"zero{max(stage, 2)}.json"
    options: dict[str, Any] = json.loads(recipe.read_text(encoding="utf-8"))
    options |= {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "bf16": {}}  # instead of "auto"
    options |= {"gradient_clipping": MAX_NORM, "zero_optimization": options["zero_optimization"] | {"stage": stage}}
    engine: Any = deepspeed.initialize(model=policy, optimizer=adamw(policy), config=options)[0]
    held = sum(getattr(value, "ds_tensor", value).numel() for value in policy.parameters())
    rank, processes = dist.get_rank(), dist.get_world_size()
    # DeepSpeed averages over processes; the loss's normalizer is already that of all of them.
    engine.backward(loss_of(engine, slice(2 * rank, 2 * rank + 2)) * processes)
    found = {name: safe_get_full_grad(value) for name, value in policy.named_parameters()}
    engine.step()
    moved = {name: safe_get_full_fp32_param(value) for name, value in policy.named_parameters()}
    clipped_norm = float(engine.get_global_grad_norm())
    engine.destroy()
    largest = max(float(value.abs().max()) for value in gradient.values())
    return {
        "held": held / total,
        "gradient": max(float((found[name] - value).abs().max()) for name, value in gradient.items()) / largest,
        "norm": abs(clipped_norm / norm - 1),
        "weights": max(float((moved[name] - value).abs().max()) for name, value in weights.items()),
    }


def main() -> None:
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    cases = [(1, True, False), (2, True, False), (2, False, True), (3, True, False), (3, False, False), (3, True, True)]
    found = {
        f"ZeRO-{stage}, {'tied' if is_tied else 'own'} head{', activation checkpointing' if checkpointing else ''}": (
            errors(stage, is_tied=is_tied, checkpointing=checkpointing)
        )
        for stage, is_tied, checkpointing in cases
    }
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
