"""The tiles that a GPU takes, on CPU tensors: all rows of a span at a time, within a budget, without a wait.

test_head_plan.py: how high they are. What is launched for a GPU that is not there: test_triton.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import BACKENDS, DTYPES, INTERPRETING
from error_budget import assert_within_budget
from grpo_batch import LINEAR, B, D, T, V, config_of, from_hidden, from_reference, inputs_for, make_batch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from edge_kernels import linear_edge_grpo_loss, linear_token_stats, use_backend
from edge_kernels.contract import LossRule, StatsGradients, TokenTerms, Transform
from edge_kernels.ops import head_plan
from edge_kernels.ops.head_plan import COLUMNS, TILES, Problem

pytestmark = [
    pytest.mark.parametrize("backend", BACKENDS, indirect=True),
    pytest.mark.usefixtures("backend", "one_thread"),
]


def budget_of(way: str, height: int, dtype: torch.dtype, *, known: bool = True, shape: Any = (B * T, D, V)) -> int:
    """Return the budget at which tiles of this way have ``height`` rows."""
    N, hidden, vocab = shape
    sums = head_plan.sums_in_place("cpu", dtype)
    problem = Problem(N, hidden, vocab, dtype.itemsize, dtype.itemsize, known, True, sums, False, True)
    plans = {plan.way: plan for plan in head_plan.every_plan(problem, 1, head_plan.RATES["sm_90"])}
    return plans[way].extra_bytes + (height - 1) * head_plan._row_bytes(problem)


def cast(batch: SimpleNamespace, dtype: torch.dtype) -> SimpleNamespace:
    """Return the batch with leaves of another dtype."""
    leaves = {name: getattr(batch, name).detach().to(dtype).requires_grad_() for name in ("hidden", "weight", "bias")}
    return SimpleNamespace(**{**vars(batch), **leaves})


def loss_and_gradients(path: Any, batch: SimpleNamespace, **options: Any) -> list[Tensor]:
    out = path(batch, **options)
    gradients = torch.autograd.grad(out.loss, (batch.hidden, batch.weight, batch.bias))
    return [out.loss, out.logprobs, out.entropy, *gradients]


@pytest.fixture
def sums_in_float32() -> Iterator[None]:
    """The product that adds to a float32 matrix, which torch has for GPUs only."""
    library = torch.library.Library("aten", "IMPL")

    def addmm(total: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *, beta: int = 1, out: Tensor) -> Tensor:
        assert total is out or total.data_ptr() == out.data_ptr()
        assert dtype == out.dtype == torch.float32
        for part, rows in zip(out.split(64), a.split(64), strict=True):  # little memory, as on a GPU
            torch.addmm(part, rows.float(), b.float(), beta=beta, out=part)
        return out

    library.impl("addmm.dtype_out", addmm, "CPU")
    before = dict(head_plan._sums_in_place)
    head_plan._sums_in_place.clear()
    assert head_plan.sums_in_place("cpu", torch.bfloat16)
    yield
    library._destroy()
    head_plan._sums_in_place.clear()
    head_plan._sums_in_place.update(before)


KINDS = ("loss", "logprobs", "entropy", "d hidden", "d weight", "d bias")
WAYS = {
    "one tile": (TILES, B * T),
    "tiles of 7 rows": (TILES, 7),  # 24 rows: a smaller tile at the end
    "tiles of 1 row": (TILES, 1),
    "by columns": (COLUMNS, 5),
}
CONFIGS = [
    {"beta": 0.04, "entropy_coef": 0.1, "delta": 1.5, "temperature": 0.7},
    {"importance_sampling_level": "sequence", "temperature": 1.3},  # statistics first
    {"loss_type": "cispo", "softcap": 3.0, "logit_scale": -1.5, "injected": "shaped"},
    {},
]
if INTERPRETING:  # which takes half a second for each tile
    del WAYS["tiles of 1 row"], CONFIGS[2:]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES[:2] if INTERPRETING else DTYPES, ids=str)
def test_values_and_gradients(way: str, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No worse than plain PyTorch in the same dtype."""
    name, height = WAYS[way]
    if name == COLUMNS and (dtype.itemsize > 2 or backend == "reference"):
        pytest.skip("no such way: sums of 32 bits are the gradient, and the reference makes statistics anew")
    monkeypatch.setattr(head_plan, "BLOCK_BYTES", 5 * D * 4)  # blocks of 5 columns of 13
    for options in CONFIGS[:1] if INTERPRETING and way != "tiles of 7 rows" else CONFIGS:
        config = config_of(**options)
        batch = cast(make_batch(), dtype)
        inputs = inputs_for(batch, config)
        known = config.importance_sampling_level == "token" and dtype != torch.float16
        budget = budget_of(name, height, dtype, known=known)
        with head_plan.use_way(name):
            actual = loss_and_gradients(from_hidden, batch, memory_budget=budget, **inputs)
        with use_backend("reference"):
            plain = loss_and_gradients(from_reference, batch, **inputs)
            exact = loss_and_gradients(from_reference, cast(batch, torch.float64), **inputs)
        tolerance = 2 * torch.finfo(dtype).eps
        for kind, *values in zip(KINDS, actual, plain, exact, strict=True):
            assert values[0].dtype == values[1].dtype
            assert_within_budget(*values, tolerance=tolerance, name=f"{way}, {options}, {kind}")


