"""The ops under ``torch.compile``: one graph for all lengths, batches and numbers; and inputs of any layout."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

import edge_kernels as ek
from edge_kernels.contract import LossRule, TokenTerms, Transform
from edge_kernels.ops.grpo_loss import grpo_loss_op
from edge_kernels.ops.linear_grpo_loss import linear_grpo_loss_backward_op, linear_grpo_loss_op
from edge_kernels.ops.linear_token_stats import linear_token_stats_backward_op, linear_token_stats_op
from edge_kernels.ops.token_loss import token_loss_op
from edge_kernels.ops.token_stats import token_stats_backward_op, token_stats_op

pytestmark = pytest.mark.usefixtures("one_thread")

V, D = 11, 13  # no length or batch below is the same: the tracer takes equal sizes for one


def make_inputs(B: int, T: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(100 * B + T)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_(len(shape) > 1)

    return SimpleNamespace(
        logits=normal(B, T, V),
        hidden=normal(B, T, D),
        weight=normal(V, D),
        targets=torch.randint(V, (B, T), generator=generator),
        mask=torch.rand(B, T, generator=generator) < 0.8,
        advantages=normal(B),
        groups=torch.arange(B) // 2,
    )


def with_advantages(x: SimpleNamespace) -> dict[str, Tensor]:
    return {"advantages": x.advantages}


def with_rewards(x: SimpleNamespace) -> dict[str, Tensor]:
    return {"rewards": x.advantages, "group_ids": x.groups}


def loss_of(x: SimpleNamespace, temperature: float, credit: Callable = with_advantages) -> Tensor:
    config = ek.GRPOLossConfig(temperature=temperature)
    return ek.edge_grpo_loss(x.logits, x.targets, x.mask, config=config, **credit(x)).loss


def linear_loss_of(x: SimpleNamespace, temperature: float, credit: Callable = with_advantages) -> Tensor:
    config = ek.GRPOLossConfig(temperature=temperature, epsilon_high=temperature / 2)
    return ek.linear_edge_grpo_loss(x.hidden, x.weight, x.targets, x.mask, config=config, **credit(x)).loss


# What is called with the inputs and a temperature. The configuration is made inside, as a schedule would.
FUNCTIONS: dict[str, Callable[[SimpleNamespace, float], Tensor]] = {
    "token_stats": lambda x, t: ek.token_stats(x.logits, x.targets, temperature=t).logprobs.sum(),
    "token_entropy": lambda x, t: ek.token_entropy(x.logits, temperature=t).sum(),
    "linear_token_stats": lambda x, t: ek.linear_token_stats(
        x.hidden, x.weight, x.targets, temperature=t
    ).entropy.sum(),
    "loss": loss_of,
    "loss with rewards": lambda x, t: loss_of(x, t, with_rewards),
    "linear loss": linear_loss_of,
    "linear loss with rewards": lambda x, t: linear_loss_of(x, t, with_rewards),
}


def count_graphs(function: Callable[[SimpleNamespace, float], Tensor], calls: list, dynamic: bool | None) -> int:
    """Return how many graphs the calls took, each of which must give the value and gradient of plain execution.

    Not how often the backend was called: torch 2.9 makes a graph twice where its numbers become tensors.
    """
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for B, T, temperature in calls:
        x, y = make_inputs(B, T), make_inputs(B, T)
        value, expected = compiled(x, temperature), function(y, temperature)
        torch.testing.assert_close(value, expected)
        value.backward()
        expected.backward()
        for name in ("logits", "hidden", "weight"):
            torch.testing.assert_close(getattr(x, name).grad, getattr(y, name).grad)
    return len(_debug_get_cache_entry_list(function.__code__))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.slow
def test_ten_lengths_and_five_temperatures_recompile_twice_at_most(name: str) -> None:
    """Once when the length first changes, once when the temperature does."""
    calls = [(4, 5 + i, 1.0 + 0.1 * (i % 5)) for i in range(10)]
    assert count_graphs(FUNCTIONS[name], calls, None) <= 3


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.slow
def test_told_to_be_dynamic_one_graph_serves_all(name: str) -> None:
    calls = [(4, 5, 1.0), (4, 7, 0.7), (6, 8, 0.7), (8, 3, 1.3)]
    assert count_graphs(FUNCTIONS[name], calls, True) == 1


@pytest.mark.slow
def test_totals_and_coefficients_may_change_every_step() -> None:
    """What a schedule, or the number of tokens of a step, changes: numbers are inputs of the graph, not constants."""

    def function(x: SimpleNamespace, number: float) -> Tensor:
        config = ek.GRPOLossConfig(epsilon_high=number, entropy_coef=number / 100, loss_type="dapo")
        out = ek.edge_grpo_loss(
            x.logits, x.targets, x.mask, advantages=x.advantages, num_items=10 * number, config=config
        )
        return out.loss

    assert count_graphs(function, [(4, 5, 0.2 + 0.01 * i) for i in range(6)], None) <= 2


@pytest.mark.slow
def test_without_a_configuration_the_default_is_no_obstacle() -> None:
    function = lambda x, _: ek.edge_grpo_loss(x.logits, x.targets, x.mask, advantages=x.advantages).loss  # noqa: E731
    assert count_graphs(function, [(4, 5, 1.0), (4, 6, 1.0)], None) <= 2


# --- layouts ----------------------------------------------------------------------------------------------------------


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def expanded(tensor: Tensor) -> Tensor:
    return tensor[:1].expand(tensor.shape)


def sliced(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, 1)[:, ::2]


@pytest.mark.parametrize("backend", ["cpu", "reference"], indirect=True)
@pytest.mark.parametrize("layout", [transposed, expanded, sliced])
@pytest.mark.slow
def test_opcheck_whatever_the_strides(layout: Callable[[Tensor], Tensor], backend: str) -> None:
    """The fake implementations promise what the real ones return, for all seven ops."""
    B, T = 3, 4
    generator = torch.Generator().manual_seed(0)

    def of(*shape: int) -> Tensor:
        return layout(torch.randn(*shape, generator=generator))

    def leaf(*shape: int) -> Tensor:
        return of(*shape).detach().requires_grad_()

    def column(tensor: Tensor) -> Tensor:
        return tensor[:, 0]

    transform, rule = Transform(0.7, None, 1.0, -100).pack(), LossRule.of(ek.GRPOLossConfig()).pack()
    targets = layout(torch.randint(V, (B, T), generator=generator))
    mask = layout(torch.ones(B, T, dtype=torch.bool))
    # Negative advantages, so that the loss is positive: opcheck's scalar is made of absolute values, and gradients that
    # are handed out are scaled where they lie.
    weight, advantages = of(B, T).abs(), -of(B, T).abs()
    terms = TokenTerms(mask, weight, advantages).pack()
    rows = TokenTerms(column(mask), column(weight), column(advantages)).pack()
    stats, gradients = [of(B, T).abs() + 1] * 3, [of(B, T), None, None]  # entropy, maximum, sum
    head = (leaf(B, D), leaf(V, D), torch.randn(2 * V)[::2].requires_grad_())
    plain = [tensor.detach() for tensor in head]
    wanted = [True] * 3
    calls: list[tuple] = [
        (token_stats_op, (leaf(B, T, V), targets, transform)),
        (token_stats_backward_op, (of(B, T, V), targets, stats, gradients, transform)),
        (token_loss_op, (leaf(B, T), leaf(B, T), terms, rule)),
        (grpo_loss_op, (leaf(B, T, V), targets, transform, terms, rule)),
        (linear_token_stats_op, (*head, column(targets), torch.float32, 0, transform, None)),
        (
            linear_token_stats_backward_op,
            (
                *plain,
                column(targets),
                [column(s) for s in stats],
                [column(gradients[0]), None, None],
                wanted,
                torch.float32,
                0,
                transform,
                None,
            ),
        ),
        (linear_grpo_loss_op, (*head, column(targets), wanted, False, torch.float32, 0, transform, rows, rule)),
        (linear_grpo_loss_op, (*head, column(targets), wanted, True, torch.float32, 0, transform, rows, rule)),
        (
            linear_grpo_loss_backward_op,
            (torch.tensor(2.0), *plain, of(B, V), column(mask), wanted, torch.float32),
        ),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op, arguments)
