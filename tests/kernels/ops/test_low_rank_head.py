"""A low-rank part of the head, as an adapter has: against the sum of weights in float64, over several tiles."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from error_budget import assert_within_budget
from torch import Tensor

from edge_kernels import GRPOLossConfig, edge_grpo_loss, linear_edge_grpo_loss, linear_token_stats, token_stats
from edge_kernels.contract import Transform
from edge_kernels.ops.linear_token_stats import linear_token_stats_op

pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.parametrize("backend", ["cpu", "reference"], indirect=True),
]

B, T, D, R, V = 2, 5, 6, 3, 23
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
OPTIONS = {"temperature": 0.7, "softcap": 6.0, "logit_scale": 1.5}


@pytest.fixture(params=["one tile", "tiles of three rows"])
def tile_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows leave a last odd tile; a block of the weight that is converted has five rows."""
    if request.param == "tiles of three rows":
        module = sys.modules["edge_kernels.ops.head"]
        monkeypatch.setattr(module, "TILE_BYTES", 3 * V * 4)
        monkeypatch.setattr(module, "BLOCK_BYTES", 5 * D * 4)


def make(dtype: torch.dtype, *, frozen: bool) -> tuple[Tensor, ...]:
    """Hidden states, weight, bias, and the adapter's states and factor, the latter always trained."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, T, D), (V, D), (V,), (B, T, R), (V, R))
    tensors = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    if frozen:
        tensors[1].requires_grad_(False)
        tensors[2].requires_grad_(False)
    return tuple(tensors)


def whole_logits(hidden: Tensor, weight: Tensor, bias: Tensor, states: Tensor, factor: Tensor) -> Tensor:
    return F.linear(hidden, weight, bias) + F.linear(states, factor)


def targets() -> Tensor:
    chosen = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
    chosen.view(-1)[1::4] = -100
    return chosen


def gradients(stats, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(stats[0].shape, generator=generator).to(stats[0].dtype) for _ in stats]
    return list(torch.autograd.grad(stats, [x for x in inputs if x.requires_grad], weights))


@pytest.mark.usefixtures("tile_rows")
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_statistics_and_gradients(dtype, frozen):
    inputs = make(dtype, frozen=frozen)
    exact = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in inputs)
    hidden, weight, bias, *low_rank = inputs
    got = linear_token_stats(hidden, weight, targets(), bias, low_rank=tuple(low_rank), **OPTIONS)
    plain = token_stats(whole_logits(*inputs), targets(), **OPTIONS)
    expected = token_stats(whole_logits(*exact), targets(), **OPTIONS)
    for mine, theirs, right in zip(got, plain, expected, strict=True):
        assert_within_budget(mine, theirs, right, tolerance=TOLERANCES[dtype])
    for mine, theirs, right in zip(
        gradients(got, inputs), gradients(plain, inputs), gradients(expected, exact), strict=True
    ):
        assert_within_budget(mine, theirs, right, tolerance=TOLERANCES[dtype])


@pytest.mark.usefixtures("tile_rows")
def test_loss_and_gradients_are_those_of_the_sum_of_weights():
    inputs = make(torch.float64, frozen=True)
    hidden, weight, bias, *low_rank = inputs
    chosen, mask = targets().clamp(min=0), torch.arange(T).expand(B, T) >= 1
    options = {"advantages": torch.tensor([0.5, -1.5], dtype=torch.float64), "config": GRPOLossConfig(temperature=0.8)}
    out = linear_edge_grpo_loss(hidden, weight, chosen, mask, bias, low_rank=tuple(low_rank), **options)
    expected = edge_grpo_loss(whole_logits(*inputs), chosen, mask, **options)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.logprobs, expected.logprobs)
    trained = [x for x in inputs if x.requires_grad]
    for mine, theirs in zip(
        torch.autograd.grad(out.loss, trained), torch.autograd.grad(expected.loss, trained), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_operator():
    hidden, weight, bias, states, factor = make(torch.float32, frozen=False)
    both = torch.cat([hidden, states], -1).detach().flatten(0, 1).requires_grad_()
    options = (torch.float32, 0, Transform(1.0, None, 1.0, -100).pack())
    torch.library.opcheck(linear_token_stats_op, (both, weight, bias, targets().flatten(), *options, factor))
    torch.library.opcheck(linear_token_stats_op, (both, weight.detach(), None, targets().flatten(), *options, factor))


def test_compiles_as_one_graph():
    hidden, weight, _, states, factor = make(torch.float32, frozen=True)

    chosen = targets()

    def entropy(hidden: Tensor, states: Tensor) -> Tensor:
        return linear_token_stats(hidden, weight, chosen, low_rank=(states, factor)).entropy.sum()

    compiled = torch.compile(entropy, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(entropy(hidden, states), [hidden, states, factor])
    got = torch.autograd.grad(compiled(hidden, states), [hidden, states, factor])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("low_rank", "message"),
    [
        ((torch.ones(B, T, R), torch.ones(V + 1, R)), r"low_rank\[1\] must .*\(V, r\)"),
        ((torch.ones(B, T, R + 1), torch.ones(V, R)), r"low_rank\[0\] must .*hidden\.shape\[:-1\], r"),
        ((torch.ones(B, T, R).long(), torch.ones(V, R)), r"low_rank\[0\] must"),
        (torch.ones(V, R), "low_rank must be a pair of tensors"),
    ],
)
def test_what_does_not_fit_is_refused(low_rank, message):
    hidden, weight, *_ = make(torch.float32, frozen=True)
    with pytest.raises((TypeError, ValueError), match=message):
        linear_token_stats(hidden, weight, targets(), low_rank=low_rank)


def test_a_temperature_for_each_response_divides_both_parts() -> None:
    hidden, weight, _, states, factor = make(torch.float64, frozen=False)
    temperature = torch.tensor([0.5, 2.0])

    def logits() -> Tensor:
        return (F.linear(hidden, weight) + F.linear(states, factor)) / temperature.view(-1, 1, 1)

    used = (hidden, weight, states, factor)
    stats = linear_token_stats(hidden, weight, targets(), low_rank=(states, factor), temperature=temperature)
    expected = token_stats(logits(), targets())
    torch.testing.assert_close(stats, expected)
    torch.testing.assert_close(gradients(stats, used), gradients(expected, used))
    mask, options = targets() >= 0, {"advantages": torch.tensor([1.0, -1.0]), "config": GRPOLossConfig(beta=0.0)}
    low_rank = (states, factor)
    out = linear_edge_grpo_loss(hidden, weight, targets(), mask, low_rank=low_rank, temperature=temperature, **options)
    wanted = edge_grpo_loss(logits(), targets(), mask, **options)
    torch.testing.assert_close(out.loss, wanted.loss)
    torch.testing.assert_close(torch.autograd.grad(out.loss, used), torch.autograd.grad(wanted.loss, used))