def statistics_and_gradients(leaves: list[Tensor], targets: Tensor, **options: Any) -> list[Tensor]:
    hidden, weight, *bias = leaves
    stats = linear_token_stats(hidden, weight, targets, *bias, **options)
    return [*stats[:2], *torch.autograd.grad(stats.logprobs.sum() + 0.3 * stats.entropy.sum(), leaves)]


def test_weights_of_any_strides() -> None:
    batch = cast(make_batch(), torch.float32)
    targets = batch.targets.masked_fill(~batch.mask, -100)
    apart = torch.randn(B, T, D + 2)[..., 1 : D + 1].copy_(batch.hidden.detach()).requires_grad_()
    transposed = batch.weight.detach().t().contiguous().t().requires_grad_()
    budget = budget_of(TILES, 7, torch.float32, known=False)
    for leaves in ([batch.hidden, batch.weight], [apart, transposed]):
        with head_plan.use_way(TILES):
            actual = statistics_and_gradients(leaves, targets, memory_budget=budget)
        with use_backend("reference"):
            exact = statistics_and_gradients([leaf.detach().double().requires_grad_() for leaf in leaves], targets)
        for got, value in zip(actual, exact, strict=True):
            torch.testing.assert_close(got.double(), value, rtol=1e-5, atol=1e-5)


def test_a_tied_weight_gets_both_parts() -> None:
    batch = cast(make_batch(), torch.float32)
    targets, advantages = batch.targets.clamp(max=V - 1), batch.advantages.float()

    def loss(weight: Tensor, **options: Any) -> Tensor:
        hidden = F.embedding(targets, weight)
        return linear_edge_grpo_loss(hidden, weight, targets, batch.mask, advantages=advantages, **options).loss

    with head_plan.use_way(TILES):
        (actual,) = torch.autograd.grad(
            loss(batch.weight, memory_budget=budget_of(TILES, 7, torch.float32)), batch.weight
        )
    with use_backend("reference"):
        wide = batch.weight.detach().double().requires_grad_()
        (exact,) = torch.autograd.grad(loss(wide), wide)
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("height", [7] if INTERPRETING else [B * T, 7])
def test_rows_that_do_not_count_reach_nothing(height: int) -> None:
    batch = cast(make_batch(), torch.float32)
    with torch.no_grad():
        batch.hidden[~batch.mask] = math.nan
    config = config_of()
    inputs = inputs_for(batch, config)
    with head_plan.use_way(TILES):
        found = loss_and_gradients(from_hidden, batch, memory_budget=budget_of(TILES, height, torch.float32), **inputs)
    assert all(value.isfinite().all() for value in found)
    assert (found[3][~batch.mask] == 0).all()
    with torch.no_grad():
        batch.hidden[~batch.mask] = 0
    for got, value in zip(found, loss_and_gradients(from_hidden, batch, **inputs), strict=True):
        torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("sequences", "tokens"), [(0, 3), (2, 0), (2, 3)])
