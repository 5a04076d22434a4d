"""The token loss and the one-sweep loss of Triton: every variant against the reference in float64, values, gradients
and metrics.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scaled_gradients import SCALES, check_head_gradients, check_logits_gradient, check_overflow
from torch import Tensor

from edge_kernels import GRPOLossConfig, edge_grpo_loss, use_backend
from edge_kernels.backends.plain import token_loss as specification
from edge_kernels.backends.triton import token_loss
from edge_kernels.contract import METRICS, LossRule, TokenTerms

B, T, V = 3, 7, 37

CONFIGS = {
    "dapo": {},
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 9},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "sapo": {"loss_type": "sapo", "sapo_temperature_neg": 2.5, "beta": 0.04},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "geo_mean": {"loss_type": "geo_mean", "beta": 0.04},
    "vespo": {"loss_type": "vespo", "sampler_ratio_cap": 1.1},
    "clipped": {"epsilon_low": 0.05, "epsilon_high": 0.1, "delta": 1.2, "beta": 0.1},
    "sequence": {"importance_sampling_level": "sequence", "beta": 0.05},
    "bonus": {"entropy_coef": 0.1},
    "quantile": {"top_entropy_quantile": 0.5, "entropy_coef": 0.1},
    "sampler, truncated": {"sampler_ratio_cap": 1.1, "sampler_ratio_floor": 0.9},
    "sampler, masked": {"sampler_ratio_cap": 1.1, "sampler_ratio_mode": "token_mask"},
    "sampler, sequences truncated": {"sampler_ratio_cap": 1.1, "sampler_ratio_mode": "sequence_truncate"},
    "sampler, sequences masked": {"sampler_ratio_cap": 1.1, "sampler_ratio_mode": "sequence_mask"},
    "injected, masked": {"injected": "mask"},
    "injected, sft": {"injected": "sft", "sft_weight": 0.3},
    "injected, shaped": {"injected": "shaped", "shaped_gamma": 0.2},
    "softcap": {"temperature": 0.6, "softcap": 4.0, "logit_scale": 1.5},
}


def make_batch(config: GRPOLossConfig, recorded: bool) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def noisy(logprobs: Tensor) -> Tensor:
        return (logprobs + 0.3 * torch.randn(B, T, generator=generator)).float()

    logits = 3 * torch.randn(B, T, V, generator=generator)
    targets = torch.randint(V, (B, T), generator=generator)
    mask = torch.rand(B, T, generator=generator) > 0.2
    mask[1] = False  # a response in which nothing counts
    logprobs = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    old, ref, sampling = noisy(logprobs), noisy(logprobs), noisy(logprobs)
    old[0, 1] = sampling[2, 2] = math.nan  # tokens without a record
    options: dict[str, Any] = {"advantages": torch.tensor([1.5, 1.0, -0.7]), "ref_logprobs": ref}
    if recorded:
        options["old_logprobs"] = old
    if config.sampler_ratio_cap is not None:
        options["sampling_logprobs"] = sampling
    if config.injected != "credit":
        options["injected_mask"] = torch.rand(B, T, generator=generator) > 0.6
    return (logits, targets, mask), options


@pytest.mark.parametrize(("recorded", "inplace"), [(True, False), (False, True)], ids=["old_logprobs", "on policy"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_variant_from_logits(name: str, recorded: bool, inplace: bool) -> None:
    config = GRPOLossConfig(**CONFIGS[name])
    (logits, targets, mask), options = make_batch(config, recorded)
    wide = logits.double().requires_grad_()
    with use_backend("reference"):
        exact = edge_grpo_loss(wide, targets, mask, config=config, **options)
        (expected,) = torch.autograd.grad(exact.loss, wide)
    leaf = logits.requires_grad_()
    out = edge_grpo_loss(leaf * 1, targets, mask, config=config, inplace=inplace, **options)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    for actual, value in zip(out[:3], exact[:3], strict=True):
        torch.testing.assert_close(actual.double(), value, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=2e-6 * max(1, expected.abs().max().item()))
    assert out.metrics.keys() == exact.metrics.keys()
    for key, metric in out.metrics.items():
        torch.testing.assert_close(metric.double(), exact.metrics[key].double(), rtol=1e-5, atol=1e-5, msg=key)


# One whose coefficients a kernel knows, and one whose ratio is made between two sweeps.
@pytest.mark.parametrize("name", ["clipped", "sequence"])
def test_packed_tokens(name: str) -> None:
    config = GRPOLossConfig(**CONFIGS[name])
    (logits, targets, mask), options = make_batch(config, True)
    with use_backend("reference"):
        exact = edge_grpo_loss(logits.double().requires_grad_(), targets, mask, config=config, **options)
    per_token = {"old_logprobs", "ref_logprobs"}
    flat = {key: value.flatten() if key in per_token else value for key, value in options.items()}
    cu_seqlens = torch.arange(0, B * T + 1, T)
    tokens = (logits.flatten(0, 1).requires_grad_(), targets.flatten(), mask.flatten())
    out = edge_grpo_loss(*tokens, config=config, cu_seqlens=cu_seqlens, **flat)
    assert torch.autograd.grad(out.loss, tokens[0])[0].isfinite().all()
    torch.testing.assert_close(out.loss.double(), exact.loss, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(out.entropy.double(), exact.entropy.flatten(), rtol=1e-5, atol=2e-6)


# 2,100: several programs of 1,024 tokens and a rest, or a sequence in several blocks. 3: less than the smallest block.
@pytest.mark.parametrize("length", [3, 2100])
@pytest.mark.parametrize("name", ["clipped", "sapo", "sequence", "geo_mean", "sampler, sequences masked"])
def test_the_token_loss_of_long_sequences(name: str, length: int) -> None:
    generator = torch.Generator().manual_seed(1)

    def random() -> Tensor:
        return torch.randn(2, length, generator=generator) * 0.3

    config = GRPOLossConfig(**CONFIGS[name])
    logprobs, entropy = random() - 2, random().abs()
    mask = torch.rand(2, length, generator=generator) > 0.3
    logprobs[~mask] = math.nan  # what is masked is not looked at
    old = logprobs + random()
    old[0, ::5] = math.nan
    terms = TokenTerms(
        mask=mask,
        weight=torch.tensor(1 / length).expand(2, length),  # not contiguous
        advantages=random(),
        old_logprobs=old,
        ref_logprobs=logprobs + random(),
        sampler_ratio=None,
        sampling_logprobs=logprobs + random() if config.sampler_ratio_cap is not None else None,
        injected=None,
        entropy_threshold=torch.tensor(0.1),
        bonus_weight=torch.tensor(1e-3),
    )
    rule = LossRule.of(config)
    wide = TokenTerms(*(t.double() if t is not None and t.is_floating_point() else t for t in terms))
    exact = specification(logprobs.double(), entropy.double(), wide, rule)
    actual = token_loss(logprobs, entropy, terms, rule)
    for field, value in zip(exact._fields, exact, strict=True):
        got = getattr(actual, field).double()
        torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-6, msg=lambda m, f=field: f"{f} {m}")


def test_what_is_not_a_number_is_seen() -> None:
    """A NaN in a row that counts gives a NaN loss and NaN sums, also where a maximum is taken."""
    config = GRPOLossConfig()
    (logits, targets, mask), options = make_batch(config, True)
    logits[0, 0, 3], mask[0, 0] = math.nan, True
    out = edge_grpo_loss(logits.requires_grad_(), targets, mask, config=config, **options)
    assert out.loss.isnan()
    assert out.metrics["ratio_max"].isnan()
    assert out.metrics["tokens"] == mask.sum()


def test_nothing_at_all() -> None:
    logits = torch.zeros(2, 0, 5).requires_grad_()
    mask = torch.zeros(2, 0, dtype=torch.bool)
    out = edge_grpo_loss(logits, torch.zeros(2, 0, dtype=torch.long), mask, advantages=torch.ones(2))
    assert out.loss == 0
    assert len(METRICS) >= len(out.metrics)
    (logits, targets, mask), options = make_batch(GRPOLossConfig(), True)
    out = edge_grpo_loss(logits.requires_grad_(), targets, torch.zeros_like(mask), **options)
    assert out.loss == 0
    assert (torch.autograd.grad(out.loss, logits)[0] == 0).all()


def test_entropy_driven_advantages_take_two_sweeps() -> None:
    (logits, targets, mask), _ = make_batch(GRPOLossConfig(), False)
    rewards, groups = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0, 0, 0])
    mask[1] = True
    wide = logits.double().requires_grad_()
    with use_backend("reference"):
        exact = edge_grpo_loss(wide, targets, mask, rewards=rewards, group_ids=groups)
        (expected,) = torch.autograd.grad(exact.loss, wide)
    leaf = logits.requires_grad_()
    out = edge_grpo_loss(leaf, targets, mask, rewards=rewards, group_ids=groups)
    torch.testing.assert_close(out.advantages.double(), exact.advantages, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(out.loss, leaf)[0].double(), expected, rtol=0, atol=2e-6)


def test_no_factor_is_left_out_before_float16_rounds() -> None:
    check_logits_gradient(SCALES[0], GRPOLossConfig(), inplace=False)
    check_logits_gradient(SCALES[1], GRPOLossConfig(entropy_coef=0.01), inplace=True)
    check_head_gradients(SCALES[0], GRPOLossConfig())


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # the interpreter's, at every infinity
def test_what_is_too_large_for_float16_is_infinite() -> None:
    check_overflow()
