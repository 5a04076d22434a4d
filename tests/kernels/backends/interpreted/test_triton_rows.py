"""Triton's kernels over rows of logits, where these lie and how they are shared: against float64."""

from __future__ import annotations

import math

import pytest
import torch
from backends import DTYPES, ROUNDS_ONCE
from torch import Tensor

from edge_kernels import GRPOLossConfig, edge_grpo_loss, reference, token_stats, use_backend
from edge_kernels.backends.triton import token_stats_backward, token_stats_forward, tuning
from edge_kernels.contract import StatsGradients, Transform

# Statistics are sums in float32. A gradient is rounded to the logits' type; the interpreter truncates where a GPU
# rounds to nearest, so that two units in the last place of the largest element are allowed.
STATS_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def make_rows(rows: int, vocab: int, dtype: torch.dtype, *, offset: int = 0, padding: int = 0) -> tuple[Tensor, Tensor]:
    """Return rows that begin ``offset`` elements into their storage, ``vocab + padding`` apart."""
    generator = torch.Generator().manual_seed(vocab)
    storage = torch.randn(offset + rows * (vocab + padding), generator=generator) * 4
    logits = storage.to(dtype).as_strided((rows, vocab), (vocab + padding, 1), offset)
    return logits, torch.randint(vocab, (rows,), generator=generator)


def assert_exact(logits: Tensor, targets: Tensor, **options: float) -> None:
    """Compare values and the gradient of a random combination of them with the reference in float64."""
    coefficients = torch.randn(3, len(logits), generator=torch.Generator().manual_seed(1))
    wide = logits.detach().double().requires_grad_()
    exact = reference.token_stats(wide, targets, **options)
    (expected,) = torch.autograd.grad(exact, wide, list(coefficients.double()))
    transform = Transform(**{"temperature": 1.0, "softcap": None, "logit_scale": 1.0, "ignore_index": -100, **options})
    stats = token_stats_forward(logits, targets, transform)
    for name, actual, value in zip(exact._fields, stats, exact, strict=False):
        torch.testing.assert_close(
            actual.double(), value, rtol=0, atol=STATS_TOLERANCE, msg=lambda m, n=name: f"{n} {m}"
        )
    assert (stats.entropy >= 0).all()
    assert (stats.logprobs <= 0).all()
    gradient = torch.empty(logits.shape, dtype=logits.dtype)
    token_stats_backward(logits, targets, stats, StatsGradients(*coefficients), transform, out=gradient)
    tolerance = GRADIENT_TOLERANCE[logits.dtype] * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=tolerance)


# A lane's vector has 4 elements of float32 or 8 of 16 bits, a tile of the interpreter 256. 5: edges only. 263: a tile
# and edges. 519: two tiles and edges. 700: vectors behind the tiles, too few for every lane.
@pytest.mark.parametrize("vocab", [5, 263, 519, 700])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_begin_anywhere(dtype: torch.dtype, vocab: int) -> None:
    for offset, padding in ((0, 0), (1, 0), (7, 3), (8, 8)):
        assert_exact(*make_rows(2, vocab, dtype, offset=offset, padding=padding))


# Four programs per multiprocessor. 1: whole rows. 2: two programs a row. 9: more programs than a row has tiles.
@pytest.mark.parametrize("multiprocessors", [1, 2, 9], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "temperature": 0.7}, {"logit_scale": -0.5}], ids=str)
def test_rows_shared_by_programs(multiprocessors: int, dtype: torch.dtype, options: dict[str, float]) -> None:
    logits, targets = make_rows(4, 1301, dtype, offset=3)
    targets[1] = 1300
    assert_exact(logits, targets, **options)
    assert (tuning.programs_per_row(tuning.device_of(logits), 4, 6) > 1) == (multiprocessors > 1)


