"""TRL's loss of a micro-batch and ours on the same weights and tensors, over the grid of TRL's options.

python tests/grpo/integrations/trl_grid.py       # every combination; the tests take a part
"""

from __future__ import annotations

import itertools
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from trl import GRPOTrainer
from trl_runs import make_trainer

from edge_grpo.integrations.trl import EdgeGRPOTrainer
from edge_grpo.integrations.trl.options import CLIPPING, loss_config
from edge_grpo.policy.head import LMHead

TOLERANCE = 1e-5
LOSS_TYPES = ("dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass(frozen=True)
class Case:
    """One combination of options; ``mu`` is num_iterations, whose second pass has other weights than the first."""

    loss_type: str = "dapo"
    beta: float = 0.0
    mu: int = 1
    level: str = "token"
    delta: float | None = None
    entropy_coef: float = 0.0
    quantile: float = 1.0
    use_bias_correction_kl: bool = True
    mode: str | None = None  # of vLLM's importance correction
    clip_min: float | None = None
    accumulation: int = 1
    off_policy: float | None = None  # a bound that masks the second of four completions

    @property
    def is_sensible(self) -> bool:
        """Whether the fused loss is to have it, and no other case is the same."""
        return not (
            (self.entropy_coef and self.quantile < 1)  # left to TRL
            or (self.loss_type == "vespo" and (self.mode or "token").startswith("sequence"))  # TRL refuses it
            or (self.delta is not None and self.loss_type not in CLIPPING)
            or (not self.beta and not self.use_bias_correction_kl)
            or (self.mode is None and self.clip_min is not None)
            or (self.mode is None and self.mu == 1 and self.off_policy is not None)
        )


def small_grid() -> list[Case]:
    """Every loss type with each option alone and with a few together."""
    alone: list[dict[str, Any]] = [
        {},
        {"mu": 2},
        {"mu": 2, "level": "sequence", "off_policy": 0.05},
        {"mu": 2, "beta": 0.04, "delta": 1.2, "accumulation": 2},
        {"mu": 2, "beta": 0.04, "use_bias_correction_kl": False, "entropy_coef": 0.02},
        {"mu": 2, "quantile": 0.5},
        {"mu": 2, "mode": "token_truncate", "beta": 0.04, "off_policy": 0.05},
        {"mu": 2, "mode": "sequence_mask", "clip_min": 0.5, "level": "sequence"},
    ]
    return [case for kind in LOSS_TYPES for one in alone if (case := Case(kind, **one)).is_sensible]


def whole_grid() -> Iterator[Case]:
    axes = {
        "loss_type": LOSS_TYPES,
        "beta": (0.0, 0.04),
        "mu": (1, 2),
        "level": ("token", "sequence"),
        "delta": (None, 1.2),
        "entropy_coef": (0.0, 0.02),
        "quantile": (1.0, 0.5),
        "use_bias_correction_kl": (True, False),
        "mode": (None, *MODES),
        "clip_min": (None, 0.5),
        "off_policy": (None, 0.05),
    }
    for values in itertools.product(*axes.values()):
        options: dict[str, Any] = dict(zip(axes, values, strict=True))
        case = Case(**options, accumulation=options["mu"])
        if case.is_sensible:
            yield case


def make_inputs(trainer: GRPOTrainer, case: Case) -> dict[str, torch.Tensor]:
    """A micro-batch as TRL's trainer buffers it: prompts padded on the left, completions on the right, tools' tokens.

    Log-probabilities of earlier, reference and sampling weights lie around the present ones, on both sides of bounds.
    """
    vocabulary = trainer.model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    B, P, T = 4, 5, 9  # all different, so that no axis can pass for another

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    completion_mask = (torch.arange(T) < torch.tensor([T, 6, 3, 1])[:, None]).long()
    tool_mask = torch.ones(B, T, dtype=torch.long)
    tool_mask[0, 2:4] = 0
    inputs = {
        "prompt_ids": torch.randint(vocabulary, (B, P), generator=generator),
        "prompt_mask": (torch.arange(P) >= torch.tensor([0, 2, 1, 3])[:, None]).long(),
        "completion_ids": torch.randint(vocabulary, (B, T), generator=generator),
        "completion_mask": completion_mask,
        "tool_mask": tool_mask,
        "advantages": torch.tensor([1.3, -0.8, 0.6, -1.1]),
        "num_items_in_batch": torch.tensor(37),
    }
    with torch.no_grad():
        current, _, _ = GRPOTrainer._get_per_token_logps_and_entropies(
            trainer,
            trainer.model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], completion_mask], dim=1),
            T,
        )
    old = current + 0.3 * normal(B, T)
    old[1] += 0.3  # a completion of negative advantage that has become far less likely
    inputs["ref_per_token_logps"] = current + 0.3 * normal(B, T)
    if case.mu > 1 or case.mode is not None:
        inputs["old_per_token_logps"] = old
    if case.mode is not None:
        mask = completion_mask * tool_mask
        sampling = old + 0.3 * normal(B, T)
        sampling[1, 2] = torch.nan  # a token that vLLM could not score
        difference = ((old - sampling) * mask).nan_to_num(nan=0.0)
        ratio = (difference.sum(1, keepdim=True) if case.mode.startswith("sequence") else difference).exp()
        low, high = case.clip_min or 0.0, 1.15
        outside = (ratio < low) | (ratio > high)
        truncated = ratio.clamp(low, high)
        kept = ratio.masked_fill(outside, 0.0)
        inputs["sampling_per_token_logps"] = sampling
        inputs["importance_sampling_ratio"] = truncated if case.mode.endswith("truncate") else kept
    return inputs