def test_no_rows_and_none_that_counts(sequences: int, tokens: int) -> None:
    hidden = torch.randn(sequences, tokens, D, requires_grad=True)
    weight, bias = torch.randn(V, D, requires_grad=True), torch.randn(V, requires_grad=True)
    targets, mask = torch.zeros(sequences, tokens, dtype=torch.long), torch.zeros(sequences, tokens, dtype=torch.bool)
    with head_plan.use_way(TILES):
        out = linear_edge_grpo_loss(hidden, weight, targets, mask, bias, advantages=torch.ones(sequences))
        gradients = torch.autograd.grad(out.loss, (hidden, weight, bias))
        stats = linear_token_stats(hidden, weight, targets.masked_fill(~mask, -100), bias)
        gradients += torch.autograd.grad(stats.logprobs.sum(), (hidden, weight, bias))
    assert out.loss == 0
    for gradient, like in zip(gradients, (hidden, weight, bias) * 2, strict=True):
        assert gradient.shape == like.shape
        assert (gradient == 0).all()


@pytest.mark.skipif(INTERPRETING, reason="the products are torch's")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_over_tiles_are_float32(dtype: torch.dtype, sums_in_float32: None) -> None:
    """24 tiles of a row, and one of all: the same up to the last rounding, into a gradient that exists too."""
    config = config_of("grpo", beta=0.04)
    found: dict[int, list[Tensor]] = {}
    for height in (1, B * T):
        batch = cast(make_batch(), dtype)
        with head_plan.use_way(TILES):
            budget = budget_of(TILES, height, dtype)
            found[height] = loss_and_gradients(from_hidden, batch, memory_budget=budget, **inputs_for(batch, config))
    rounding = torch.finfo(dtype).eps
    for one, many in zip(found[B * T], found[1], strict=True):
        torch.testing.assert_close(many, one, rtol=rounding, atol=rounding / 64)

    batch = cast(make_batch(), dtype)
    targets = batch.targets.masked_fill(~batch.mask, -100)
    exact = [leaf.detach().double().requires_grad_() for leaf in (batch.hidden, batch.weight)]
    with use_backend("reference"):
        *_, expected = statistics_and_gradients(exact, targets)
    batch.weight.grad = torch.full_like(batch.weight, 0.5)
    address = batch.weight.grad.data_ptr()
    with head_plan.use_way(TILES):
        budget = budget_of(TILES, 1, dtype, known=False)
        stats = linear_token_stats(batch.hidden, batch.weight, targets, memory_budget=budget)
        (stats.logprobs.sum() + 0.3 * stats.entropy.sum()).backward()
    assert batch.weight.grad.data_ptr() == address
    torch.testing.assert_close(batch.weight.grad.double(), expected + 0.5, rtol=8 * rounding, atol=8 * rounding)


# --- memory and waits -------------------------------------------------------------------------------------------------


def peak_bytes(call: Any) -> int:
    """Return the most memory that a call had in use, less what it returns, by the allocator's own counters."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_use = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        in_use += event.nbytes()
        peak = max(peak, in_use)
    return peak - sum(value.untyped_storage().nbytes() for value in result)


@pytest.mark.skipif(INTERPRETING, reason="the interpreter allocates for itself")
@pytest.mark.parametrize("way", [TILES, COLUMNS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_budget_is_kept(
    way: str, dtype: torch.dtype, backend: str, sums_in_float32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes at which the tile, the sums and the numbers of each token all show, at three heights of a tile."""
    if backend == "reference" or (way == COLUMNS and dtype == torch.float32):
        pytest.skip("plain PyTorch allocates several tiles; the sums of a float32 gradient are the gradient")
    N, hidden, vocab = 96, 32, 4_001
    states, weight = torch.randn(N, hidden).to(dtype), torch.randn(vocab, hidden).to(dtype)
    call = make_call(states, weight, torch.arange(N) % 3 > 0)
    monkeypatch.setattr(head_plan, "BLOCK_BYTES", 64 * hidden * 4)  # blocks of 64 columns
    for height in (8, 33, N):
        budget = budget_of(way, height, dtype, shape=(N, hidden, vocab))
        with head_plan.use_way(way):
            peak = peak_bytes(lambda budget=budget: LINEAR._sweep(call, False, budget))
        assert 0.5 * budget < peak <= budget, f"{height} rows: {peak:,} of {budget:,} bytes"


