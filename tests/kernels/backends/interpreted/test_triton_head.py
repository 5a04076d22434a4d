"""The linear head of Triton, which makes logits in its kernels: against float64 on the same rounded numbers."""

from __future__ import annotations

import math

import pytest
import torch
from backends import DTYPES
from torch import Tensor

from edge_kernels import GRPOLossConfig, linear_edge_grpo_loss, linear_token_stats, reference, use_backend
from edge_kernels.backends.triton import tuning

# Products accumulate in float32. The gradient of the logits is rounded to the inputs' type between its making and its
# two products, and so is the result; the interpreter truncates.
GRADIENT_TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}


def make_head(N: int, D: int, V: int, dtype: torch.dtype, bias: bool = True) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(N + D + V)
    shapes = [(N, D), (V, D), *([(V,)] if bias else [])]
    tensors = [(torch.randn(shape, generator=generator) * 0.7).to(dtype).requires_grad_() for shape in shapes]
    targets = torch.randint(V, (N,), generator=generator)
    targets[N // 2 : N // 2 + 2] = -100
    return tensors, targets


def assert_exact(inputs: list[Tensor], targets: Tensor, **options: float) -> None:
    coefficients = torch.randn(3, len(targets), generator=torch.Generator().manual_seed(1))
    coefficients[:, 0] = 0  # a row that counts and has no gradient
    hidden, weight, *bias = inputs
    stats = linear_token_stats(hidden, weight, targets, *bias, **options)
    actual = torch.autograd.grad(stats, inputs, list(coefficients))
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = reference.linear_token_stats(wide[0], wide[1], targets, *wide[2:], **options)
    expected = torch.autograd.grad(exact, wide, list(coefficients.double()))
    for got, value in zip(stats, exact, strict=True):
        torch.testing.assert_close(got.double(), value, rtol=1e-6, atol=5e-6)
    for got, value, like in zip(actual, expected, inputs, strict=True):
        assert got.dtype == like.dtype
        tolerance = GRADIENT_TOLERANCE[like.dtype] * max(1.0, value.abs().max().item())
        torch.testing.assert_close(got.double(), value, rtol=0, atol=tolerance)


@pytest.fixture(params=["one block of columns", "several"])
def blocks_of_columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "several":
        monkeypatch.setattr(tuning, "TILE_BYTES", 1)  # each as narrow as a tile, 32 columns


# The interpreter's tile has 16 rows, 32 columns and 16 of D. 21 x 19 x 77: more than one of each, and rests.
# 1 x 1 x 1: nothing but a rest. 33 x 32 x 64: tiles without a rest, and rows with one.
@pytest.mark.usefixtures("blocks_of_columns")
@pytest.mark.parametrize(("N", "D", "V"), [(21, 19, 77), (1, 1, 1), (33, 32, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype: torch.dtype, N: int, D: int, V: int) -> None:
    inputs, targets = make_head(N, D, V, dtype)
    assert_exact(inputs, targets)
    assert_exact(inputs[:2], targets, temperature=0.7)


@pytest.mark.parametrize("options", [{"softcap": 5.0, "temperature": 0.7}, {"logit_scale": -1.5}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_transformed_logits(dtype: torch.dtype, options: dict[str, float]) -> None:
    assert_exact(*make_head(5, 19, 77, dtype), **options)


@pytest.mark.parametrize("multiprocessors", [1, 3, 99], indirect=True)
def test_shares_of_the_vocabulary(multiprocessors: int) -> None:
    assert_exact(*make_head(5, 19, 300, torch.float32))


def test_matrices_of_any_strides() -> None:
    inputs, targets = make_head(6, 10, 40, torch.float32)
    wider = [torch.randn(tensor.shape[0], 23) for tensor in inputs[:2]]
    views = [w[:, 3:13].copy_(t.detach()).requires_grad_() for w, t in zip(wider, inputs[:2], strict=True)]
    assert_exact([*views, inputs[2]], targets)
    across = [t.detach().t().contiguous().t().requires_grad_() for t in inputs[:2]]
    assert_exact([*across, inputs[2]], targets)


def test_rows_that_do_not_count_are_not_read() -> None:
    inputs, targets = make_head(9, 5, 11, torch.float32)
    with torch.no_grad():
        inputs[0][4:6] = math.nan
    stats = linear_token_stats(inputs[0], inputs[1], targets, inputs[2])
    assert all((value[4:6] == 0).all() and value.isfinite().all() for value in stats)
    gradients = torch.autograd.grad(stats.logprobs.sum(), inputs)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][4:6] == 0).all()
    nothing = linear_token_stats(inputs[0], inputs[1], torch.full_like(targets, -100), inputs[2])
    assert all((value == 0).all() for value in nothing)
    assert all((g == 0).all() for g in torch.autograd.grad(nothing.entropy.sum(), inputs))


def test_forbidden_tokens_and_rows_without_a_distribution() -> None:
    inputs, targets = make_head(9, 5, 80, torch.float32)
    with torch.no_grad():
        inputs[2][1::2] = -math.inf  # columns forbidden by their bias
        inputs[0][7] = math.nan
    targets[:] = torch.arange(9) * 2
    stats = linear_token_stats(inputs[0], inputs[1], targets, inputs[2])
    exact = reference.linear_token_stats(*(t.double() for t in inputs[:2]), targets, inputs[2].double())
    for got, value in zip(stats, exact, strict=True):
        assert got.isnan().tolist() == [row == 7 for row in range(9)]
        torch.testing.assert_close(got.double(), value, rtol=0, atol=5e-6, equal_nan=True)
    (gradient,) = torch.autograd.grad(stats.logprobs[:7].sum(), inputs[1])
    assert gradient.isfinite().all()
    assert (gradient[1::2] == 0).all()


def test_an_empty_batch() -> None:
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(6, 4, requires_grad=True)
    stats = linear_token_stats(hidden, weight, torch.zeros(0, dtype=torch.long))
    gradients = torch.autograd.grad(stats.logprobs.sum(), (hidden, weight))
    assert gradients[0].shape == (0, 4)
    assert (gradients[1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_adds_to_an_existing_gradient_where_it_lies(dtype: torch.dtype) -> None:
    (hidden, weight, bias), targets = make_head(6, 10, 40, dtype)
    (expected,) = torch.autograd.grad(linear_token_stats(hidden, weight, targets, bias).logprobs.sum(), weight)
    weight.grad = torch.ones_like(weight)
    before = weight.grad.data_ptr()
    linear_token_stats(hidden, weight, targets, bias).logprobs.sum().backward()
    assert weight.grad.data_ptr() == before
    tolerance = GRADIENT_TOLERANCE[dtype] * (1 + expected.abs().max().item())
    torch.testing.assert_close(weight.grad, expected + 1, rtol=0, atol=tolerance)


def test_products_under_autocast_are_autocasts() -> None:
    (hidden, weight, bias), targets = make_head(6, 10, 40, torch.float32)
    rounded = [t.detach().to(torch.bfloat16).double() for t in (hidden, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        stats = linear_token_stats(hidden, weight, targets, bias)
    exact = reference.linear_token_stats(rounded[0], rounded[1], targets, bias.double())
    for got, value in zip(stats, exact, strict=True):
        torch.testing.assert_close(got.double(), value, rtol=0, atol=5e-2)  # the interpreter truncates to bfloat16
    gradients = torch.autograd.grad(stats.logprobs.sum(), (hidden, weight, bias))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_the_same_bits_from_run_to_run() -> None:
    results = []
    for _ in range(2):
        inputs, targets = make_head(21, 19, 77, torch.bfloat16)
        stats = linear_token_stats(inputs[0], inputs[1], targets, inputs[2])
        results.append((*stats, *torch.autograd.grad(stats.entropy.sum(), inputs)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("rows_per_tile", [1000, 2], ids=["a tile of logits", "no logits"])
@pytest.mark.parametrize("config", [{}, {"beta": 0.1, "entropy_coef": 0.05}, {"top_entropy_quantile": 0.5}], ids=str)
def test_the_loss(rows_per_tile: int, config: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """A small batch keeps its tile for the backward pass, and is made with three products; a larger one has none."""
    from edge_kernels.ops import linear_grpo_loss

    monkeypatch.setattr(linear_grpo_loss, "rows_per_tile", lambda *_: rows_per_tile)
    inputs, targets = make_head(8, 6, 50, torch.float32)
    hidden, mask = inputs[0].detach().view(2, 4, 6).requires_grad_(), (targets != -100).view(2, 4)
    targets = targets.view(2, 4)
    options = {
        "advantages": torch.tensor([1.0, -0.5]),
        "ref_logprobs": torch.full((2, 4), -3.0),
        "config": GRPOLossConfig(**config),
    }
    leaves = [hidden, inputs[1], inputs[2]]
    out = linear_edge_grpo_loss(hidden, inputs[1], targets, mask, inputs[2], **options)
    actual = torch.autograd.grad(out.loss, leaves)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    with use_backend("reference"):
        exact = reference.linear_edge_grpo_loss(wide[0], wide[1], targets, mask, wide[2], **options)
        expected = torch.autograd.grad(exact.loss, wide)
    torch.testing.assert_close(out.loss.double(), exact.loss, rtol=1e-5, atol=1e-6)
    for got, value in zip(actual, expected, strict=True):
        torch.testing.assert_close(got.double(), value, rtol=0, atol=3e-6)
