"""What one token can do to a batch: differences of log-probabilities are bounded, forbidden tokens are exact."""

from __future__ import annotations

import math

import pytest
import torch
from grpo_batch import ALL_PATHS, Path, config_of, from_logits, gradients, inputs_for, make_batch

from edge_kernels import edge_grpo_loss, use_backend
from edge_kernels.reference import MAX_KL_LOG_RATIO, k3

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def each_backend(request: pytest.FixtureRequest):
    with use_backend(request.param):
        yield


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("corrects", [True, False])
@pytest.mark.parametrize("path", ALL_PATHS)
def test_one_drifted_token_leaves_the_batch_finite(path: Path, corrects: bool, dtype: torch.dtype) -> None:
    """The reference finds the token e^500 times likelier. Without a bound: loss inf, most of the gradient NaN."""
    batch = make_batch(dtype=dtype)
    config = config_of(beta=0.04, use_bias_correction_kl=corrects)
    inputs = inputs_for(batch, config, with_old=False)
    calm = path(batch, **inputs)
    calm_gradients = gradients(calm, batch)
    batch.ref[0, 2] += 500
    out = path(batch, **{**inputs, "ref_logprobs": batch.ref})
    drifted = gradients(out, batch)
    assert out.loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in drifted)
    if out.metrics:
        assert out.metrics["kl_bounded"] == 1
        assert out.metrics["kl_sum"].isfinite()
    # The bound is on the slope: that of exp(d) - d - 1 at the bound, times beta and the token's share of the loss.
    limit = 0.04 * math.exp(MAX_KL_LOG_RATIO) / batch.mask.sum()
    slope = (drifted[2] - calm_gradients[2]).abs().max()  # the bias sums the gradient of the logits
    assert slope < 1.2 * limit + (0.04 * 500 * math.exp(MAX_KL_LOG_RATIO) / batch.mask.sum() if corrects else 0)


def test_the_estimate_is_exact_below_its_bound_and_a_line_beyond() -> None:
    d = torch.tensor([-30.0, 0.0, 1.0, MAX_KL_LOG_RATIO, MAX_KL_LOG_RATIO + 7], dtype=torch.float64, requires_grad=True)
    estimate = k3(d, torch.zeros_like(d))
    edge = math.exp(MAX_KL_LOG_RATIO)
    exact = [math.exp(x) - x - 1 for x in d.tolist()[:4]]
    assert estimate.tolist() == pytest.approx([*exact, edge * 8 - (MAX_KL_LOG_RATIO + 7) - 1])
    slopes = torch.autograd.grad(estimate.sum(), d)[0].tolist()
    assert slopes == pytest.approx([math.exp(-30) - 1, 0.0, math.e - 1, slopes[3], edge - 1])


def test_without_a_penalty_the_estimate_is_measured_and_finite() -> None:
    batch = make_batch()
    batch.ref[0, 2] += 5000
    out = from_logits(batch, advantages=batch.advantages, ref_logprobs=batch.ref)
    assert out.metrics["kl_sum"].isfinite()
    assert out.metrics["kl_bounded"] == 1


def test_a_measured_estimate_that_is_infinite_is_not_in_the_loss() -> None:
    """The reference allows a token that the policy forbids: the estimate is inf, and without beta that is all."""
    logits = torch.zeros(1, 2, 3, dtype=torch.float64)
    logits[0, 0, 0] = -math.inf
    logits.requires_grad_()
    targets, mask = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool)
    reference = torch.full((1, 2), -1.0, dtype=torch.float64)
    advantages = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    out = edge_grpo_loss(logits, targets, mask, advantages=advantages, ref_logprobs=reference)
    assert out.metrics["kl_sum"] == math.inf
    assert out.loss.isfinite()
    out.loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
@pytest.mark.parametrize("with_old", [True, False])
def test_a_forbidden_target_without_an_advantage_costs_nothing(loss_type: str, with_old: bool) -> None:
    """Its log-probability is -inf, the difference to itself NaN; its advantage is 0, so that its loss is 0."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(5, (2, 3), generator=generator)
    logits[0, 1, targets[0, 1]] = -math.inf
    logits.requires_grad_()
    advantages = torch.tensor([[1.0, 0.0, 1.0], [0.5, 0.5, 0.5]], dtype=torch.float64)
    old = torch.full((2, 3), -1.0, dtype=torch.float64) if with_old else None
    mask = torch.ones(2, 3, dtype=torch.bool)
    out = edge_grpo_loss(
        logits, targets, mask, advantages=advantages, old_logprobs=old, config=config_of(loss_type), num_items=6
    )
    out.loss.backward()
    assert out.loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[0, 1] == 0).all()