def configure(trainer: GRPOTrainer, case: Case) -> None:
    """Set what ``GRPOTrainer.__init__`` sets from its arguments."""
    high = 1.1 if case.loss_type == "cispo" else 0.28  # cispo's is the cap itself
    for name, value in {
        "loss_type": case.loss_type,
        "beta": case.beta,
        "importance_sampling_level": case.level,
        "epsilon_low": 0.15,
        "epsilon_high": high,
        "entropy_coef": case.entropy_coef,
        "_entropy_bonus_enabled": case.entropy_coef != 0,
        "top_entropy_quantile": case.quantile,
        "use_vllm": case.mode is not None,
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": case.mode,
        "vllm_importance_sampling_clip_max": 1.15,
        "vllm_importance_sampling_clip_min": case.clip_min,
        "current_gradient_accumulation_steps": case.accumulation,
        "off_policy_mask_threshold": case.off_policy,
    }.items():
        setattr(trainer, name, value)
    trainer.args.delta = case.delta
    trainer.args.off_policy_mask_threshold = case.off_policy
    trainer.args.use_bias_correction_kl = case.use_bias_correction_kl
    trainer.args.steps_per_generation = case.accumulation
    trainer._metrics["train"] = defaultdict(list)
    if isinstance(trainer, EdgeGRPOTrainer):
        trainer._loss_config = loss_config(trainer, LMHead.of(trainer.model))


def evaluate(
    trainer: GRPOTrainer, case: Case, inputs: dict[str, torch.Tensor]
) -> tuple[float, torch.Tensor, dict[str, float]]:
    """Return loss, gradient and metrics of the micro-batch."""
    configure(trainer, case)
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
    return loss.item(), gradient, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def check(theirs: GRPOTrainer, ours: EdgeGRPOTrainer, case: Case) -> None:
    """Raise AssertionError where loss, gradient or a metric differ by more than 1e-5 of their size."""
    inputs = make_inputs(theirs, case)
    loss, gradient, metrics = evaluate(theirs, case, inputs)
    our_loss, our_gradient, our_metrics = evaluate(ours, case, inputs)
    assert abs(our_loss - loss) <= TOLERANCE * max(1, abs(loss)), (case, our_loss, loss)
    error = (our_gradient - gradient).norm() / gradient.norm()
    assert error <= TOLERANCE, (case, float(error))
    assert our_metrics.keys() == metrics.keys(), (case, our_metrics.keys() ^ metrics.keys())
    for name, value in metrics.items():
        assert abs(our_metrics[name] - value) <= TOLERANCE * max(1, abs(value)), (case, name, our_metrics[name], value)


def main() -> None:
    torch.set_num_threads(1)
    cases = list(whole_grid())
    if len(sys.argv) > 1:
        cases = random.sample(cases, int(sys.argv[1]))
    with tempfile.TemporaryDirectory() as folder:
        pair = make_trainer(folder, GRPOTrainer), make_trainer(folder, eda=False, gec=False)
        for case in cases:
            check(*pair, case)
    print(f"{len(cases)} combinations agree to {TOLERANCE}")


if __name__ == "__main__":
    main()
