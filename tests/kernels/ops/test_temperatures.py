"""A temperature for each response: against the plain division of the logits, in every path and on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import BACKENDS, WIDEST
from grpo_batch import B, T, V, config_of, inputs_for, make_batch

from edge_kernels import edge_grpo_loss, linear_edge_grpo_loss, linear_token_stats, reference, token_stats

pytestmark = [
    pytest.mark.usefixtures("one_thread", "backend"),
    pytest.mark.parametrize("backend", BACKENDS, indirect=True),
]

# Two neighbours share one, which the kernels take in one call.
TEMPERATURES = torch.tensor([0.5, 2.0, 2.0, 0.7], dtype=torch.float64)
IS_WIDE = torch.finfo(WIDEST).bits == 64
TOLERANCE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12} if IS_WIDE else {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_statistics(softcap: float | None) -> None:
    batch = make_batch()
    logits = F.linear(batch.hidden, batch.weight, batch.bias).detach().to(WIDEST).requires_grad_()
    targets = batch.targets.masked_fill(~batch.mask, -100)
    stats = token_stats(logits, targets, temperature=TEMPERATURES, softcap=softcap, logit_scale=1.3)
    z = logits.double() * 1.3
    z = (z if softcap is None else softcap * (z / softcap).tanh()) / TEMPERATURES[:, None, None]
    expected = reference.token_stats(z, targets)
    for actual, wanted in zip(stats, expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, **TOLERANCE)
        gradients = (torch.autograd.grad(value.sum(), logits, retain_graph=True)[0] for value in (actual, wanted))
        torch.testing.assert_close(*gradients, **TOLERANCE)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"beta": 0.04, "entropy_coef": 0.1}, {"loss_type": "geo_mean"}, {"softcap": 3.0}],  # one sweep, two, and a curve
)
def test_loss_from_logits(options: dict[str, Any], inplace: bool) -> None:
    batch, config = make_batch(), config_of(**options)
    logits = F.linear(batch.hidden, batch.weight, batch.bias).detach().to(WIDEST).requires_grad_()
    inputs = inputs_for(batch, config)
    wide = logits.detach().double().requires_grad_()
    expected = reference.edge_grpo_loss(wide, batch.targets, batch.mask, temperature=TEMPERATURES, **inputs)
    (wanted,) = torch.autograd.grad(expected.loss, wide)
    given = TEMPERATURES.float() if inplace else TEMPERATURES
    out = edge_grpo_loss(logits * 1, batch.targets, batch.mask, temperature=given, inplace=inplace, **inputs)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if inplace and IS_WIDE else TOLERANCE  # 0.7 in float32
    torch.testing.assert_close(out.loss.double(), expected.loss, **tolerance)
    torch.testing.assert_close(out.entropy.double(), expected.entropy, **tolerance)
    torch.testing.assert_close(gradient.double(), wanted, **tolerance)
    # Equal temperatures are the configuration's.
    equal = edge_grpo_loss(logits, batch.targets, batch.mask, temperature=torch.full((B,), 0.6), **inputs)
    inputs["config"] = config_of(**options, temperature=0.6)
    same = edge_grpo_loss(logits, batch.targets, batch.mask, **inputs)
    torch.testing.assert_close(equal.loss, same.loss, rtol=1e-6, atol=1e-7)


def test_from_hidden_states() -> None:
    batch, config = make_batch(), config_of(beta=0.04)
    hidden, weight = (x.detach().to(WIDEST).requires_grad_() for x in (batch.hidden, batch.weight))
    inputs = inputs_for(batch, config)
    out = linear_edge_grpo_loss(hidden, weight, batch.targets, batch.mask, temperature=TEMPERATURES, **inputs)
    logits = hidden.double() @ weight.double().T
    expected = reference.edge_grpo_loss(logits, batch.targets, batch.mask, temperature=TEMPERATURES, **inputs)
    torch.testing.assert_close(out.loss.double(), expected.loss, **TOLERANCE)
    gradients = (torch.autograd.grad(loss, (hidden, weight)) for loss in (out.loss, expected.loss))
    torch.testing.assert_close(*gradients, **TOLERANCE)
    targets = batch.targets.masked_fill(~batch.mask, -100)
    stats = linear_token_stats(hidden, weight, targets, temperature=TEMPERATURES)
    torch.testing.assert_close(stats.entropy.double(), expected.entropy, **TOLERANCE)


def test_compiles_into_one_graph_for_any_temperatures() -> None:
    batch = make_batch()
    logits = F.linear(batch.hidden, batch.weight, batch.bias).detach().to(WIDEST).requires_grad_()
    inputs = inputs_for(batch, config_of())

    def loss(x: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        return edge_grpo_loss(x, batch.targets, batch.mask, temperature=temperature, **inputs).loss

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for temperatures in (TEMPERATURES, TEMPERATURES.flip(0)):
        values = compiled(logits, temperatures), loss(logits, temperatures)
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*(torch.autograd.grad(value, logits) for value in values))


def test_what_is_refused() -> None:
    batch = make_batch()
    logits, hidden, weight = torch.zeros(B, T, V), torch.zeros(B, T, 5), torch.zeros(V, 5)
    arguments = {"advantages": torch.ones(B)}
    for wrong, message in (
        (
            torch.ones(3),
            r"temperature must be a number, or floating point with shape \(B,\) = \(4,\); got float32 \(3,\)",
        ),
        (torch.ones(B, dtype=torch.int64), "or floating point"),
        (torch.tensor([1.0, 0.0, 1.0, 1.0]), "temperature must be finite and greater than 0"),
    ):
        with pytest.raises(ValueError, match=message):
            edge_grpo_loss(logits, batch.targets, batch.mask, temperature=wrong, **arguments)
    options = {**arguments, "temperature": torch.ones(B)}
    with pytest.raises(ValueError, match="takes neither bias nor softcap; got bias=float32"):
        linear_edge_grpo_loss(hidden, weight, batch.targets, batch.mask, torch.zeros(V), **options)
