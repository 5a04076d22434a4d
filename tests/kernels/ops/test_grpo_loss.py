"""The losses around what TRL can check: totals, injected tokens, special values, sweeps, errors, PyTorch's machinery.

Which loss is computed is held against TRL in test_trl_parity.py and against hand-worked numbers in test_reference.py.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from error_budget import assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from edge_kernels import (
    EDAConfig,
    GRPOLossConfig,
    GRPOLossOutput,
    edge_grpo_loss,
    entropy_driven_advantages,
    group_advantages,
    linear_edge_grpo_loss,
    reference,
    token_stats,
    use_backend,
)
from edge_kernels.config import ImportanceLevel, InjectedTreatment, LossType, SamplerRatioMode
from edge_kernels.ops.grpo_loss import grpo_loss_op
from edge_kernels.ops.linear_grpo_loss import linear_grpo_loss_op
from edge_kernels.ops.token_loss import token_loss_op

B, T, D, V = 4, 6, 5, 13
LOSS_TYPES = LossType.__args__
MODULE = sys.modules["edge_kernels.ops.grpo_loss"]
LINEAR = sys.modules["edge_kernels.ops.linear_grpo_loss"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """A few hundred numbers a tensor: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = normal(B, T, D), normal(V, D), normal(V)
    targets = torch.randint(V, (B, T), generator=generator)
    mask = torch.arange(T) < torch.tensor([T, 4, 0, 2])[:, None]  # one response is masked throughout
    targets[~mask] = 99  # padding need not be a token of the vocabulary
    stats = reference.linear_token_stats(hidden, weight, targets.masked_fill(~mask, -100), bias)
    injected = torch.rand(B, T, generator=generator) < 0.3
    injected[1, 1] = True
    old, ref = stats.logprobs + 0.4 * normal(B, T), stats.logprobs + 0.4 * normal(B, T)
    sampling = old + 0.4 * normal(B, T)
    old[1, 1] = sampling[1, 1] = math.nan  # an injected token without a record
    advantages = normal(B)
    advantages[3] = 0
    return SimpleNamespace(
        hidden=hidden.to(dtype).requires_grad_(),
        weight=weight.to(dtype).requires_grad_(),
        bias=bias.to(dtype).requires_grad_(),
        targets=targets,
        mask=mask,
        injected=injected,
        advantages=advantages,
        old=old,
        ref=ref,
        sampling=sampling,
        rewards=torch.tensor([1.0, 0.0, 0.5, 1.0], dtype=torch.float64),
        groups=torch.tensor([4, 4, 1, 1]),
    )


def config_of(loss_type: str = "dapo", **options: Any) -> GRPOLossConfig:
    return GRPOLossConfig(**{"loss_type": loss_type, "max_completion_length": 7, "epsilon_high": 0.28, **options})


def inputs_for(batch: SimpleNamespace, config: GRPOLossConfig, *, with_old: bool = True) -> dict[str, Any]:
    return {
        "advantages": batch.advantages,
        "old_logprobs": batch.old if with_old else None,
        "ref_logprobs": batch.ref if config.beta else None,
        "sampling_logprobs": batch.sampling if config.sampler_ratio_cap is not None else None,
        "injected_mask": batch.injected,
        "config": config,
    }


def from_logits(batch: SimpleNamespace, **options: Any) -> GRPOLossOutput:
    return edge_grpo_loss(F.linear(batch.hidden, batch.weight, batch.bias), batch.targets, batch.mask, **options)


def from_logits_inplace(batch: SimpleNamespace, **options: Any) -> GRPOLossOutput:
    return from_logits(batch, inplace=True, **options)


def from_hidden(batch: SimpleNamespace, **options: Any) -> GRPOLossOutput:
    return linear_edge_grpo_loss(batch.hidden, batch.weight, batch.targets, batch.mask, batch.bias, **options)


def from_reference(batch: SimpleNamespace, **options: Any) -> GRPOLossOutput:
    return reference.linear_edge_grpo_loss(batch.hidden, batch.weight, batch.targets, batch.mask, batch.bias, **options)