@pytest.mark.parametrize("multiprocessors", [1, 9], indirect=True)
def test_special_rows(multiprocessors: int) -> None:
    logits, targets = make_rows(7, 600, torch.float32)
    logits[0, 1:599] = -math.inf
    logits[1, 599] = math.nan
    logits[2, 0] = math.inf
    logits[3] = -math.inf
    logits[4] += 1e4
    logits[5] = math.nan  # ignored
    logits[6, 7] = 1e4
    targets[:] = torch.tensor([0, 0, 1, 2, 3, -100, 7])
    stats = token_stats(logits, targets)
    exact = reference.token_stats(logits.double(), targets)
    for actual, expected in zip(stats, exact, strict=True):
        assert actual.isnan().tolist() == [False, True, True, True, False, False, False]
        # At an offset of 1e4 float32 resolves a logsumexp to 1e-3.
        tolerance = 2e-5 if ROUNDS_ONCE else 1e-4
        torch.testing.assert_close(actual.double(), expected, rtol=1e-7, atol=tolerance, equal_nan=True)
    assert 0 <= stats.entropy[6] < 1e-6
    assert all(value[5] == 0 for value in stats)


@pytest.mark.parametrize("multiprocessors", [1, 9], indirect=True)
def test_a_target_outside_the_row_is_nan(multiprocessors: int) -> None:
    logits, _ = make_rows(3, 300, torch.float32)
    stats = token_stats_forward(logits, torch.tensor([300, -5, 2]), Transform(1.0, None, 1.0, -100))
    assert stats.logprobs.isnan().tolist() == [True, True, False]
    assert stats.entropy.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_between_rows_that_lie_differently(dtype: torch.dtype) -> None:
    """The output's vectors do not begin where the logits' do."""
    logits, targets = make_rows(4, 333, dtype, offset=1, padding=2)
    transform = Transform(1.0, None, 1.0, -100)
    stats = token_stats_forward(logits, targets, transform)
    coefficients = StatsGradients(torch.tensor([1.0, 0.0, -2.0, 0.5]), None, None)
    expected = torch.empty(4, 333, dtype=dtype)
    token_stats_backward(logits.contiguous(), targets, stats, coefficients, transform, out=expected)
    storage = torch.full((4 * 340,), 7.0, dtype=dtype)
    out = storage.as_strided((4, 333), (340, 1), 2)
    token_stats_backward(logits, targets, stats, coefficients, transform, out=out)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert (storage[:2] == 7).all()
    assert (out[1] == 0).all()
    assert (storage.view(4, 340)[:, 335:] == 7).all()


@pytest.mark.parametrize("multiprocessors", [1, 64], indirect=True)  # one program a row, and rows split over several
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sweep_over_rows_of_any_place(multiprocessors: int, inplace: bool, dtype: torch.dtype) -> None:
    rows = make_rows(2 * 4, 391, dtype, offset=5)[0].view(2, 4, 391)[:, :3]  # two blocks of rows
    targets, mask = torch.randint(391, (2, 3)), torch.tensor([[True, True, False], [True, True, True]])
    advantages = torch.tensor([[1.0, 0.0, 3.0], [-0.5, 2.0, 1.0]])
    config = GRPOLossConfig(temperature=0.8)
    wide = rows.double().requires_grad_()
    with use_backend("reference"):
        expected = edge_grpo_loss(wide, targets, mask, advantages=advantages, config=config)
        (exact,) = torch.autograd.grad(expected.loss, wide)
    leaf = rows.requires_grad_()
    work = leaf * 1 if inplace else leaf  # a leaf cannot be written in place
    out = edge_grpo_loss(work, targets, mask, advantages=advantages, config=config, inplace=inplace)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.logprobs.double(), expected.logprobs, rtol=0, atol=STATS_TOLERANCE)
    torch.testing.assert_close(out.entropy.double(), expected.entropy, rtol=0, atol=STATS_TOLERANCE)
    tolerance = GRADIENT_TOLERANCE[dtype] * exact.abs().max().item() * 2
    torch.testing.assert_close(gradient.double(), exact, rtol=0, atol=tolerance)
    assert (gradient[0, 1:] == 0).all()  # advantage 0, and outside the mask


def test_unaligned_memory_is_refused() -> None:
    numbers = torch.zeros(64, dtype=torch.uint8)[1:].numpy()[1:41].view("float16")
    with pytest.raises(
        ValueError, match=r"begins at a multiple of 16 bytes; got one that is off by 2; pass logits\.clo"
    ):
        token_stats(torch.from_numpy(numbers)[None], torch.tensor([0]))
