"""The losses under a gradient scaler: no factor is left out before the gradient is rounded to float16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scaled_gradients import (
    NUM_ITEMS,
    SCALES,
    B,
    D,
    T,
    V,
    check_head_gradients,
    check_logits_gradient,
    check_overflow,
    head_gradients,
    logits_gradient,
    make_batch,
)

from edge_kernels import GRPOLossConfig, edge_grpo_loss, linear_edge_grpo_loss, reference
from edge_kernels.ops import head

CONFIGS = {"plain": GRPOLossConfig(), "bonus": GRPOLossConfig(entropy_coef=0.01, temperature=0.7)}

pytestmark = [
    pytest.mark.usefixtures("backend", "one_thread"),
    pytest.mark.parametrize("backend", ["cpu", "reference"], indirect=True),
]


@pytest.fixture(params=["one tile", "tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "tiles":
        monkeypatch.setattr(head, "TILE_BYTES", 3 * V * 4)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("scale", SCALES)
def test_the_gradient_of_the_logits_is_rounded_once(scale: float, name: str, inplace: bool) -> None:
    check_logits_gradient(scale, CONFIGS[name], inplace=inplace)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("scale", SCALES)
def test_the_gradients_of_the_head_are_as_exact_as_plain_pytorch(scale: float, name: str) -> None:
    check_head_gradients(scale, CONFIGS[name])


def test_what_is_too_large_is_infinite() -> None:
    check_overflow()


@pytest.mark.slow
@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("of", [logits_gradient, head_gradients])
def test_a_factor_is_not_rounded_to_the_type_of_the_gradient(of: Any) -> None:
    """1 / 3 in bfloat16 is 0.2 % too large, and so would be every gradient, compiled or not."""
    batch = make_batch(torch.bfloat16)
    loss = edge_grpo_loss if of is logits_gradient else linear_edge_grpo_loss

    def elements(function: Any, scale: float) -> torch.Tensor:
        gradients = of(function, batch, scale)
        parts = [gradients] if isinstance(gradients, torch.Tensor) else gradients
        return torch.cat([part.flatten().double() for part in parts])

    whole = elements(loss, 1.0)
    torch.compiler.reset()
    for function in (loss, torch.compile(loss, backend="aot_eager")):
        third = elements(function, 1 / 3)
        assert (third / whole)[whole != 0].mean().item() == pytest.approx(1 / 3, rel=1e-3)


class Model(torch.nn.Module):
    """Parameters in float32, as a gradient scaler wants them; autocast makes hidden states of float16 from them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(V, 16)
        self.inner = torch.nn.Linear(16, D)
        self.head = torch.nn.Linear(D, V)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(self.embedding(ids))


def stepped(dtype: torch.dtype, loss_of: Any, init_scale: float) -> tuple[Model, torch.amp.GradScaler]:
    batch = make_batch()
    model = Model().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e4)
    is_half = dtype == torch.float32
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, enabled=is_half)
    with torch.autocast("cpu", torch.float16, enabled=is_half):
        hidden = model(torch.arange(B * T).view(B, T))
        assert hidden.dtype == (torch.float16 if is_half else dtype)
        loss = loss_of(model.head, hidden, batch.targets, batch.mask, **batch.options)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return model, scaler


def from_hidden(layer: torch.nn.Linear, hidden: torch.Tensor, *tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    return linear_edge_grpo_loss(hidden, layer.weight, *tokens, layer.bias, **options).loss


def from_logits(layer: torch.nn.Linear, hidden: torch.Tensor, *tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    return edge_grpo_loss(layer(hidden), *tokens, **options).loss


def by_reference(layer: torch.nn.Linear, hidden: torch.Tensor, *tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    return reference.edge_grpo_loss(layer(hidden), *tokens, **options).loss


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("loss_of", [from_hidden, from_logits])
def test_a_step_with_a_scaler_is_that_of_float64(loss_of: Any) -> None:
    before = Model()
    exact, _ = stepped(torch.float64, by_reference, 1.0)
    actual, scaler = stepped(torch.float32, loss_of, 65536.0)
    assert scaler.get_scale() == 65536
    for name, start in before.named_parameters():
        moved = actual.get_parameter(name) - start
        expected = exact.get_parameter(name) - start
        assert expected.abs().max() > 100 / NUM_ITEMS
        error = (moved - expected).norm() / expected.norm()
        assert error < 4e-3, f"{name} {error}"


def test_a_scaler_that_is_too_large_skips_its_step() -> None:
    actual, scaler = stepped(torch.float32, from_hidden, 2.0**40)
    assert scaler.get_scale() == 2.0**39
    for name, start in Model().named_parameters():
        assert torch.equal(actual.get_parameter(name), start)