Path = Callable[..., GRPOLossOutput]
ALL_PATHS = (from_logits, from_logits_inplace, from_hidden)


def gradients(out: GRPOLossOutput, batch: SimpleNamespace) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.loss, (batch.hidden, batch.weight, batch.bias))


@pytest.mark.parametrize("treatment", InjectedTreatment.__args__)
@pytest.mark.parametrize("level", ImportanceLevel.__args__)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_path_is_the_reference(loss_type: str, level: str, treatment: str) -> None:
    """Also where TRL has nothing to compare with: injected tokens, missing records, one sweep with a quantile."""
    batch = make_batch()
    options = itertools.product((False, True), (1.0, 0.5), (None, *SamplerRatioMode.__args__), (False, True))
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
        )
        inputs = inputs_for(batch, config, with_old=with_old)
        expected = from_reference(batch, **inputs)
        expected_gradients = gradients(expected, batch)
        # With the totals and the threshold given, what needed two sweeps takes one.
        threshold = None
        if quantile < 1:
            counted = batch.mask & ~batch.injected if treatment == "mask" else batch.mask
            threshold = expected.entropy[counted].quantile(1 - quantile)
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
            "kl_sum": kl[mask].sum(),
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


class TestSweeps:
    """How often the logits are made: counted as tiles that were multiplied, and gradients that were."""

    @pytest.fixture
    def products(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
        counts = {"logits": 0, "gradients": 0}
        linear = sys.modules["edge_kernels.ops.linear_token_stats"]
        tiles, add = linear.tiles, linear.HeadGradient.add

        def counted_tiles(*args: Any):
            for tile in tiles(*args):
                counts["logits"] += len(tile.rows)
                yield tile

        def counted_add(self: Any, tile: Any, *scale: Any) -> None:
            counts["gradients"] += len(tile.rows)
            add(self, tile, *scale)

        for module in (linear, LINEAR):
            monkeypatch.setattr(module, "tiles", counted_tiles)
        monkeypatch.setattr(linear.HeadGradient, "add", counted_add)
        return counts

    rows = 12  # tokens that count in the batch; the last two have advantage 0

    def test_one_sweep_makes_the_logits_once(self, products: dict[str, int]) -> None:
        batch = make_batch()
        out = from_hidden(batch, advantages=batch.advantages)
        assert products == {"logits": self.rows, "gradients": 0}
        out.loss.backward()
        assert products == {"logits": self.rows, "gradients": self.rows - 2}

    def test_more_than_one_tile_makes_the_gradient_at_once(self, products: dict[str, int], monkeypatch) -> None:
        monkeypatch.setattr(sys.modules["edge_kernels.ops.linear_token_stats"], "TILE_BYTES", 5 * V * 8)
        batch = make_batch()
        out = from_hidden(batch, advantages=batch.advantages)
        assert products == {"logits": self.rows, "gradients": self.rows - 2}
        out.loss.backward()
        assert products == {"logits": self.rows, "gradients": self.rows - 2}

    @pytest.mark.parametrize(
        "options",
        [
            {"config": config_of(importance_sampling_level="sequence")},
            {"config": config_of(top_entropy_quantile=0.99)},
            {"config": config_of(top_entropy_quantile=0.99, entropy_coef=0.1), "entropy_threshold": 0.0},
            {"config": config_of(sampler_ratio_cap=9.0, sampler_ratio_mode="sequence_mask"), "sampling_logprobs": True},
        ],
    )
    def test_two_sweeps_where_tokens_depend_on_each_other(self, products: dict[str, int], options: dict) -> None:
        batch = make_batch()
        batch.advantages[3] = 1.0
        if "sampling_logprobs" in options:
            options = {**options, "sampling_logprobs": batch.sampling}
        out = from_hidden(batch, advantages=batch.advantages, **options)
        assert products == {"logits": self.rows, "gradients": 0}
        out.loss.backward()
        assert products["logits"] > self.rows
        assert products["gradients"] > 0

    def test_totals_and_records_make_one_sweep_of_two(self, products: dict[str, int]) -> None:
        batch = make_batch()
        config = config_of(
            top_entropy_quantile=0.5, entropy_coef=0.1, sampler_ratio_cap=9.0, sampler_ratio_mode="sequence_mask"
        )
        inputs = inputs_for(batch, config)
        from_hidden(batch, **inputs, num_items=12, entropy_threshold=1.0).loss.backward()
        assert products == {"logits": self.rows, "gradients": self.rows}

    def test_no_gradient_work_without_gradients(self, products: dict[str, int]) -> None:
        batch = make_batch()
        with torch.no_grad():
            assert not from_hidden(batch, advantages=batch.advantages).loss.requires_grad
        assert products == {"logits": self.rows, "gradients": 0}

    def test_small_tiles_give_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        batch = make_batch()
        config = config_of(beta=0.04)
        expected = gradients(from_hidden(batch, **inputs_for(batch, config)), batch)
        monkeypatch.setattr(sys.modules["edge_kernels.ops.linear_token_stats"], "TILE_BYTES", 5 * V * 8)
        out = from_hidden(batch, **inputs_for(batch, config))
        torch.testing.assert_close(gradients(out, batch), expected)


class TestSpecialValues:
    @pytest.mark.parametrize("path", ALL_PATHS)
    def test_masked_tokens_may_hold_anything(self, path: Path) -> None:
        batch = make_batch()
        config = config_of(beta=0.04, sampler_ratio_cap=2.0, entropy_coef=0.1)
        expected = path(batch, **inputs_for(batch, config))
        expected_gradients = gradients(expected, batch)
        with torch.no_grad():
            batch.hidden[~batch.mask] = math.nan
        for name in ("old", "ref", "sampling"):
            getattr(batch, name)[~batch.mask] = math.nan
        batch.advantages = batch.advantages[:, None].expand(B, T).masked_fill(~batch.mask, math.nan)
        out = path(batch, **inputs_for(batch, config))
        torch.testing.assert_close(out.loss, expected.loss)
        for name, value in out.metrics.items():
            torch.testing.assert_close(value, expected.metrics[name])
        # The product with a NaN hidden state is not the loss's to mask: only from_hidden leaves those rows out of it.
        if path is from_hidden:
            torch.testing.assert_close(gradients(out, batch), expected_gradients)

    @pytest.mark.parametrize("path", ALL_PATHS)
    def test_a_nan_that_counts_is_seen(self, path: Path) -> None:
        for level, quantile in itertools.product(ImportanceLevel.__args__, (1.0, 0.5)):
            batch = make_batch()
            with torch.no_grad():
                batch.hidden[0, 1] = math.nan
            config = config_of(importance_sampling_level=level, top_entropy_quantile=quantile)
            assert path(batch, **inputs_for(batch, config)).loss.isnan()

    @pytest.mark.parametrize("path", ALL_PATHS)
    def test_nothing_that_counts_is_a_loss_of_zero(self, path: Path) -> None:
        batch = make_batch()
        batch.mask = torch.zeros_like(batch.mask)
        for loss_type in LOSS_TYPES:
            config = config_of(loss_type, beta=0.04, entropy_coef=0.1, top_entropy_quantile=0.5)
            out = path(batch, **inputs_for(batch, config))
            assert out.loss == 0
            assert all((gradient == 0).all() for gradient in gradients(out, batch))
            assert all(value == 0 for value in out.metrics.values())

    @pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1)])
    def test_empty_and_single(self, shape: tuple[int, int]) -> None:
        hidden = torch.randn(*shape, D, requires_grad=True)
        weight = torch.randn(1, D, requires_grad=True)  # a vocabulary of one: logprob 0, no gradient
        targets, mask = torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.bool)
        for loss_type in LOSS_TYPES:
            config, advantages = config_of(loss_type, top_entropy_quantile=0.5), torch.ones(shape[0])
            for out in (
                linear_edge_grpo_loss(hidden, weight, targets, mask, advantages=advantages, config=config),
                edge_grpo_loss(F.linear(hidden, weight), targets, mask, advantages=advantages, config=config),
            ):
                assert out.loss.isfinite()
                assert all((g == 0).all() for g in torch.autograd.grad(out.loss, (hidden, weight)))

    def test_huge_ratios_stay_finite_where_they_are_clipped(self) -> None:
        logits = torch.tensor([[[1e4, -1e4]] * 3], requires_grad=True)
        targets, mask = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool)
        old = torch.tensor([[-2e4, -2e4, 0.0]])
        advantages = torch.tensor([[1.0, 0.0, 1.0]])
        out = edge_grpo_loss(logits, targets, mask, advantages=advantages, old_logprobs=old)
        assert out.loss.item() == pytest.approx(-(1.2 + 0 + 1) / 3)
        assert torch.autograd.grad(out.loss, logits)[0].isfinite().all()

    def test_a_ratio_beyond_what_float32_holds_is_capped_and_moves_nothing(self) -> None:
        logits = torch.tensor([[[0.3, -0.2]]], requires_grad=True)
        targets, mask = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
        old = torch.tensor([[-2e4]])
        out = edge_grpo_loss(logits, targets, mask, advantages=torch.tensor([-1.0]), old_logprobs=old)
        assert out.loss.item() == pytest.approx(math.exp(80), rel=1e-5)
        assert (torch.autograd.grad(out.loss, logits)[0] == 0).all()

    @pytest.mark.parametrize("path", ALL_PATHS)
    def test_tokens_at_the_quantile_act(self, path: Path) -> None:
        batch = make_batch()
        with torch.no_grad():
            batch.weight.zero_()
            batch.bias.zero_()  # every token has the same entropy
        config = config_of(top_entropy_quantile=0.5, entropy_coef=0.1)
        expected = path(batch, advantages=batch.advantages, config=config_of(entropy_coef=0.1))
        torch.testing.assert_close(path(batch, advantages=batch.advantages, config=config).loss, expected.loss)

    def test_forbidden_tokens(self) -> None:
        batch = make_batch()
        logits = F.linear(batch.hidden, batch.weight, batch.bias).detach()
        logits[..., ::4] = -math.inf
        batch.targets = torch.where(batch.mask, batch.targets // 4 * 4 % 12 + 1, 0)  # allowed ones
        logits.requires_grad_()
        config = config_of(entropy_coef=0.1)
        actual = edge_grpo_loss(logits, batch.targets, batch.mask, advantages=batch.advantages, config=config)
        expected = reference.edge_grpo_loss(
            logits, batch.targets, batch.mask, advantages=batch.advantages, config=config
        )
        assert actual.loss.isfinite()
        torch.testing.assert_close(actual.loss, expected.loss)
        gradient, plain = (torch.autograd.grad(out.loss, logits)[0] for out in (actual, expected))
        assert gradient.isfinite().all()
        torch.testing.assert_close(gradient, plain)


class TestInplace:
    def test_the_gradient_takes_the_logits_place(self) -> None:
        batch = make_batch(dtype=torch.float32)
        logits = F.linear(batch.hidden, batch.weight, batch.bias).detach().requires_grad_()
        inputs = inputs_for(batch, config_of())
        (expected,) = torch.autograd.grad(edge_grpo_loss(logits, batch.targets, batch.mask, **inputs).loss * 3, logits)
        before = logits.detach().clone()
        out = edge_grpo_loss(logits, batch.targets, batch.mask, **inputs, inplace=True)
        (out.loss * 3).backward()
        assert logits.grad is not None
        torch.testing.assert_close(logits.grad, expected, rtol=0, atol=0)
        torch.testing.assert_close(logits.detach(), expected, rtol=0, atol=0)
        assert not torch.equal(before, expected)

    def test_without_gradients_the_logits_stay(self) -> None:
        batch = make_batch()
        logits = F.linear(batch.hidden, batch.weight, batch.bias).detach()
        before = logits.clone()
        edge_grpo_loss(logits, batch.targets, batch.mask, advantages=batch.advantages, inplace=True)
        assert torch.equal(logits, before)

    def test_whoever_saved_the_logits_hears_of_it(self) -> None:
        batch = make_batch()
        logits = F.linear(batch.hidden, batch.weight).exp()  # saves its output
        out = edge_grpo_loss(logits, batch.targets, batch.mask, advantages=batch.advantages, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.loss.backward()


class TestMachinery:
    CONFIGS = (
        config_of(),
        config_of("grpo", beta=0.04, entropy_coef=0.1, top_entropy_quantile=0.5, importance_sampling_level="sequence"),
    )

    # Inductor takes seconds; whether it likes what surrounds the ops shows on one path.
    @pytest.mark.parametrize(
        ("path", "compiler"),
        [
            (from_logits_inplace, "aot_eager"),
            (from_hidden, "aot_eager"),
            pytest.param(from_hidden, "inductor", marks=pytest.mark.slow),
        ],
    )
    def test_compiles_into_one_graph(self, path: Path, compiler: str) -> None:
        batch = make_batch(dtype=torch.float32)
        torch.compiler.reset()  # one function with many configurations would meet the limit of recompilations
        for config, with_rewards in zip(self.CONFIGS, (False, True), strict=True):
            inputs = inputs_for(batch, config)
            if with_rewards:
                inputs |= {"advantages": None, "rewards": batch.rewards, "group_ids": batch.groups}

            def function(h: Tensor, w: Tensor, b: Tensor, inputs: dict = inputs) -> tuple[Tensor, dict]:
                if path is from_hidden:
                    out = linear_edge_grpo_loss(h, w, batch.targets, batch.mask, b, **inputs)
                else:
                    out = edge_grpo_loss(F.linear(h, w, b), batch.targets, batch.mask, **inputs, inplace=True)
                return out.loss * 2, out.metrics

            arguments = (batch.hidden, batch.weight, batch.bias)
            loss, metrics = torch.compile(function, fullgraph=True, backend=compiler)(*arguments)
            expected, expected_metrics = function(*arguments)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(metrics, expected_metrics)
            torch.testing.assert_close(torch.autograd.grad(loss, arguments), torch.autograd.grad(expected, arguments))

    def test_opcheck(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Checks the ops on the very arguments that the public functions give them."""
        batch = make_batch(dtype=torch.float32)
        batch.mask[:], batch.targets = True, batch.targets.clamp(0, V - 1)  # a tile's rows for the rest stay unwritten
        for op, module, path, level in (
            (linear_grpo_loss_op, LINEAR, from_hidden, "token"),
            (grpo_loss_op, MODULE, from_logits, "token"),
            (token_loss_op, MODULE, from_logits, "sequence"),
        ):
            name = f"{op._name}_op"
            calls: list[tuple] = []
            monkeypatch.setattr(module, name, lambda *args, op=op, calls=calls: (calls.append(args), op(*args))[1])
            config = config_of(beta=0.04, entropy_coef=0.1, importance_sampling_level=level)
            path(batch, **inputs_for(batch, config))
            arguments = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in calls[0]]
            torch.library.opcheck(op, tuple(arguments))

    @pytest.mark.parametrize("path", [from_logits, from_hidden])
    def test_activation_checkpointing(self, path: Path) -> None:
        batch = make_batch()

        def function(h: Tensor) -> Tensor:
            live = SimpleNamespace(**{**vars(batch), "hidden": h.tanh()})
            return path(live, advantages=batch.advantages).loss

        expected = torch.autograd.grad(function(batch.hidden), (batch.hidden, batch.weight))
        checkpointed = checkpoint(function, batch.hidden, use_reentrant=False)
        torch.testing.assert_close(torch.autograd.grad(checkpointed, (batch.hidden, batch.weight)), expected)

    def test_autocast(self) -> None:
        batch = make_batch(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            linear, plain = (
                from_hidden(batch, advantages=batch.advantages),
                from_logits(batch, advantages=batch.advantages),
            )
        torch.testing.assert_close(linear.loss, plain.loss)
        actual, expected = gradients(linear, batch), gradients(plain, batch)
        assert [g.dtype for g in actual] == [torch.float32] * 3
        torch.testing.assert_close(actual, expected, rtol=2**-7, atol=2**-7)

    def test_the_incoming_gradient_scales(self) -> None:
        batch = make_batch()
        expected = [g * -3 for g in gradients(from_hidden(batch, advantages=batch.advantages), batch)]
        out = from_hidden(batch, advantages=batch.advantages)
        (out.loss * -3).backward()
        torch.testing.assert_close([batch.hidden.grad, batch.weight.grad, batch.bias.grad], expected)

    def test_only_what_requires_a_gradient_is_computed(self) -> None:
        batch = make_batch()
        expected = gradients(from_hidden(batch, advantages=batch.advantages), batch)
        names = ("hidden", "weight", "bias")
        for i, wanted in enumerate(names):
            part = make_batch()
            for name in names:
                getattr(part, name).requires_grad_(name == wanted)
            loss = from_hidden(part, advantages=part.advantages).loss
            torch.testing.assert_close(torch.autograd.grad(loss, getattr(part, wanted))[0], expected[i])

    def test_a_second_backward_pass_raises_with_a_remedy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        batch = make_batch()
        monkeypatch.setattr(sys.modules["edge_kernels.ops.linear_token_stats"], "TILE_BYTES", 5 * V * 8)
        loss = from_hidden(batch, advantages=batch.advantages).loss
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="hands it out once; call it again"):
            loss.backward()

    @pytest.mark.parametrize("path", [from_logits, from_hidden])
    def test_a_second_derivative_raises(self, path: Path) -> None:
        batch = make_batch()
        loss = path(batch, advantages=batch.advantages).loss
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, batch.weight, create_graph=True)[0].sum().backward()

    def test_the_reference_backend_gives_the_same(self) -> None:
        batch = make_batch()
        for path in ALL_PATHS:
            expected = path(batch, advantages=batch.advantages)
            expected_gradients = gradients(expected, batch)
            with use_backend("reference"):
                out = path(batch, advantages=batch.advantages)
                torch.testing.assert_close(out.loss, expected.loss)
                torch.testing.assert_close(gradients(out, batch), expected_gradients)


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
    weight = {"grpo": 1 / (lengths * B), "dr_grpo": 1 / (B * 7)}.get(loss_type, 1 / batch.mask.sum())
    logprobs = token_stats(logits, batch.targets.masked_fill(~batch.mask, -100)).logprobs
    reinforce = -(batch.advantages[:, None] * logprobs * weight).sum()
    torch.testing.assert_close(actual, torch.autograd.grad(reinforce, logits)[0])


class TestErrors:
    def call(self, **changes: Any) -> None:
        batch = make_batch()
        logits = F.linear(batch.hidden, batch.weight, batch.bias)
        arguments = {"logits": logits, "targets": batch.targets, "completion_mask": batch.mask}
        arguments |= {"advantages": batch.advantages, **changes}
        both = (edge_grpo_loss, arguments), (linear_edge_grpo_loss, {**arguments, "weight": batch.weight})
        both[1][1]["hidden"] = both[1][1].pop("logits")[..., :D]
        for function, options in both:
            try:
                function(**options)
            except (TypeError, ValueError) as error:
                last = error
            else:
                pytest.fail(f"{function.__name__} raised nothing")
        raise last

    def test_shapes_and_dtypes(self) -> None:
        batch = make_batch()
        message = r"completion_mask must be bool with shape \(B, T\) = \(4, 6\); got int64 \(4, 6\); pass the mask that"
        with pytest.raises(TypeError, match=message):
            self.call(completion_mask=batch.mask.long())
        with pytest.raises(ValueError, match=r"completion_mask must be .* \(4, 6\); got bool \(4, 5\)"):
            self.call(completion_mask=batch.mask[:, 1:])
        with pytest.raises(TypeError, match=r"targets must be int64 .*; got int32 \(4, 6\)"):
            self.call(targets=batch.targets.int())
        with pytest.raises(
            ValueError, match=r"advantages must .* \(B,\) = \(4,\) or \(B, T\) = \(4, 6\); got .* \(6,\)"
        ):
            self.call(advantages=torch.zeros(6))
        with pytest.raises(TypeError, match=r"advantages must be floating point .*; got int64 \(4,\)"):
            self.call(advantages=batch.groups)
        for name in ("old_logprobs", "ref_logprobs", "sampling_logprobs"):
            with pytest.raises(ValueError, match=rf"{name} must be floating point .* \(4, 6\); got float64 \(4, 5\)"):
                self.call(**{name: batch.old[:, 1:]})
        with pytest.raises(TypeError, match=r"injected_mask must be bool .*; got float64"):
            self.call(injected_mask=batch.old)
        with pytest.raises(ValueError, match=r"must have shape \(B, T, [VD]\); got float64 \(1, 4, 6, (13|5)\)"):
            self.call(logits=torch.zeros(1, 4, 6, 13, dtype=torch.float64))

    def test_what_belongs_together(self) -> None:
        batch = make_batch()
        with pytest.raises(ValueError, match="exactly one of advantages and rewards must be given; got both"):
            self.call(rewards=batch.rewards)
        with pytest.raises(ValueError, match="exactly one of advantages and rewards must be given; got neither"):
            self.call(advantages=None)
        with pytest.raises(TypeError, match=r"group_ids must be int64 with shape \(B,\) = \(4,\); got NoneType"):
            self.call(advantages=None, rewards=batch.rewards)
        with pytest.raises(ValueError, match="group_ids belongs to rewards"):
            self.call(group_ids=batch.groups)
        with pytest.raises(ValueError, match=r"beta = 0\.1 needs ref_logprobs; got None"):
            self.call(config=config_of(beta=0.1))
        with pytest.raises(ValueError, match=r"sampler_ratio_floor must be at most sampler_ratio_cap = 0\.5; got 0\.9"):
            GRPOLossConfig(sampler_ratio_cap=0.5, sampler_ratio_floor=0.9)
        with pytest.raises(ValueError, match=r"sampler_ratio_cap = 2\.0 needs sampling_logprobs; got None"):
            self.call(config=config_of(sampler_ratio_cap=2.0))
        with pytest.raises(TypeError, match="config must be a GRPOLossConfig; got EDAConfig"):
            self.call(config=EDAConfig())
        with pytest.raises(
            ValueError, match=r"entropy_threshold must be a number or a scalar tensor; got float32 \(2,\)"
        ):
            self.call(entropy_threshold=torch.zeros(2))

    def test_targets_out_of_range_where_they_count(self) -> None:
        batch = make_batch()
        batch.targets[0, 3] = V
        with pytest.raises(ValueError, match=rf"targets must lie in \[0, V\) = \[0, {V}\) .* got {V} at \((0, )?3,?\)"):
            self.call(targets=batch.targets)

    def test_layouts_that_cannot_be_written_in_place(self) -> None:
        batch = make_batch()
        logits = torch.zeros(V, B, T).permute(1, 2, 0)
        with pytest.raises(ValueError, match="inplace=True needs logits whose last dimension is contiguous"):
            edge_grpo_loss(logits, batch.targets, batch.mask, advantages=batch.advantages, inplace=True)


def test_three_lines_are_enough() -> None:
    """The shortest use: a group of two, rewards in, gradient out."""
    logits, targets = torch.randn(2, 3, V, requires_grad=True), torch.randint(V, (2, 3))
    advantages = group_advantages(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
    edge_grpo_loss(logits, targets, torch.ones(2, 3, dtype=torch.bool), advantages=advantages).loss.backward()
    assert logits.grad is not None
    assert logits.grad[0, 0, targets[0, 0]] < 0 < logits.grad[1, 0, targets[1, 0]]
