"""The specification itself: against numbers worked by hand, and its gradients against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from edge_kernels import EDAConfig, GRPOLossConfig, reference

LOG2, LOG3, LOG4 = math.log(2), math.log(3), math.log(4)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# p = (1/2, 1/4, 1/4): entropy 1/2 log 2 + 1/2 log 4 = 1.5 log 2.
HALF_QUARTER_QUARTER = tensor(LOG2, 0.0, 0.0)


class TestTokenStats:
    def test_a_distribution_worked_by_hand(self) -> None:
        stats = reference.token_stats(HALF_QUARTER_QUARTER.expand(3, 3), torch.tensor([0, 1, 2]))
        torch.testing.assert_close(stats.logprobs, tensor(-LOG2, -LOG4, -LOG4))
        torch.testing.assert_close(stats.entropy, tensor(1.5 * LOG2).expand(3))
        torch.testing.assert_close(stats.logsumexp, tensor(LOG4).expand(3))

    def test_the_transformation_scales_then_caps_then_divides(self) -> None:
        # 3 * 2 = 6; 4 tanh(6/4) = 3.62059...; / 0.5 = 7.24118...; the other logit stays 0.
        z = 4 * math.tanh(1.5) / 0.5
        stats = reference.token_stats(
            tensor(2, 0)[None], torch.tensor([1]), temperature=0.5, softcap=4.0, logit_scale=3.0
        )
        assert stats.logsumexp.item() == pytest.approx(z + math.log1p(math.exp(-z)), rel=1e-12)
        assert stats.logprobs.item() == pytest.approx(-stats.logsumexp.item(), rel=1e-12)

    def test_gradients_worked_by_hand(self) -> None:
        x = HALF_QUARTER_QUARTER.clone()[None].requires_grad_()
        stats = reference.token_stats(x, torch.tensor([1]))
        (d_logprob,) = torch.autograd.grad(stats.logprobs, x, retain_graph=True)
        torch.testing.assert_close(d_logprob[0], tensor(-0.5, 0.75, -0.25))
        (d_entropy,) = torch.autograd.grad(stats.entropy, x)
        # -p (log p + H): log p + H is log 2 / 2 for the first and -log 2 / 2 for the others.
        torch.testing.assert_close(d_entropy[0], tensor(-LOG2 / 4, LOG2 / 8, LOG2 / 8))

    def test_forbidden_tokens_contribute_nothing_to_values_and_gradients(self) -> None:
        x = tensor(LOG2, -math.inf, 0.0, 0.0).clone()[None].requires_grad_()
        stats = reference.token_stats(x, torch.tensor([0]))
        assert stats.entropy.item() == pytest.approx(1.5 * LOG2)
        (gradient,) = torch.autograd.grad(stats.logprobs + stats.entropy, x)
        torch.testing.assert_close(gradient[0], tensor(0.5 - LOG2 / 4, 0, -0.25 + LOG2 / 8, -0.25 + LOG2 / 8))

    def test_a_forbidden_target_has_log_probability_minus_infinity_and_a_finite_gradient(self) -> None:
        x = tensor(0, -math.inf, 0)[None].requires_grad_()
        stats = reference.token_stats(x, torch.tensor([1]))
        assert stats.logprobs.item() == -math.inf
        assert stats.entropy.item() == pytest.approx(LOG2)
        (gradient,) = torch.autograd.grad(stats.logprobs, x)
        torch.testing.assert_close(gradient[0], tensor(-0.5, 1, -0.5))

    @pytest.mark.parametrize(
        "row",
        [(0.0, math.nan, 1.0), (0.0, math.inf, 1.0), (-math.inf, -math.inf, -math.inf), (math.inf, -math.inf, 0.0)],
    )
    def test_a_row_without_a_distribution_is_nan_and_leaves_its_neighbours_alone(self, row: tuple[float, ...]) -> None:
        x = torch.stack([tensor(*row), HALF_QUARTER_QUARTER])
        for value in reference.token_stats(x, torch.tensor([0, 0])):
            assert value[0].isnan()
            assert value[1].isfinite()

    def test_large_logits_lose_no_digits(self) -> None:
        shifted = reference.token_stats(HALF_QUARTER_QUARTER.float()[None] + 8192, torch.tensor([1]))
        # log 2 itself is rounded to a multiple of 2^-11 up there: the input's error, not the function's.
        assert shifted.entropy.item() == pytest.approx(1.5 * LOG2, abs=1e-3)
        exact = reference.token_stats(torch.tensor([[1e4, 1e4, -1e4]]), torch.tensor([0]))
        assert exact.entropy.item() == pytest.approx(LOG2, rel=1e-6)
        assert exact.logprobs.item() == pytest.approx(-LOG2, rel=1e-6)

    def test_ignored_rows_are_zero_even_where_their_logits_are_nan(self) -> None:
        x = torch.stack([HALF_QUARTER_QUARTER, torch.full_like(HALF_QUARTER_QUARTER, math.nan)]).requires_grad_()
        stats = reference.token_stats(x, torch.tensor([2, -100]))
        assert [value[1].item() for value in stats] == [0, 0, 0]
        (gradient,) = torch.autograd.grad(sum(value.sum() for value in stats), x)
        assert gradient[1].tolist() == [0, 0, 0]
        assert gradient[0].isfinite().all()

    def test_entropy_alone(self) -> None:
        assert reference.token_entropy(HALF_QUARTER_QUARTER).item() == pytest.approx(1.5 * LOG2)

    def test_a_vocabulary_of_one_is_certain(self) -> None:
        stats = reference.token_stats(tensor(5)[None], torch.tensor([0]))
        assert [value.item() for value in stats] == [0, 0, 5]

    @pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "softcap": 3.0, "logit_scale": 1.7}])
    def test_gradcheck(self, options: dict[str, float]) -> None:
        torch.manual_seed(0)
        x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
        targets = torch.randint(5, (2, 3))
        targets[1, 1] = -100
        assert torch.autograd.gradcheck(lambda x: reference.token_stats(x, targets, **options), x)
        assert torch.autograd.gradgradcheck(lambda x: reference.token_stats(x, targets, **options), x)

    def test_the_closed_formulas_of_the_gradient_are_autograds(self) -> None:
        torch.manual_seed(0)
        x = torch.randn(4, 7, dtype=torch.float64)
        x[0, 3] = -math.inf
        x.requires_grad_()
        targets, options = torch.tensor([1, -100, 2, 6]), {"temperature": 0.6, "softcap": None, "logit_scale": 1.7}
        stats = reference.token_stats(x, targets, **options)
        grads = [torch.randn(4, dtype=torch.float64) for _ in stats]
        expected = torch.autograd.grad(stats, x, grads)[0]
        torch.testing.assert_close(reference.token_stats_backward(x, targets, *grads, **options), expected)
        options["softcap"] = 2.0
        expected = torch.autograd.grad(reference.token_stats(x, targets, **options), x, grads)[0]
        torch.testing.assert_close(reference.token_stats_backward(x, targets, *grads, **options), expected)

    def test_linear_is_token_stats_of_the_product(self) -> None:
        hidden, weight, bias = tensor(1, 2)[None], torch.stack([tensor(1, 0), tensor(0, 1)]), tensor(LOG2 + 1, 0)
        stats = reference.linear_token_stats(hidden, weight, torch.tensor([0]), bias)  # logits: 2 + log 2 and 2
        assert stats.logprobs.item() == pytest.approx(math.log(2 / 3))


class TestAdvantages:
    def test_a_group_worked_by_hand(self) -> None:
        # mean 1/4, deviations 3/4 and -1/4, variance (9 + 3) / 16 / 3 = 1/4.
        advantages = reference.group_advantages(tensor(1, 0, 0, 0), torch.tensor([7, 7, 7, 7]))
        torch.testing.assert_close(advantages, tensor(0.75, -0.25, -0.25, -0.25) / 0.5001)
        unscaled = reference.group_advantages(tensor(1, 0, 0, 0), torch.tensor([7, 7, 7, 7]), scale_rewards=False)
        torch.testing.assert_close(unscaled, tensor(0.75, -0.25, -0.25, -0.25))

    def test_scaled_by_the_whole_batch(self) -> None:
        # All four rewards have the mean 1 and the variance (1 + 1) / 3.
        groups = torch.tensor([0, 0, 1, 1])
        advantages = reference.group_advantages(tensor(0, 2, 1, 1), groups, scale_rewards="batch")
        torch.testing.assert_close(advantages, tensor(-1, 1, 0, 0) / (math.sqrt(2 / 3) + 1e-4))

    def test_groups_of_one_or_of_equal_rewards_teach_nothing(self) -> None:
        assert reference.group_advantages(tensor(1, 0.1, 0.1, 0.1), torch.tensor([0, 5, 5, 5])).tolist() == [0] * 4

    def test_weights_worked_by_hand(self) -> None:
        entropy = torch.tensor([[1.0, 3.0, math.nan], [6.0, math.nan, math.nan]], dtype=torch.float64)
        mask = ~entropy.isnan()
        # P = (2, 6), mean 4: P_hat = (1/2, 3/2).
        groups = torch.tensor([0, 0])
        torch.testing.assert_close(reference.entropy_weights(entropy, mask, groups), tensor(2, 2 / 3))
        clamped = EDAConfig(min_ratio=0.8, max_ratio=1.25)
        torch.testing.assert_close(reference.entropy_weights(entropy, mask, groups, clamped), tensor(1.25, 0.8))

    def test_the_advantage_is_divided_by_the_normalized_entropy(self) -> None:
        entropy, mask = tensor(2, 6)[:, None], torch.ones(2, 1, dtype=torch.bool)
        config = EDAConfig(scale_rewards=False)
        advantages = reference.entropy_driven_advantages(tensor(1, 0), entropy, mask, torch.tensor([0, 0]), config)
        torch.testing.assert_close(advantages, tensor(0.5 * 2, -0.5 * 2 / 3))
        preserving = EDAConfig(scale_rewards=False, preserve_scale=True)  # sum |A| is 1 before and 4/3 after
        advantages = reference.entropy_driven_advantages(tensor(1, 0), entropy, mask, torch.tensor([0, 0]), preserving)
        torch.testing.assert_close(advantages, tensor(0.75, -0.25))


class TestLoss:
    """One response of two tokens, with p = 1/2 and 1/4 of the distribution above, unless a test says otherwise."""

    logits = HALF_QUARTER_QUARTER.expand(1, 2, 3)
    targets = torch.tensor([[0, 1]])
    mask = torch.ones(1, 2, dtype=torch.bool)

    def loss(self, advantage: float = 1.0, mask: Tensor | None = None, **options: object) -> float:
        inputs = {k: options.pop(k) for k in list(options) if k.endswith(("_logprobs", "_mask")) or k.startswith("num")}
        config = GRPOLossConfig(**options)  # type: ignore[arg-type]
        mask = self.mask if mask is None else mask
        out = reference.edge_grpo_loss(
            self.logits, self.targets, mask, advantages=tensor(advantage), config=config, **inputs
        )
        return out.loss.item()

    def old(self, *ratios: float) -> Tensor:
        """Return old log-probabilities such that the two tokens have these importance ratios."""
        return tensor(-LOG2, -LOG4)[None] - tensor(*ratios)[None].log()

    def test_on_policy_the_loss_is_minus_the_advantage(self) -> None:
        assert self.loss(0.7) == pytest.approx(-0.7)

    def test_clipping(self) -> None:
        # min(1.5, 1.2) and min(0.5, 0.8) for A = 1; max(1.5, 1.2) and max(0.5, 0.8) for A = -1.
        assert self.loss(1, old_logprobs=self.old(1.5, 0.5)) == pytest.approx(-(1.2 + 0.5) / 2)
        assert self.loss(-1, old_logprobs=self.old(1.5, 0.5)) == pytest.approx((1.5 + 0.8) / 2)
        assert self.loss(-1, old_logprobs=self.old(1.5, 0.5), delta=1.4) == pytest.approx((1.4 + 0.8) / 2)

    def test_cispo_caps_the_weight_of_the_log_probability(self) -> None:
        loss = self.loss(1, old_logprobs=self.old(3, 0.5), loss_type="cispo", epsilon_high=2.0)
        assert loss == pytest.approx((2 * LOG2 + 0.5 * LOG4) / 2)

    def test_sapo_gates_softly(self) -> None:
        # r = 1 + log(3) / t makes the logistic function 3/4 at the slope t, and r = 1 makes it 1/2.
        old, temperatures = self.old(1 + LOG3 / 2, 1.0), {"sapo_temperature_pos": 2.0, "sapo_temperature_neg": 4.0}
        loss = self.loss(1, old_logprobs=old, loss_type="sapo", **temperatures)
        assert loss == pytest.approx(-(3 / 4 + 1 / 2) * (4 / 2) / 2)
        old = self.old(1 + LOG3 / 4, 1 - LOG3 / 4)
        loss = self.loss(-1, old_logprobs=old, loss_type="sapo", **temperatures)
        assert loss == pytest.approx((3 / 4 + 1 / 4) * (4 / 4) / 2)

    def test_gmpo_clips_log_ratios_before_their_mean(self) -> None:
        # log r = (0.6, -0.6): for A = 1 the first is clipped to 0.4, for A = -1 the second to -0.2.
        old, bounds = self.old(math.exp(0.6), math.exp(-0.6)), {"epsilon_low": 0.2, "epsilon_high": 0.4}
        loss = self.loss(1, old_logprobs=old, loss_type="geo_mean", **bounds)
        assert loss == pytest.approx(-math.exp((0.4 - 0.6) / 2))
        loss = self.loss(-1, old_logprobs=old, loss_type="geo_mean", **bounds)
        assert loss == pytest.approx(math.exp((0.6 - 0.2) / 2))

    def test_vespo_weighs_the_log_probabilities_by_the_sequence(self) -> None:
        # w = 3 * 0.5 = 1.5; w^2 exp(3 (1 - w)) for A >= 0, w^3 exp(2 (1 - w)) for A < 0.
        old = self.old(3, 0.5)
        loss = self.loss(1, old_logprobs=old, loss_type="vespo")
        assert loss == pytest.approx(1.5**2 * math.exp(-1.5) * (LOG2 + LOG4) / 2)
        loss = self.loss(-1, old_logprobs=old, loss_type="vespo")
        assert loss == pytest.approx(-(1.5**3) * math.exp(-1.0) * (LOG2 + LOG4) / 2)

    def test_off_policy_responses_lose_a_negative_advantage(self) -> None:
        # log old - log current = (1, 0): a mean of 0.5.
        old = self.old(math.exp(-1), 1)
        kept = (0.8 + 1) / 2  # the first is clipped
        assert self.loss(-1, old_logprobs=old, off_policy_mask_threshold=0.5) == pytest.approx(kept)
        assert self.loss(-1, old_logprobs=old, off_policy_mask_threshold=0.49) == 0
        assert self.loss(1, old_logprobs=old, off_policy_mask_threshold=0.49) == pytest.approx(-(math.exp(-1) + 1) / 2)

    def test_truncated_responses_leave_the_loss(self) -> None:
        logits, targets = HALF_QUARTER_QUARTER.expand(2, 3, 3), torch.zeros(2, 3, dtype=torch.long)
        mask, cut = torch.tensor([[True, True, True], [True, False, False]]), torch.tensor([True, False])
        for loss_type, expected in (("grpo", 10 / 2), ("dapo", 10 / 1)):  # two responses, one token that counts
            config = GRPOLossConfig(loss_type=loss_type, mask_truncated_completions=True)
            inputs = {"advantages": tensor(-1, -10), "truncated_mask": cut, "config": config}
            assert reference.edge_grpo_loss(logits, targets, mask, **inputs).loss.item() == pytest.approx(expected)

    def test_kl_in_the_reward(self) -> None:
        # ref - current is log 2 for the first of two responses, of one token each: k1 is -log 2, and 0.
        logits, mask = HALF_QUARTER_QUARTER.expand(2, 1, 3), torch.ones(2, 1, dtype=torch.bool)
        targets, ref = torch.zeros(2, 1, dtype=torch.long), tensor(0, -LOG2)[:, None]
        config = GRPOLossConfig(reward_kl_coef=0.5, eda=EDAConfig(scale_rewards=False))
        inputs = {"rewards": tensor(1, 1), "group_ids": torch.tensor([0, 0]), "ref_logprobs": ref, "config": config}
        out = reference.edge_grpo_loss(logits, targets, mask, **inputs)
        torch.testing.assert_close(out.advantages, tensor(1, -1) * LOG2 / 4)

    def test_sequence_ratio_is_the_geometric_mean(self) -> None:
        # sqrt(1.21 * 1.0) = 1.1, inside the clipping range.
        loss = self.loss(1, old_logprobs=self.old(1.21, 1.0), importance_sampling_level="sequence")
        assert loss == pytest.approx(-1.1)

    def test_kl_penalty(self) -> None:
        # ref - current = log 2 and -log 2: k3 = 2 - log 2 - 1 and 1/2 + log 2 - 1; their mean is 1/4.
        ref = tensor(-LOG2 + LOG2, -LOG4 - LOG2)[None]
        assert self.loss(0, ref_logprobs=ref, beta=0.5) == pytest.approx(0.5 * 0.25)

    def test_entropy_bonus(self) -> None:
        assert self.loss(0, entropy_coef=0.1) == pytest.approx(-0.1 * 1.5 * LOG2)

    @pytest.mark.parametrize(
        ("mode", "factors"),
        [
            ("token_truncate", (1.5, 0.8)),
            ("token_mask", (0.0, 0.8)),
            ("sequence_truncate", (1.5, 1.5)),  # 2 * 0.8 = 1.6
            ("sequence_mask", (0.0, 0.0)),
        ],
    )
    def test_sampler_correction(self, mode: str, factors: tuple[float, float]) -> None:
        sampling = self.old(2.0, 0.8)  # what stands in for old_logprobs is the current policy
        loss = self.loss(1, sampling_logprobs=sampling, sampler_ratio_cap=1.5, sampler_ratio_mode=mode)
        assert loss == pytest.approx(-sum(factors) / 2)

    def test_normalizers(self) -> None:
        logits, targets = HALF_QUARTER_QUARTER.expand(2, 3, 3), torch.zeros(2, 3, dtype=torch.long)
        mask = torch.tensor([[True, True, True], [True, False, False]])

        def loss(loss_type: str, **options: object) -> float:
            config = GRPOLossConfig(loss_type=loss_type, max_completion_length=5)  # type: ignore[arg-type]
            advantages = tensor(-1, -10)
            return reference.edge_grpo_loss(
                logits, targets, mask, advantages=advantages, config=config, **options
            ).loss.item()

        assert loss("grpo") == pytest.approx((1 + 10) / 2)
        assert loss("luspo") == pytest.approx((3 + 10) / 2)
        assert loss("dr_grpo") == pytest.approx((3 + 10) / (2 * 5))
        assert loss("bnpo") == loss("dapo") == pytest.approx((3 + 10) / 4)
        assert loss("dapo", num_items=8) == pytest.approx(13 / 8)
        assert loss("grpo", num_sequences=4) == pytest.approx(11 / 4)

    def test_top_entropy_quantile_drops_the_policy_term_of_sure_tokens(self) -> None:
        logits = torch.stack([tensor(0, 0, 0), tensor(9, 0, 0), tensor(1, 0, 0)])[None]
        targets, mask = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool)
        config = GRPOLossConfig(top_entropy_quantile=0.4)  # the 0.6 quantile of three lies above the middle one
        out = reference.edge_grpo_loss(logits, targets, mask, advantages=tensor(1), config=config)
        assert out.loss.item() == pytest.approx(-1 / 3)

    def test_injected_tokens(self) -> None:
        injected = {"injected_mask": torch.tensor([[False, True]]), "old_logprobs": tensor(-LOG2, math.nan)[None]}
        assert self.loss(1, **injected) == pytest.approx(-1)  # credit: no record, so ratio 1
        assert self.loss(1, injected="mask", **injected) == pytest.approx(-1)  # mean over one token
        assert self.loss(1, injected="sft", sft_weight=0.5, **injected) == pytest.approx((-1 + 0.5 * LOG4) / 2)
        shaped = self.loss(1, injected="shaped", shaped_gamma=0.25, **injected)  # (1/4) / (1/4 + 1/4)
        assert shaped == pytest.approx((-1 - 0.5) / 2)

    def test_a_token_without_a_record_stays_out_of_a_sequence_ratio(self) -> None:
        old = self.old(1.1, 1.0)
        old[0, 1] = math.nan
        assert self.loss(1, old_logprobs=old, importance_sampling_level="sequence") == pytest.approx(-1.1)

    def test_linear_is_the_loss_of_the_product(self) -> None:
        eye = torch.eye(3, dtype=torch.float64)
        out = reference.linear_edge_grpo_loss(self.logits, eye, self.targets, self.mask, advantages=tensor(0.7))
        assert out.loss.item() == pytest.approx(-0.7)

    def test_gradcheck(self) -> None:
        torch.manual_seed(0)
        x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
        targets, mask = torch.randint(4, (2, 3)), torch.tensor([[True] * 3, [True, False, False]])
        old = torch.full((2, 3), -1.5, dtype=torch.float64)
        config = GRPOLossConfig(beta=0.1, entropy_coef=0.1, epsilon_high=0.3, delta=4.0)

        def loss(x: Tensor) -> Tensor:
            options = {"advantages": tensor(1, -2), "old_logprobs": old, "ref_logprobs": old - 0.2, "config": config}
            return reference.edge_grpo_loss(x, targets, mask, **options).loss

        assert torch.autograd.gradcheck(loss, x)
