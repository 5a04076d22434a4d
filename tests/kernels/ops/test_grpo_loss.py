"""The losses around what TRL can check: every path against the reference, totals, injected tokens, invariants.

Which loss is computed is held against TRL in test_trl_parity.py and against hand-worked numbers in test_reference.py.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from error_budget import assert_within_budget
from grpo_batch import (
    ALL_PATHS,
    LOSS_TYPES,
    B,
    Path,
    T,
    V,
    config_of,
    from_hidden,
    from_logits,
    from_reference,
    gradients,
    inputs_for,
    make_batch,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_kernels import EDAConfig, edge_grpo_loss, entropy_driven_advantages, group_advantages, reference, token_stats
from edge_kernels.config import ImportanceLevel, InjectedTreatment, SamplerRatioMode

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("treatment", InjectedTreatment.__args__)
@pytest.mark.parametrize("level", ImportanceLevel.__args__)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_path_is_the_reference(loss_type: str, level: str, treatment: str) -> None:
    """Also where TRL has nothing to compare with: injected tokens, missing records, one sweep with a quantile."""
    batch = make_batch()
    modes: tuple[str | None, ...] = (None, *SamplerRatioMode.__args__)
    if loss_type not in ("dapo", "cispo", "sapo", "geo_mean"):  # the others differ from dapo in their normalizer
        modes = (None, "token_mask")
    options = itertools.product((False, True), (1.0, 0.5), modes, (False, True))
    for penalties, quantile, sampler_mode, with_old in options:
        config = config_of(
            loss_type,
            importance_sampling_level=level,
            injected=treatment,
            sft_weight=0.7,
            delta=1.3,
            beta=0.04 if penalties else 0.0,
            entropy_coef=0.02 if penalties else 0.0,
            top_entropy_quantile=quantile,
            sampler_ratio_cap=None if sampler_mode is None else 1.2,
            sampler_ratio_mode=sampler_mode or "token_truncate",
            off_policy_mask_threshold=0.1 if penalties and with_old else None,
            mask_truncated_completions=penalties and not with_old,
        )
        inputs = inputs_for(batch, config, with_old=with_old)
        expected = from_reference(batch, **inputs)
        expected_gradients = gradients(expected, batch)
        # With the totals and the threshold given, what needed two sweeps takes one.
        threshold = None
        if quantile < 1:
            counted = expected.logprobs != 0
            threshold = expected.entropy[counted].quantile(1 - quantile) - 1e-9  # a token may lie on it
        items = (expected.logprobs != 0).sum()
        one_sweep = lambda b, **o: from_hidden(b, num_items=items, entropy_threshold=threshold, **o)  # noqa: B023, E731
        for path in (*ALL_PATHS, one_sweep):
            out = path(batch, **inputs)
            torch.testing.assert_close(out.loss, expected.loss, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(gradients(out, batch), expected_gradients, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(out.logprobs, expected.logprobs)
            torch.testing.assert_close(out.entropy, expected.entropy)
            assert not out.logprobs.requires_grad
            assert not out.entropy.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_as_exact_as_plain_pytorch(dtype: torch.dtype) -> None:
    batch, wide = make_batch(dtype=dtype), make_batch()
    for name in ("hidden", "weight", "bias"):  # the same rounded numbers, in float64
        setattr(wide, name, getattr(batch, name).detach().double().requires_grad_())
    config = config_of("grpo", beta=0.04, entropy_coef=0.02)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    exact, plain = from_reference(wide, **inputs_for(wide, config)), from_reference(batch, **inputs_for(batch, config))
    exact_gradients, plain_gradients = gradients(exact, wide), gradients(plain, batch)
    for path in ALL_PATHS:
        out = path(batch, **inputs_for(batch, config))
        assert out.loss.dtype == torch.float32
        assert_within_budget(out.loss, plain.loss, exact.loss, tolerance=tolerance, name="loss")
        results = gradients(out, batch), plain_gradients, exact_gradients
        for name, *values in zip(("hidden", "weight", "bias"), *results, strict=True):
            assert values[0].dtype == dtype
            assert_within_budget(*values, tolerance=tolerance, name=f"gradient of {name}")


class TestEntropyDrivenAdvantages:
    @pytest.mark.parametrize("path", ALL_PATHS)
    def test_rewards_give_what_advantages_formed_beforehand_give(self, path: Path) -> None:
        batch = make_batch()
        config = config_of(eda=EDAConfig(preserve_scale=True, scale_rewards=False))
        stats = reference.linear_token_stats(
            batch.hidden, batch.weight, batch.targets.masked_fill(~batch.mask, -100), batch.bias
        )
        advantages = entropy_driven_advantages(batch.rewards, stats.entropy, batch.mask, batch.groups, config.eda)
        out = path(batch, rewards=batch.rewards, group_ids=batch.groups, config=config)
        expected = path(batch, advantages=advantages, config=config)
        torch.testing.assert_close(out.advantages, advantages)
        torch.testing.assert_close(out.loss, expected.loss)
        torch.testing.assert_close(gradients(out, batch), gradients(expected, batch))

    def test_a_group_of_equal_rewards_teaches_nothing(self) -> None:
        batch = make_batch()
        for path in ALL_PATHS:
            out = path(batch, rewards=torch.full((B,), 0.1), group_ids=batch.groups)
            assert out.loss == 0
            assert all((gradient == 0).all() for gradient in gradients(out, batch))


class TestTotals:
    @pytest.mark.parametrize("path", ALL_PATHS)
    @pytest.mark.parametrize("loss_type", LOSS_TYPES)
    def test_micro_batches_add_up_exactly(self, loss_type: str, path: Path) -> None:
        batch = make_batch()
        for quantile, treatment in itertools.product((1.0, 0.5), ("credit", "mask")):
            config = config_of(
                loss_type, beta=0.04, entropy_coef=0.02, top_entropy_quantile=quantile, injected=treatment
            )
            whole = path(batch, **inputs_for(batch, config))
            expected = gradients(whole, batch)
            counted = batch.mask & ~batch.injected if treatment == "mask" else batch.mask
            totals = {
                "num_items": counted.sum(),
                "num_sequences": B,
                "entropy_threshold": whole.entropy[counted].quantile(1 - quantile),
            }
            loss, metrics, sums = 0.0, dict.fromkeys(whole.metrics, 0.0), [torch.zeros_like(g) for g in expected]
            for rows in (slice(0, 1), slice(1, 3), slice(3, 4)):
                part = SimpleNamespace(**{k: v[rows] for k, v in vars(batch).items() if k not in ("weight", "bias")})
                part.weight, part.bias, part.hidden = batch.weight, batch.bias, batch.hidden[rows]
                out = path(part, **inputs_for(part, config), **totals)
                loss += out.loss.detach()
                for total, gradient in zip(sums, gradients(out, batch), strict=True):
                    total += gradient
                for name, value in out.metrics.items():
                    combine = max if name.endswith("_max") else float.__add__
                    metrics[name] = combine(metrics[name], value.item())
            torch.testing.assert_close(loss, whole.loss.detach(), rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(sums, list(expected), rtol=1e-12, atol=1e-14)
            assert metrics == pytest.approx({name: value.item() for name, value in whole.metrics.items()})

    def test_totals_may_be_numbers_or_tensors(self) -> None:
        batch = make_batch()
        for loss_type in LOSS_TYPES:
            config = config_of(loss_type, entropy_coef=0.1)
            number = from_hidden(batch, advantages=batch.advantages, config=config, num_items=40, num_sequences=9)
            totals = {"num_items": torch.tensor(40.0), "num_sequences": torch.tensor(9)}
            tensor = from_logits(batch, advantages=batch.advantages, config=config, **totals)
            torch.testing.assert_close(number.loss, tensor.loss)

    def test_metrics_are_sums_over_the_tokens_that_count(self) -> None:
        batch = make_batch()
        config = config_of(beta=0.04, sampler_ratio_cap=1.2, sampler_ratio_mode="token_mask")
        out = from_hidden(batch, **inputs_for(batch, config))
        mask, old = batch.mask, batch.old.where(~batch.old.isnan(), out.logprobs)
        ratio = (out.logprobs - old).exp()[mask]
        A = batch.advantages[:, None].expand(B, T)[mask]
        correction = (old - batch.sampling).nan_to_num(nan=0.0).exp()[mask]
        low, high = ((ratio < 0.8) & (A < 0)).sum(), ((ratio > 1.28) & (A > 0)).sum()
        kl = (batch.ref - out.logprobs).exp() - (batch.ref - out.logprobs) - 1
        expected = {
            "tokens": mask.sum(),
            "entropy_sum": out.entropy.sum(),
            "ratio_sum": ratio.sum(),
            "ratio_max": ratio.max(),
            "clip_low": low,
            "clip_high": high,
            "clip_region": low + high,
            "kl_sum": (kl[mask] * ratio).sum(),  # corrected for bias, as TRL does by default
            "kl_bounded": torch.tensor(0),
            "sampler_ratio_sum": correction[correction <= 1.2].sum(),
            "sampler_ratio_max": correction[correction <= 1.2].max(),
        }
        assert {k: v.item() for k, v in out.metrics.items()} == pytest.approx(
            {k: v.item() for k, v in expected.items()}
        )
        assert set(from_logits(batch, advantages=batch.advantages).metrics) == {
            name for name in expected if not name.startswith(("kl", "sampler"))
        }


class TestInjected:
    def test_credit_without_a_mask_is_the_same_as_with_it(self) -> None:
        batch = make_batch()
        inputs = inputs_for(batch, config_of())
        expected = from_logits(batch, **inputs)
        inputs["injected_mask"] = None
        torch.testing.assert_close(from_logits(batch, **inputs).loss, expected.loss)

    @pytest.mark.parametrize("path", ALL_PATHS)
    def test_masked_tokens_leave_everything(self, path: Path) -> None:
        batch = make_batch()
        config = config_of(injected="mask", beta=0.04, entropy_coef=0.1, top_entropy_quantile=0.5)
        masked = path(batch, **inputs_for(batch, config))
        expected = gradients(masked, batch)
        batch.mask = batch.mask & ~batch.injected
        without = path(batch, **inputs_for(batch, config_of(beta=0.04, entropy_coef=0.1, top_entropy_quantile=0.5)))
        torch.testing.assert_close(masked.loss, without.loss)
        torch.testing.assert_close(expected, gradients(without, batch))
        assert masked.metrics["tokens"] == batch.mask.sum()
        rewards = {"rewards": batch.rewards, "group_ids": batch.groups}
        driven = path(batch, injected_mask=batch.injected, config=config_of(injected="mask"), **rewards)
        torch.testing.assert_close(driven.advantages, path(batch, **rewards).advantages)

    @pytest.mark.parametrize("treatment", ["sft", "shaped"])
    def test_the_policys_own_tokens_are_untouched_by_the_treatment(self, treatment: str) -> None:
        batch = make_batch()
        logits = F.linear(batch.hidden, batch.weight, batch.bias).detach().requires_grad_()
        gradient = {}
        for name in ("credit", treatment):
            inputs = inputs_for(batch, config_of(injected=name))
            (gradient[name],) = torch.autograd.grad(
                edge_grpo_loss(logits, batch.targets, batch.mask, **inputs).loss, logits
            )
        own = batch.mask & ~batch.injected
        torch.testing.assert_close(gradient[treatment][own], gradient["credit"][own])
        there = batch.mask & batch.injected
        assert (gradient[treatment][there] != gradient["credit"][there]).any()


@given(
    st.permutations(range(B)), st.integers(0, 3), st.sampled_from(LOSS_TYPES), st.sampled_from(["token", "sequence"])
)
@settings(deadline=None, max_examples=40)
def test_the_order_of_responses_and_padding_do_not_matter(order, padding: int, loss_type: str, level: str) -> None:
    batch = make_batch()
    config = config_of(loss_type, importance_sampling_level=level, beta=0.04, entropy_coef=0.1)
    expected = from_hidden(batch, **inputs_for(batch, config))
    moved = SimpleNamespace(weight=batch.weight, bias=batch.bias)
    for name, value in vars(batch).items():
        if name not in ("weight", "bias"):
            value = value.detach()[list(order)]
            if value.dim() > 1:
                pad = torch.zeros(B, padding, *value.shape[2:], dtype=value.dtype)
                value = torch.cat([value, pad], dim=1)
            setattr(moved, name, value)
    torch.testing.assert_close(from_hidden(moved, **inputs_for(moved, config)).loss, expected.loss)


@given(st.integers(0, 10**6), st.sampled_from(LOSS_TYPES))
@settings(deadline=None, max_examples=25)
def test_on_policy_every_loss_has_the_gradient_of_reinforce(seed: int, loss_type: str) -> None:
    """With ratio 1 all variants are -A * logprob in gradient; they differ in normalization only."""
    batch = make_batch(seed)
    logits = F.linear(batch.hidden, batch.weight, batch.bias).detach().requires_grad_()
    config = config_of(loss_type, **({"epsilon_high": 1.0} if loss_type == "cispo" else {}))
    out = edge_grpo_loss(logits, batch.targets, batch.mask, advantages=batch.advantages, config=config)
    (actual,) = torch.autograd.grad(out.loss, logits)
    lengths = batch.mask.sum(-1, keepdim=True).clamp(min=1)
    of_sequence = 1 / (lengths * B)
    weight = {"grpo": of_sequence, "sapo": of_sequence, "geo_mean": of_sequence, "luspo": 1 / B, "dr_grpo": 1 / (B * 7)}
    weight = weight.get(loss_type, 1 / batch.mask.sum())
    logprobs = token_stats(logits, batch.targets.masked_fill(~batch.mask, -100)).logprobs
    reinforce = -(batch.advantages[:, None] * logprobs * weight).sum()
    torch.testing.assert_close(actual, torch.autograd.grad(reinforce, logits)[0])


def test_three_lines_are_enough() -> None:
    """The shortest use: a group of two, rewards in, gradient out."""
    logits, targets = torch.randn(2, 3, V, requires_grad=True), torch.randint(V, (2, 3))
    advantages = group_advantages(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
    edge_grpo_loss(logits, targets, torch.ones(2, 3, dtype=torch.bool), advantages=advantages).loss.backward()
    assert logits.grad is not None
    assert logits.grad[0, 0, targets[0, 0]] < 0 < logits.grad[1, 0, targets[1, 0]]
