"""Every loss variant against TRL 1.16 itself: ``GRPOTrainer._compute_loss`` run on the same random tensors.

TRL's function is called unbound, on an object that has the attributes it reads and nothing else. Its model's forward is
replaced by fixed logits, whose log-probabilities and entropy are computed by TRL's own helpers; its sampler correction,
which stands in the middle of a function of 400 lines, is cut out of that function's source and executed. So the right
side of each comparison is TRL's code, none of it retold here.

Where TRL restricts: its sampler correction always has old log-probabilities (they are passed here too); it has no
injected tokens; its cispo, sapo and vespo take no delta; a mask must have the type of a number.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import math
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from edge_kernels import GRPOLossConfig, edge_grpo_loss, linear_edge_grpo_loss

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is the other side of every comparison here")
trl_utils = pytest.importorskip("trl.trainer.utils")
Trainer = grpo_trainer.GRPOTrainer

# 3 sequences, so that B, T, D and V are all different and no axis can pass for another; V odd.
B, T, D, V = 3, 13, 5, 11
PROMPT = 2
TEMPERATURE = 0.7
MAX_COMPLETION_LENGTH = 16

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """A few hundred numbers a tensor: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_batch(seed: int, dtype: torch.dtype) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = normal(B, T, D), normal(V, D)
    targets = torch.randint(V, (B, T), generator=generator)
    lengths = torch.tensor([T, 8, 1])  # whole, partial, and a single token
    mask = torch.arange(T) < lengths[:, None]
    logits = hidden @ weight.T
    current = (logits / TEMPERATURE).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    # 0.4 puts ratios on both sides of every clipping bound used below.
    old = current + 0.4 * normal(B, T)
    sampling = old + 0.4 * normal(B, T)
    sampling[0, 2] = math.nan
    return SimpleNamespace(
        hidden=hidden.to(dtype),
        weight=weight.to(dtype),
        logits=logits.to(dtype),
        targets=targets,
        mask=mask,
        old=old.to(dtype),
        sampling=sampling.to(dtype),
        reference=(current + 0.4 * normal(B, T)).to(dtype),
        truncated=torch.tensor([False, True, False]),
        is_sampled=False,  # whether the sampler's log-probabilities are known without a correction for them
        per_response=torch.tensor([1.3, -0.8, 0.6], dtype=dtype),
        per_token=normal(B, T).to(dtype),
    )


class OneProcess:
    """What ``_compute_loss`` asks of accelerate, in a single process."""

    num_processes = 1
    sync_gradients = True

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1)

    def pad_across_processes(self, tensor: Tensor, **_: Any) -> Tensor:
        return tensor

    def reduce(self, tensor: Tensor, **_: Any) -> Tensor:
        return tensor


def sampler_correction_statement() -> ast.stmt:
    """Return TRL's statement that computes ``vllm_importance_sampling_ratio``, found by what it assigns."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(Trainer._generate_and_score_completions)))
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        and "vllm_importance_sampling_correction" in ast.unparse(node.test)
        and any("vllm_importance_sampling_ratio = torch.exp(" in ast.unparse(line) for line in node.body)
    ]
    assert len(found) == 1, "TRL moved its sampler correction; find it again"
    return found[0]


SAMPLER_CORRECTION = compile(ast.Module([sampler_correction_statement()], []), "trl sampler correction", "exec")


def trl_loss(logits: Tensor, batch: SimpleNamespace, config: GRPOLossConfig, **inputs: Any) -> tuple[Tensor, dict]:
    """Return TRL's loss of ``logits`` and the metrics that it logs."""

    def statistics(*_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        scaled = logits / config.temperature
        return trl_utils.selective_log_softmax(scaled, batch.targets), trl_utils.entropy_from_logits(scaled), None

    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=statistics,
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=config.entropy_coef != 0,
        accelerator=OneProcess(),
        args=SimpleNamespace(
            delta=config.delta,
            use_bias_correction_kl=config.use_bias_correction_kl,
            steps_per_generation=1,
            sapo_temperature_pos=config.sapo_temperature_pos,
            sapo_temperature_neg=config.sapo_temperature_neg,
            vespo_k_pos=config.vespo_k_pos,
            vespo_lambda_pos=config.vespo_lambda_pos,
            vespo_k_neg=config.vespo_k_neg,
            vespo_lambda_neg=config.vespo_lambda_neg,
        ),
        aux_loss_enabled=False,
        beta=config.beta,
        current_gradient_accumulation_steps=1,
        entropy_coef=config.entropy_coef,
        epsilon_high=config.epsilon_high,
        epsilon_low=config.epsilon_low,
        importance_sampling_level=config.importance_sampling_level,
        loss_type=config.loss_type,
        max_completion_length=config.max_completion_length,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=config.off_policy_mask_threshold,
        top_entropy_quantile=config.top_entropy_quantile,
        use_adaptive_entropy=False,
        use_vllm=config.sampler_ratio_cap is not None,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=config.sampler_ratio_mode,
        vllm_importance_sampling_clip_max=config.sampler_ratio_cap,
        vllm_importance_sampling_clip_min=config.sampler_ratio_floor,
    )
    trainer.get_off_policy_mask = Trainer.get_off_policy_mask
    trainer.get_gamma_weights = Trainer.get_gamma_weights
    trainer.get_high_entropy_mask = Trainer.get_high_entropy_mask.__get__(trainer)
    mask = batch.mask.long()
    if config.mask_truncated_completions:
        mask = mask * ~batch.truncated[:, None]
    if trainer.use_vllm or batch.is_sampled:
        inputs["sampling_per_token_logps"] = batch.sampling
    if trainer.use_vllm:
        names = {
            "self": trainer,
            "completion_mask": mask,
            "tool_mask": None,
            "old_per_token_logps": inputs["old_per_token_logps"],
            "sampling_per_token_logps": batch.sampling,
        }
        exec(SAMPLER_CORRECTION, vars(grpo_trainer), names)
        inputs["importance_sampling_ratio"] = names["vllm_importance_sampling_ratio"]
    inputs |= {
        "prompt_ids": torch.zeros(B, PROMPT, dtype=torch.long),
        "prompt_mask": torch.ones(B, PROMPT, dtype=torch.long),
        "completion_ids": batch.targets,
        "completion_mask": mask,
        "num_items_in_batch": mask.sum(),
        "ref_per_token_logps": batch.reference,
    }
    return Trainer._compute_loss(trainer, trainer.model, inputs), trainer._metrics["train"]


