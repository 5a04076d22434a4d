"""``linear_token_stats``: against the whole logits in float64, over several tiles."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from error_budget import assert_within_budget
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from edge_kernels import linear_token_stats, reference, token_stats
from edge_kernels._checks import IGNORE_INDEX
from edge_kernels.backend import kernels
from edge_kernels.contract import Transform
from edge_kernels.ops.linear_token_stats import linear_token_stats_op

pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.parametrize("backend", ["cpu", "reference"], indirect=True),
]

D, V = 6, 23
TRANSFORM = {"temperature": 0.7, "softcap": 6.0, "logit_scale": 1.5}


@pytest.fixture(params=["one tile", "tiles of three rows"])
def tile_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also run with tiles so small that rows are split, three leaving a last odd tile, and the weight into blocks.

    Six rows to a tile where the CPU has instructions for 16-bit products.
    """
    if request.param == "tiles of three rows":
        module = sys.modules["edge_kernels.ops.head"]
        monkeypatch.setattr(module, "TILE_BYTES", 3 * V * 4)
        monkeypatch.setattr(module, "BLOCK_BYTES", 5 * D * 4)


def make_head(dtype: torch.dtype, shape: tuple[int, ...] = (2, 5), *, bias: bool = True) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=generator).to(dtype) for s in ((*shape, D), (V, D), (V,))]
    return [*(t.requires_grad_() for t in tensors[:2]), tensors[2].requires_grad_() if bias else None]


def make_targets(shape: tuple[int, ...] = (2, 5)) -> Tensor:
    targets = torch.randint(V, shape, generator=torch.Generator().manual_seed(1))
    targets.view(-1)[1::4] = IGNORE_INDEX
    return targets


def gradients(stats, inputs: list[Tensor | None]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(stats[0].shape, generator=generator).to(stats[0].dtype) for _ in stats]
    return list(torch.autograd.grad(stats, [t for t in inputs if t is not None], weights))


