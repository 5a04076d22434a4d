"""How often the losses make the logits, what values they stand, and the gradient in the logits' place."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from grpo_batch import (
    ALL_PATHS,
    LINEAR,
    LOSS_TYPES,
    B,
    D,
    Path,
    T,
    V,
    config_of,
    from_hidden,
    gradients,
    inputs_for,
    make_batch,
)

from edge_kernels import edge_grpo_loss, linear_edge_grpo_loss, reference
from edge_kernels.config import ImportanceLevel
from edge_kernels.ops import head

pytestmark = pytest.mark.usefixtures("one_thread")


class TestSweeps:
    """How often the logits are made: counted as tiles that were multiplied, and gradients that were."""

    @pytest.fixture
    def products(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
        counts = {"logits": 0, "gradients": 0}
        tiles, add = head.tiles, head.HeadGradient.add

        def counted_tiles(*args: Any):
            for tile in tiles(*args):
                counts["logits"] += len(tile.rows)
                yield tile

        def counted_add(self: Any, tile: Any, *scale: Any) -> None:
            counts["gradients"] += len(tile.rows)
            add(self, tile, *scale)

        for module in (sys.modules["edge_kernels.ops.linear_token_stats"], LINEAR):
            monkeypatch.setattr(module, "tiles", counted_tiles)
        monkeypatch.setattr(head.HeadGradient, "add", counted_add)
        return counts

    rows = 12  # tokens that count in the batch; the last two have advantage 0

    @pytest.mark.parametrize("loss_type", ["dapo", "sapo", "luspo"])
    def test_one_sweep_makes_the_logits_once(self, products: dict[str, int], loss_type: str) -> None:
        batch = make_batch()
        config = config_of(loss_type, mask_truncated_completions=True)
        out = from_hidden(
            batch, advantages=batch.advantages, truncated_mask=torch.zeros(B, dtype=torch.bool), config=config
        )
        assert products == {"logits": self.rows, "gradients": 0}
        out.loss.backward()
        assert products == {"logits": self.rows, "gradients": self.rows - 2}

    def test_more_than_one_tile_makes_the_gradient_at_once(self, products: dict[str, int], monkeypatch) -> None:
        monkeypatch.setattr(head, "TILE_BYTES", 5 * V * 8)
        batch = make_batch()
        out = from_hidden(batch, advantages=batch.advantages)
        assert products == {"logits": self.rows, "gradients": self.rows - 2}
        out.loss.backward()
        assert products == {"logits": self.rows, "gradients": self.rows - 2}

    @pytest.mark.parametrize(
        "options",
        [
            {"config": config_of(importance_sampling_level="sequence")},
            {"config": config_of("geo_mean")},
            {"config": config_of("vespo")},
            {"config": config_of(off_policy_mask_threshold=9.0), "sampling_logprobs": True},
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
        monkeypatch.setattr(head, "TILE_BYTES", 5 * V * 8)
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