def assert_parity(batch: SimpleNamespace, config: GRPOLossConfig, advantages: Tensor, with_old: bool) -> None:
    """Compare loss, gradient and metrics, from logits and from hidden states, with TRL's."""
    dtype = batch.logits.dtype
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    logits = batch.logits.clone().requires_grad_()
    old = {"old_per_token_logps": batch.old} if with_old else {}
    expected, logged = trl_loss(logits, batch, config, advantages=advantages, **old)
    (expected_gradient,) = torch.autograd.grad(expected, logits)

    options = {
        "advantages": advantages,
        "old_logprobs": batch.old if with_old else None,
        "ref_logprobs": batch.reference if config.beta else None,
        "sampling_logprobs": batch.sampling if batch.is_sampled or config.sampler_ratio_cap is not None else None,
        "truncated_mask": batch.truncated,
        "config": config,
    }
    out = edge_grpo_loss(logits, batch.targets, batch.mask, **options)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    torch.testing.assert_close(out.loss, expected, check_dtype=False, **tolerance)
    torch.testing.assert_close(gradient, expected_gradient, **tolerance)

    hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()
    linear = linear_edge_grpo_loss(hidden, weight, batch.targets, batch.mask, **options)
    d_hidden, d_weight = torch.autograd.grad(linear.loss, (hidden, weight))
    torch.testing.assert_close(linear.loss, expected, check_dtype=False, **tolerance)
    torch.testing.assert_close(d_hidden, expected_gradient @ batch.weight, **tolerance)
    torch.testing.assert_close(d_weight, expected_gradient.flatten(0, 1).T @ batch.hidden.flatten(0, 1), **tolerance)

    for metrics in (out.metrics, linear.metrics):
        assert_metrics_agree(metrics, logged, config)


def assert_metrics_agree(metrics: dict[str, Tensor], logged: dict[str, list[float]], config: GRPOLossConfig) -> None:
    per_token = {name: (value / metrics["tokens"]).item() for name, value in metrics.items()}
    ours = {"entropy": per_token["entropy_sum"]}
    if config.beta:
        ours["kl"] = per_token["kl_sum"]
    if config.importance_sampling_level == "token" and config.off_policy_mask_threshold is None:
        # TRL's mean over sequences is not one over tokens, and it counts tokens whose term the off-policy mask dropped.
        if config.loss_type == "cispo":
            ours["cispo_clip_ratio"] = per_token["clip_high"]
        elif config.loss_type not in ("sapo", "vespo"):  # which clip nothing
            ours |= {f"clip_ratio/{side}_mean": per_token[f"clip_{side}"] for side in ("low", "high", "region")}
    for name, value in ours.items():
        assert value == pytest.approx(logged[name][-1], rel=1e-4, abs=1e-6), name


