"""Which of TRL's options the fused loss has, and the loss configuration that they make."""

from __future__ import annotations

from typing import Any, get_args

from edge_grpo.integrations.trl.config import ConfiguredTrainer
from edge_grpo.policy.head import LMHead
from edge_kernels import GRPOLossConfig
from edge_kernels.config import LossType

PER_TOKEN = ("dapo", "cispo", "vespo")  # what TRL divides by the tokens of a whole accumulation
CLIPPING = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # what TRL applies `delta` to
# Options that have one name and one meaning in TRL and in edge_kernels.
SAME = (
    "use_bias_correction_kl",
    "sapo_temperature_pos",
    "sapo_temperature_neg",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
    "off_policy_mask_threshold",
)


class UnsupportedError(Exception):
    """The fused loss lacks an option, which is named."""


def loss_config(trainer: ConfiguredTrainer, head: LMHead) -> GRPOLossConfig:
    """Return the fused loss of the trainer's options. Raises UnsupportedError where there is none."""
    args = trainer.args
    for name, is_used in _lacking(trainer).items():
        if is_used:
            raise UnsupportedError(name)
    values: dict[str, Any] = {name: getattr(args, name) for name in SAME}
    values |= {
        "loss_type": trainer.loss_type,
        "epsilon_low": trainer.epsilon_low,
        "epsilon_high": trainer.epsilon_high,
        "delta": args.delta if trainer.loss_type in CLIPPING else None,
        "beta": trainer.beta,
        "importance_sampling_level": trainer.importance_sampling_level,
        "temperature": trainer.temperature,
        "softcap": head.softcap,
        "logit_scale": head.logit_scale,
        "max_completion_length": trainer.max_completion_length,
        "entropy_coef": trainer.entropy_coef,
        "top_entropy_quantile": trainer.top_entropy_quantile,
        "injected": args.injected,
        "sft_weight": args.sft_weight,
        "shaped_gamma": args.shaped_gamma,
        "eda": trainer.settings.eda,
    }
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        largest = trainer.vllm_importance_sampling_clip_max
        values |= {
            "sampler_ratio_cap": float("inf") if largest is None else largest,
            "sampler_ratio_floor": trainer.vllm_importance_sampling_clip_min or 0.0,
            "sampler_ratio_mode": trainer.vllm_importance_sampling_mode,
        }
    try:
        return GRPOLossConfig(**values)
    except ValueError as error:
        raise UnsupportedError(str(error)) from error


def _lacking(trainer: ConfiguredTrainer) -> dict[str, bool]:
    """What the fused loss does not do, by TRL's name, and whether this run asks for it."""
    share = trainer.top_entropy_quantile
    return {
        f"loss_type={trainer.loss_type!r}": trainer.loss_type not in get_args(LossType),
        "use_adaptive_entropy": trainer.use_adaptive_entropy,
        "router_aux_loss_coef": trainer.aux_loss_enabled,
        "top_entropy_quantile=0": share == 0,
        "top_entropy_quantile on several processes": share < 1 and trainer.accelerator.num_processes > 1,
        "entropy_coef with top_entropy_quantile": trainer.entropy_coef != 0 and share < 1,
    }
