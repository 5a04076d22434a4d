"""Arguments at the edge of what is accepted: empty completions, totals, NumPy's numbers, tensors without values."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import edge_kernels as ek
from edge_kernels.ops.batch import _entropy_threshold


def loss_of(**options: object) -> ek.GRPOLossOutput:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator, requires_grad=True)
    targets, mask = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
    return ek.edge_grpo_loss(logits, targets, mask, advantages=torch.tensor([1.0, -1.0]), **options)  # type: ignore[arg-type]


def test_completions_without_a_token() -> None:
    """T = 0, as where every response of a micro-batch was cut: loss 0, and an advantage for each all the same."""
    logits = torch.zeros(4, 0, 7, requires_grad=True)
    targets, mask = torch.zeros(4, 0, dtype=torch.int64), torch.zeros(4, 0, dtype=torch.bool)
    rewards, groups = torch.tensor([0.0, 1, 1, 1]), torch.tensor([0, 0, 1, 1])
    out = ek.edge_grpo_loss(logits, targets, mask, rewards=rewards, group_ids=groups)
    out.loss.backward()
    assert out.loss == 0
    torch.testing.assert_close(out.advantages, ek.group_advantages(rewards, groups))


@pytest.mark.parametrize("name", ["num_items", "num_sequences"])
@pytest.mark.parametrize(
    ("total", "message"),
    [
        (0, "must be greater than 0; got 0"),
        (-3.0, r"must be greater than 0; got -3\.0"),
        (math.nan, "must be greater than 0; got nan"),
        (True, "must be greater than 0; got True"),
        (torch.ones(2), r"must be a number or a scalar tensor; got float32 \(2,\)"),
    ],
)
def test_totals_are_positive_scalars(name: str, total: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"{name} {message}"):
        loss_of(**{name: total})


@pytest.mark.parametrize("total", [6, 6.0, np.int64(6), np.float32(6), torch.tensor(6)])
def test_any_positive_number_is_a_total(total: object) -> None:
    torch.testing.assert_close(loss_of(num_items=total).loss, loss_of().loss)


@pytest.mark.parametrize("name", ["temperature", "softcap", "logit_scale"])
def test_what_transforms_logits_is_finite(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be finite; got inf"):
        ek.GRPOLossConfig(**{name: math.inf})


def test_numbers_of_numpy_are_numbers() -> None:
    config = ek.GRPOLossConfig(temperature=np.float32(0.75), epsilon_high=np.float64(0.5), delta=np.int64(2))
    same = ek.GRPOLossConfig(temperature=0.75, epsilon_high=0.5, delta=2.0)
    assert loss_of(config=config).loss == loss_of(config=same).loss


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    "call",
    [
        lambda: ek.token_stats(meta(2, 3, 5), meta(2, 3, dtype=torch.int64)).logprobs,
        lambda: ek.linear_token_stats(meta(2, 3, 4), meta(5, 4), meta(2, 3, dtype=torch.int64)).logprobs,
    ],
)
def test_statistics_have_a_shape_on_meta(call: Callable[[], Tensor]) -> None:
    assert call().shape == (2, 3)


def test_losses_have_a_shape_on_meta() -> None:
    targets, mask, advantages = meta(2, 3, dtype=torch.int64), meta(2, 3, dtype=torch.bool), meta(2)
    hidden = meta(2, 3, 4).requires_grad_()
    for out in (
        ek.edge_grpo_loss(meta(2, 3, 5).requires_grad_(), targets, mask, advantages=advantages),
        ek.linear_edge_grpo_loss(hidden, meta(5, 4), targets, mask, advantages=advantages),
    ):
        assert out.loss.shape == ()
        assert out.logprobs.shape == (2, 3)


def test_float64_beside_float32_is_told_what_helps() -> None:
    hidden, weight, targets = (
        torch.zeros(2, 3, dtype=torch.float64),
        torch.zeros(5, 3),
        torch.zeros(2, dtype=torch.int64),
    )
    with pytest.raises(TypeError, match=r"convert one of them, or run under torch\.autocast"):
        ek.linear_token_stats(hidden, weight, targets)
    with torch.autocast("cpu"), pytest.raises(TypeError, match=r"convert one of them$"):
        ek.linear_token_stats(hidden, weight, targets)


@pytest.mark.parametrize("share", [0.2, 0.55, 0.999])
def test_the_entropy_quantile_is_that_of_torch(share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    entropy = torch.rand(7, 9, generator=generator, dtype=torch.float64)
    mask = torch.rand(7, 9, generator=generator) < 0.6
    entropy[0, 0] = math.nan  # is in no quantile
    expected = entropy.masked_fill(~mask, math.nan).flatten().nanquantile(1 - share)
    torch.testing.assert_close(_entropy_threshold(entropy.masked_fill(~mask, math.nan), share), expected)
    assert _entropy_threshold(torch.full_like(entropy, math.nan), share).isnan()


@pytest.mark.slow
def test_the_entropy_quantile_of_more_tokens_than_torch_takes() -> None:
    """17 million values: torch.quantile refuses more than 2^24."""
    entropy = torch.arange(2**24 + 2, dtype=torch.float64)
    threshold = _entropy_threshold(entropy, 0.25)
    assert threshold == (2**24 + 1) * 0.75