def config_of(loss_type: str, level: str, **options: Any) -> GRPOLossConfig:
    # cispo's epsilon_high is the cap itself; 1.1 caps some ratios of the batch. The others clip asymmetrically.
    high = 1.1 if loss_type == "cispo" else 0.28
    return GRPOLossConfig(
        **{
            "loss_type": loss_type,
            "importance_sampling_level": level,
            "epsilon_low": 0.15,
            "epsilon_high": high,
            "temperature": TEMPERATURE,
            "max_completion_length": MAX_COMPLETION_LENGTH,
            "vespo_k_pos": 1.5,
            "vespo_lambda_pos": 0.75,
            "sapo_temperature_pos": 1.5,  # TRL's defaults are both near 1, which would hide a confusion
            "sapo_temperature_neg": 0.75,  # TRL rounds them to float32
            **options,
        }
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_variant_with_every_option_in_float64(loss_type: str, level: str) -> None:
    batch = make_batch(0, torch.float64)
    deltas = (None,) if loss_type in ("cispo", "sapo", "vespo") else (None, 1.2)
    # 0.55 and 22 tokens: the quantile falls between two of them, where rounding (TRL's is in float32) decides nothing.
    grid = itertools.product(
        deltas, (0.0, 0.04), (0.0, 0.02), (1.0, 0.55), (False, True), ("per_response", "per_token")
    )
    for delta, beta, entropy_coef, quantile, with_old, advantages in grid:
        config = config_of(
            loss_type, level, delta=delta, beta=beta, entropy_coef=entropy_coef, top_entropy_quantile=quantile
        )
        for corrects in (True, False) if beta else (True,):  # TRL's default first
            config = replace(config, use_bias_correction_kl=corrects)
            assert_parity(batch, config, getattr(batch, advantages), with_old)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_sampler_correction_in_float64(loss_type: str, mode: str) -> None:
    if loss_type == "vespo" and mode.startswith("sequence"):
        pytest.skip("TRL and the configuration refuse it")
    batch = make_batch(1, torch.float64)
    for level, floor, beta in itertools.product(("token", "sequence"), (0.0, 0.8), (0.0, 0.04)):
        config = config_of(
            loss_type, level, beta=beta, sampler_ratio_cap=1.15, sampler_ratio_floor=floor, sampler_ratio_mode=mode
        )
        assert_parity(batch, config, batch.per_response, with_old=True)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_sequences_off_policy_or_truncated_are_masked(loss_type: str) -> None:
    """Means on both sides of the threshold; the second response is truncated, the third has one token."""
    for seed, is_sampled, advantages in itertools.product((1, 4), (False, True), ("per_response", "per_token")):
        batch = make_batch(seed, torch.float64)
        batch.per_response = -batch.per_response
        batch.is_sampled = is_sampled
        config = config_of(loss_type, "token", beta=0.04, off_policy_mask_threshold=0.05)
        assert_parity(batch, config, getattr(batch, advantages), with_old=True)
        assert_parity(batch, replace(config, mask_truncated_completions=True), getattr(batch, advantages), True)
        assert_parity(batch, replace(config, sampler_ratio_cap=1.15), getattr(batch, advantages), with_old=True)


def test_what_a_mask_drops_is_counted() -> None:
    batch = make_batch(1, torch.float64)
    config = config_of("dapo", "token", off_policy_mask_threshold=0.05, mask_truncated_completions=True)
    options = {"advantages": batch.per_response, "truncated_mask": batch.truncated, "config": config}
    logprobs = edge_grpo_loss(batch.logits, batch.targets, batch.mask, **options).logprobs
    old = logprobs + torch.tensor([[0.04], [9.0], [0.06]], dtype=torch.float64)  # a mean of 0.05 is tolerated
    for advantages, dropped in ((-1.0, 1), (1.0, 0)):
        options["advantages"] = torch.full((B,), advantages, dtype=torch.float64)
        metrics = edge_grpo_loss(batch.logits, batch.targets, batch.mask, old_logprobs=old, **options).metrics
        assert (metrics["truncated_sequences"], metrics["truncated_tokens"]) == (1, 8)
        assert (metrics["off_policy_sequences"], metrics["off_policy_tokens"]) == (dropped, dropped)  # of one token


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_variant_in_float32(loss_type: str, level: str) -> None:
    batch = make_batch(2, torch.float32)
    config = config_of(loss_type, level, beta=0.04, entropy_coef=0.02)
    assert_parity(batch, config, batch.per_response, with_old=True)


def test_the_batches_reach_every_branch() -> None:
    """The comparisons above would prove little if no ratio were clipped, capped, or masked."""
    for seed in (0, 1, 2):
        batch = make_batch(seed, torch.float64)
        options = {"advantages": batch.per_token, "old_logprobs": batch.old, "sampling_logprobs": batch.sampling}
        out = edge_grpo_loss(batch.logits, batch.targets, batch.mask, **options, config=config_of("dapo", "token"))
        assert out.metrics["clip_low"] > 0
        assert out.metrics["clip_high"] > 0
        assert out.metrics["ratio_max"] > 1.28
    ratio = (batch.old - batch.sampling)[batch.mask].exp()
    assert (ratio > 1.15).any()
    assert (ratio < 0.8).any()


def test_a_completion_that_is_masked_throughout() -> None:
    batch = make_batch(3, torch.float64)
    batch.mask[1] = False
    for loss_type in LOSS_TYPES:
        assert_parity(batch, config_of(loss_type, "token", beta=0.04), batch.per_response, with_old=True)
