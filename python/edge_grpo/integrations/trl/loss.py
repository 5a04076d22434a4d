"""GRPOTrainer's loss of a micro-batch by ``edge_kernels``: the same totals, the same metrics, one sweep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from edge_grpo.integrations.trl.config import ConfiguredTrainer
from edge_grpo.integrations.trl.options import CLIPPING, PER_TOKEN
from edge_grpo.policy.head import LMHead
from edge_kernels import GRPOLossConfig, GRPOLossOutput, linear_edge_grpo_loss


def fused_loss(
    trainer: ConfiguredTrainer, config: GRPOLossConfig, model: torch.nn.Module, inputs: dict[str, Any]
) -> Tensor:
    """Return what ``GRPOTrainer._compute_loss`` would return, and log what it would log."""
    input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)  # (B, L)
    attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    mask = loss_mask(inputs)  # (B, T)
    length = mask.shape[1]
    is_training = trainer.model.training
    windows = trainer.current_gradient_accumulation_steps if is_training else 1
    num_items = _num_items(trainer, inputs, windows) if config.loss_type in PER_TOKEN else None
    if num_items is not None and config.entropy_coef:
        # TRL's bonus is the mean over the micro-batch, whatever the loss is divided by.
        config = replace(
            config, entropy_coef=config.entropy_coef * float(num_items / mask.sum().clamp(min=1)) / windows
        )

    def loss(hidden: Tensor, head: LMHead) -> GRPOLossOutput:
        needs_sampler = config.sampler_ratio_cap is not None or config.off_policy_mask_threshold is not None
        return linear_edge_grpo_loss(
            hidden[:, -length:],
            head.weight,
            inputs["completion_ids"],
            mask,
            head.bias,
            advantages=inputs["advantages"],
            old_logprobs=inputs.get("old_per_token_logps"),
            ref_logprobs=inputs.get("ref_per_token_logps") if config.beta else None,
            low_rank=head.low_rank(hidden[:, -length:]),
            sampling_logprobs=inputs.get("sampling_per_token_logps") if needs_sampler else None,
            injected_mask=inputs.get("injected_mask"),
            num_items=num_items,
            config=config,
        )

    with trainer.accelerator.autocast():
        out: GRPOLossOutput = model(input_ids=input_ids, attention_mask=attention_mask, edge_loss=loss)
    _log(trainer, config, inputs, mask, out, windows)
    return out.loss if num_items is not None else out.loss / windows


def loss_mask(inputs: dict[str, Any]) -> Tensor:
    """Return where a loss is taken, (B, T) bool: the completions' tokens without those of tools and corrections."""
    mask: Tensor = inputs["completion_mask"]
    return (mask * inputs["tool_mask"] if "tool_mask" in inputs else mask).bool()


def _num_items(trainer: ConfiguredTrainer, inputs: dict[str, Any], windows: int) -> Tensor:
    """Return the tokens of one accumulation on an average process: TRL counts those of the generation batch."""
    total: Tensor = inputs["num_items_in_batch"].clamp(min=1) / trainer.accelerator.num_processes
    parts: Any = trainer.args.steps_per_generation  # TRL sets it
    return total * windows / parts if trainer.model.training else total


def _log(
    trainer: ConfiguredTrainer,
    config: GRPOLossConfig,
    inputs: dict[str, Any],
    mask: Tensor,
    out: GRPOLossOutput,
    windows: int,
) -> None:
    """Add this micro-batch to TRL's metrics, under its names."""
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    accelerator = trainer.accelerator
    tokens = mask.sum().float()
    if config.entropy_coef:
        in_loss = windows if config.loss_type in PER_TOKEN else 1
        bonus = trainer.entropy_coef * out.metrics["entropy_sum"] / tokens.clamp(min=1) / in_loss
        metrics["policy_loss"].append(accelerator.gather(out.loss.detach() + bonus).nanmean().item())
        if trainer.model.training and accelerator.sync_gradients:
            metrics["entropy_coef"].append(trainer.entropy_coef)

    per_token: dict[str, Tensor] = {"entropy": out.metrics["entropy_sum"]}
    if config.beta:
        per_token["kl"] = out.metrics["kl_sum"]
    ratios = _of_ratios(config, inputs, mask, out)  # by name, (B, T) or, of sequences, (B, 1)
    sums = [*per_token.values(), *((value if value.shape[1] == 1 else value * mask).sum() for value in ratios.values())]
    totals = accelerator.reduce(
        torch.stack([tokens, tokens.new_tensor(len(mask)), *(value.float() for value in sums)]), reduction="sum"
    )
    tokens, sequences = totals[0].clamp(min=1), totals[1].clamp(min=1)
    for name, total in zip(per_token, totals[2:], strict=False):
        metrics[name].append((total / tokens).item())
    for (name, value), total in zip(ratios.items(), totals[2 + len(per_token) :], strict=True):
        mean = total / (sequences if value.shape[1] == 1 else tokens)
        metrics[f"{name}_mean" if name.startswith("clip_ratio") else name].append(mean.item())
    if config.loss_type in CLIPPING:
        sides = [ratios["clip_ratio/low"], ratios["clip_ratio/high"]]
        shares = [side[:, 0] if side.shape[1] == 1 else (side * mask).sum(1) / mask.sum(1) for side in sides]
        gathered = accelerator.gather(torch.stack(shares, dim=1))  # (processes * B, 2), NaN for what is masked
        low, high = (column[~column.isnan()] for column in gathered.unbind(1))
        metrics["clip_ratio/low_min"].append(low.min().item() if len(low) else float("nan"))
        metrics["clip_ratio/high_max"].append(high.max().item() if len(high) else float("nan"))


def _of_ratios(config: GRPOLossConfig, inputs: dict[str, Any], mask: Tensor, out: GRPOLossOutput) -> dict[str, Tensor]:
    """Return by the metric's name where the ratio left its bounds, as 0 and 1; of vespo the sequences' weights."""
    old = inputs.get("old_per_token_logps")
    log_ratio = torch.zeros_like(out.logprobs) if old is None else (out.logprobs - old) * mask
    advantages = inputs["advantages"]
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    if config.loss_type == "vespo":
        sampler = inputs.get("importance_sampling_ratio")
        constants = (config.vespo_k_pos, config.vespo_lambda_pos, config.vespo_k_neg, config.vespo_lambda_neg)
        weights = GRPOTrainer.get_gamma_weights(advantages, log_ratio, mask, sampler, *constants)
        return {"vespo/phi_seq_mean": weights}
    if config.importance_sampling_level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = log_ratio.exp()
    if config.loss_type == "cispo":
        return {"cispo_clip_ratio": ((ratio > config.epsilon_high) & (advantages > 0)).float()}
    if config.loss_type not in CLIPPING:
        return {}
    if config.delta is not None:
        ratio = ratio.clamp(max=config.delta)
    low = (ratio < 1 - config.epsilon_low) & (advantages < 0)
    high = (ratio > 1 + config.epsilon_high) & (advantages > 0)
    return {
        "clip_ratio/low": low.float(),
        "clip_ratio/high": high.float(),
        "clip_ratio/region": (low | high).float(),
    }