@pytest.mark.usefixtures("tile_rows")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_as_exact_as_plain_pytorch(dtype: torch.dtype, bias: bool) -> None:
    inputs, targets = make_head(dtype, bias=bias), make_targets()
    wide = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    # One rounding of a 16-bit result, on sums of up to ten of them.
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for options in ({}, TRANSFORM):
        actual = linear_token_stats(inputs[0], inputs[1], targets, inputs[2], **options)
        plain = reference.token_stats(F.linear(inputs[0], inputs[1], inputs[2]), targets, **options)
        exact = reference.token_stats(F.linear(wide[0], wide[1], wide[2]), targets, **options)
        for name, *values in zip(exact._fields, actual, plain, exact, strict=True):
            assert values[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert_within_budget(*values, tolerance=tolerance, name=name)
        names = ("hidden", "weight", "bias")
        results = gradients(actual, inputs), gradients(plain, inputs), gradients(exact, wide)
        for name, *values in zip(names, *results, strict=False):
            assert values[0].dtype == dtype
            assert_within_budget(*values, tolerance=tolerance, name=f"gradient of {name}")


def test_the_weights_gradient_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 tiles, each adding 2^-9 to a sum that begins at 1: in bfloat16 nothing of it would arrive."""
    monkeypatch.setattr(sys.modules["edge_kernels.ops.head"], "TILE_BYTES", 2 * 4)
    hidden = torch.full((65, 1), 2.0**-8, dtype=torch.bfloat16)
    hidden[0] = 2.0
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)  # p is 1/2 everywhere
    linear_token_stats(hidden, weight, torch.zeros(65, dtype=torch.long)).logprobs.sum().backward()
    expected = 1 + 64 * 2.0**-9
    assert weight.grad is not None
    assert weight.grad[0].item() == pytest.approx(expected, rel=2**-8)


@pytest.mark.usefixtures("tile_rows")
def test_only_what_requires_a_gradient_is_computed() -> None:
    targets = make_targets()
    everything = make_head(torch.float64)
    expected = gradients(linear_token_stats(everything[0], everything[1], targets, everything[2]), everything)
    for wanted in range(3):
        inputs = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(everything)]
        stats = linear_token_stats(inputs[0], inputs[1], targets, inputs[2])
        torch.testing.assert_close(gradients(stats, [inputs[wanted]])[0], expected[wanted])


def test_ignored_rows_may_hold_anything_and_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias = make_head(torch.float64)
    backend = kernels(weight)
    rows, forward = [], backend.token_stats_forward
    monkeypatch.setattr(backend, "token_stats_forward", lambda x, *rest: (rows.append(len(x)), forward(x, *rest))[1])
    targets = make_targets()
    with torch.no_grad():
        hidden[targets == IGNORE_INDEX] = float("nan")
    stats = linear_token_stats(hidden, weight, targets, bias)
    assert sum(rows) == (targets != IGNORE_INDEX).sum()
    assert all((statistic[targets == IGNORE_INDEX] == 0).all() for statistic in stats)
    d_hidden, d_weight, d_bias = gradients(stats, [hidden, weight, bias])
    assert (d_hidden[targets == IGNORE_INDEX] == 0).all()
    assert (d_hidden[targets != IGNORE_INDEX] != 0).any()
    assert d_weight.isfinite().all()
    assert d_bias.isfinite().all()


def test_rows_without_a_gradient_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _ = make_head(torch.float64, (8,))
    backend = kernels(weight)
    rows, backward = [], backend.token_stats_backward
    record = lambda x, *rest, **options: (rows.append(len(x)), backward(x, *rest, **options))[1]  # noqa: E731
    monkeypatch.setattr(backend, "token_stats_backward", record)
    coefficients = torch.tensor([1.0, 0, 0, -1, 0, 0, 0, 2], dtype=torch.float64)
    stats = linear_token_stats(hidden, weight, torch.arange(8))
    actual = torch.autograd.grad(stats.logprobs, (hidden, weight), coefficients)
    assert rows == [3]
    plain = reference.linear_token_stats(hidden, weight, torch.arange(8))
    torch.testing.assert_close(actual, torch.autograd.grad(plain.logprobs, (hidden, weight), coefficients))


@pytest.mark.parametrize("shape", [(0,), (2, 0), (1,), (2, 1, 3)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    hidden, weight, bias = make_head(torch.float32, shape)
    stats = linear_token_stats(hidden, weight, torch.zeros(shape, dtype=torch.long), bias)
    assert all(statistic.shape == shape for statistic in stats)
    for gradient, tensor in zip(gradients(stats, [hidden, weight, bias]), (hidden, weight, bias), strict=True):
        assert gradient.shape == tensor.shape


def test_nothing_to_learn_gives_gradients_of_zero_not_none() -> None:
    """DistributedDataParallel waits for every parameter's gradient."""
    inputs = make_head(torch.float32)
    stats = linear_token_stats(inputs[0], inputs[1], torch.full((2, 5), IGNORE_INDEX), inputs[2])
    assert all((gradient == 0).all() for gradient in gradients(stats, inputs))


def test_strided_inputs() -> None:
    hidden, weight, bias = make_head(torch.float64)
    targets = make_targets()
    stats = linear_token_stats(hidden, weight, targets, bias)
    strided = [t.detach().t().contiguous().t().requires_grad_() if t.dim() == 2 else t for t in (weight, bias)]
    across = hidden.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    other = linear_token_stats(across, strided[0], targets.t().contiguous().t(), bias)
    torch.testing.assert_close(other, stats)
    expected = gradients(stats, [hidden, weight, bias])
    torch.testing.assert_close(gradients(other, [across, strided[0], bias]), expected)


class TestErrors:
    hidden, weight = torch.zeros(2, 5, D), torch.zeros(V, D)
    targets = torch.zeros(2, 5, dtype=torch.long)

    def test_shapes(self) -> None:
        with pytest.raises(ValueError, match=rf"weight must be .* \(V, D\) = \({V}, {D}\); got float32 \({V}, 7\)"):
            linear_token_stats(self.hidden, torch.zeros(V, 7), self.targets)
        with pytest.raises(ValueError, match=r"bias must be .* \(V,\) = \(23,\); got float32 \(4,\)"):
            linear_token_stats(self.hidden, self.weight, self.targets, torch.zeros(4))
        with pytest.raises(ValueError, match=r"targets must be .* hidden.shape\[:-1\] = \(2, 5\); got int64 \(10,\)"):
            linear_token_stats(self.hidden, self.weight, self.targets.flatten())
        with pytest.raises(ValueError, match=r"at least one row, V >= 1; got float32 \(0, 6\)"):
            linear_token_stats(self.hidden, torch.zeros(0, D), self.targets)

    def test_dtypes(self) -> None:
        with pytest.raises(TypeError, match=r"weight must have the dtype of hidden, torch.float32; got torch.bfloat16"):
            linear_token_stats(self.hidden, self.weight.bfloat16(), self.targets)
        with pytest.raises(TypeError, match=r"hidden must be float32, .*; got int64 \(2, 5\)"):
            linear_token_stats(self.targets, self.weight, self.targets)

    def test_targets_out_of_range(self) -> None:
        with pytest.raises(ValueError, match=r"targets must lie in \[0, V\) = \[0, 23\) .* got 23 at \(9,\)"):
            linear_token_stats(
                self.hidden, self.weight, (self.targets.flatten() + torch.eye(10)[9].long() * V).view(2, 5)
            )

    def test_a_second_derivative(self) -> None:
        hidden, weight, _ = make_head(torch.float32)
        loss = linear_token_stats(hidden, weight, make_targets()).entropy.sum()
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()


class TestMachinery:
    def test_gradcheck(self) -> None:
        hidden, weight, bias = make_head(torch.float64, (3,))
        targets = torch.tensor([1, IGNORE_INDEX, 4])
        assert torch.autograd.gradcheck(
            lambda h, w, b: tuple(linear_token_stats(h, w, targets, b, **TRANSFORM)), (hidden, weight, bias)
        )

    def test_opcheck(self) -> None:
        hidden, weight, bias = make_head(torch.float32, (4,))
        targets = torch.tensor([1, IGNORE_INDEX, 4, 0])
        options = (torch.float32, 0, Transform(0.7, None, 1.0, IGNORE_INDEX).pack(), None)
        torch.library.opcheck(linear_token_stats_op, (hidden, weight, bias, targets, *options))
        torch.library.opcheck(linear_token_stats_op, (hidden, weight.detach(), None, targets, *options))

    def test_compiles_into_one_graph(self) -> None:
        hidden, weight, bias = make_head(torch.float32)
        targets = make_targets()

        def function(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
            stats = linear_token_stats(h * 2, w, targets, b, temperature=0.7)
            return (stats.logprobs * stats.entropy).sum()

        inputs = (hidden, weight, bias)
        expected = function(*inputs)
        actual = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs))

    def test_autocast_keeps_a_float32_gradient(self) -> None:
        """On a CPU with bfloat16 instructions products are F.linear's; elsewhere they are more exact than those."""
        hidden, weight, bias = make_head(torch.float32)
        targets = make_targets()
        with torch.autocast("cpu", torch.bfloat16):
            stats = linear_token_stats(hidden, weight, targets, bias)
            plain = token_stats(F.linear(hidden, weight, bias), targets)
        torch.testing.assert_close(stats, plain, rtol=2**-7, atol=2**-6)
        actual, expected = gradients(stats, [hidden, weight, bias]), gradients(plain, [hidden, weight, bias])
        assert [g.dtype for g in actual] == [torch.float32] * 3
        torch.testing.assert_close(actual, expected, rtol=2**-6, atol=2**-6)

    def test_activation_checkpointing(self) -> None:
        hidden, weight, _ = make_head(torch.float32)
        targets = make_targets()

        def function(h: Tensor) -> Tensor:
            return linear_token_stats(h * 2, weight, targets).logprobs.sum()

        expected = torch.autograd.grad(function(hidden), (hidden, weight))
        actual = torch.autograd.grad(checkpoint(function, hidden, use_reentrant=False), (hidden, weight))
        torch.testing.assert_close(actual, expected)