def make_call(hidden: Tensor, weight: Tensor, mask: Tensor) -> Any:
    N = len(hidden)
    targets = (torch.arange(N) % len(weight)).masked_fill(~mask, -100)
    terms = TokenTerms(mask, torch.full((N,), 1 / N), torch.linspace(-1, 1, N))
    rule, transform = LossRule.of(config_of()), Transform(1.0, None, 1.0, -100)
    return LINEAR._Call(hidden, weight, None, targets, [True, True, False], hidden.dtype, transform, terms, rule)


class NoWait(TorchDispatchMode):
    """Refuses what makes the host wait for values of a device: reading one, and shapes that depend on them."""

    WAITS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_to_cpu")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        assert not name.startswith(self.WAITS), f"{function} waits for the device"
        if name in ("index", "index_put", "index_put_"):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), f"{function} by a mask waits"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", [TILES, COLUMNS])
def test_nothing_waits_for_the_device(way: str, backend: str, sums_in_float32: None) -> None:
    """With rows that do not count, and with the statistics first."""
    if way == COLUMNS and backend == "reference":
        pytest.skip("no such way")
    hidden, weight = torch.randn(9, D).bfloat16(), torch.randn(V, D).bfloat16()
    call = make_call(hidden, weight, torch.arange(9) % 3 > 0)
    module = sys.modules["edge_kernels.ops.linear_token_stats"]
    with pytest.raises(AssertionError, match="waits for the device"), NoWait():
        torch.ones(2).nonzero()
    with head_plan.use_way(way), NoWait():
        LINEAR._sweep(call, False, budget_of(way, 4, torch.bfloat16, shape=(9, D, V)))
        budget = budget_of(way, 4, torch.bfloat16, known=False, shape=(9, D, V))
        inputs = (hidden, weight, None, call.targets)
        head = module._way(hidden, weight, None, torch.bfloat16, budget)
        stats = module._forward(hidden, weight, call.targets, head, call.transform)
        gradients = StatsGradients(torch.ones(9), None, None)
        module._gradient(*inputs, stats, gradients, call.wanted, torch.bfloat16, budget, call.transform)


@pytest.mark.parametrize("budget", [0, -1, True, 1.5, "1 GB"])
def test_a_budget_is_a_positive_number_of_bytes(budget: Any) -> None:
    batch = cast(make_batch(), torch.float32)
    with pytest.raises(ValueError, match=r"memory_budget must be a positive number of bytes; got"):
        from_hidden(batch, memory_budget=budget, **inputs_for(batch, config_of()))
    with pytest.raises(ValueError, match=r"memory_budget must be a positive number of bytes; got"):
        linear_token_stats(batch.hidden, batch.weight, batch.targets, memory_budget=budget)


@pytest.mark.skipif(INTERPRETING, reason="its tiles are a GPU's")
def test_on_a_cpu_a_budget_bounds_the_tile() -> None:
    """A batch of one tile keeps it; with a smaller budget it is several."""
    batch = cast(make_batch(), torch.float32)
    inputs = inputs_for(batch, config_of(beta=0.04))
    expected = loss_and_gradients(from_hidden, batch, **inputs)
    actual = loss_and_gradients(from_hidden, batch, memory_budget=3 * V * 4, **inputs)
    for got, value in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-6)
