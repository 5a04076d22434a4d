"""``linear_token_stats``: against the whole logits in float64, over several tiles, and the memory that it takes."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from error_budget import assert_within_budget
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from edge_kernels import GRPOLossConfig, linear_edge_grpo_loss, linear_token_stats, reference, token_stats, use_backend
from edge_kernels._checks import IGNORE_INDEX
from edge_kernels.ops.linear_token_stats import linear_token_stats_op

D, V = 6, 23
TRANSFORM = {"temperature": 0.7, "softcap": 6.0, "logit_scale": 1.5}


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=["one tile", "tiles of three rows"])
def tile_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also run with tiles so small that rows are split, three leaving a last odd tile, and the weight into blocks.

    Six rows to a tile where the CPU has instructions for 16-bit products.
    """
    if request.param == "tiles of three rows":
        module = sys.modules["edge_kernels.ops.linear_token_stats"]
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
    monkeypatch.setattr(sys.modules["edge_kernels.ops.linear_token_stats"], "TILE_BYTES", 2 * 4)
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
    module = sys.modules["edge_kernels.ops.linear_token_stats"]
    rows, run_forward = [], module.run_forward
    monkeypatch.setattr(module, "run_forward", lambda x, *rest: (rows.append(len(x)), run_forward(x, *rest))[1])
    hidden, weight, bias = make_head(torch.float64)
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
    module = sys.modules["edge_kernels.ops.linear_token_stats"]
    rows, run_backward = [], module.run_backward
    record = lambda x, *rest, **options: (rows.append(len(x)), run_backward(x, *rest, **options))[1]  # noqa: E731
    monkeypatch.setattr(module, "run_backward", record)
    hidden, weight, _ = make_head(torch.float64, (8,))
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
        options = (torch.float32, 0.7, None, 1.0, IGNORE_INDEX)
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


class TestWeightGradient:
    """Where the weight's gradient is summed: in its own dtype only where nothing is lost, in ``.grad`` if allowed."""

    def loss_of(self, head: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        if head == "stats":
            stats = linear_token_stats(hidden, weight, targets)
            return stats.logprobs.sum() - 0.3 * stats.entropy.sum()
        config = GRPOLossConfig(loss_type="dr_grpo", max_completion_length=1, entropy_coef=0.1)
        mask = torch.ones_like(targets, dtype=torch.bool)
        advantages = torch.linspace(-1, 1, len(targets), dtype=torch.float32)
        total = float(targets.numel())
        return linear_edge_grpo_loss(
            hidden, weight, targets, mask, advantages=advantages, config=config, num_items=total
        ).loss

    def make(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(5)
        hidden = torch.randn(6, 7, D, generator=generator).to(dtype).requires_grad_()
        weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
        return hidden, weight, torch.randint(V, (6, 7), generator=generator)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("head", ["stats", "loss"])
    def test_many_tiles_of_16_bits_round_once(
        self, head: str, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """42 rows in tiles of one, and blocks of 2 columns of 5 rows: still off by the last rounding only."""
        module = sys.modules["edge_kernels.ops.linear_token_stats"]
        monkeypatch.setattr(module, "TILE_BYTES", 80)
        monkeypatch.setattr(module, "BLOCK_BYTES", 2 * D * 4)
        hidden, weight, targets = self.make(dtype)
        exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
        expected = torch.autograd.grad(self.loss_of(head, *exact, targets), exact)
        actual = torch.autograd.grad(self.loss_of(head, hidden, weight, targets), (hidden, weight))
        assert [g.dtype for g in actual] == [dtype] * 2
        if module.product_dtype(dtype, hidden.device) == torch.float32:  # the logits are exact: one rounding is left
            for got, wanted in zip(actual, expected, strict=True):
                bound = torch.finfo(dtype).eps * 0.51 * wanted.abs() + 1e-6
                assert ((got.double() - wanted).abs() <= bound).all()
        else:
            torch.testing.assert_close([g.double() for g in actual], list(expected), rtol=2**-5, atol=2**-5)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("head", ["stats", "loss"])
    def test_adds_to_an_existing_gradient_where_it_lies(self, head: str, dtype: torch.dtype, backend: str) -> None:
        hidden, weight, targets = self.make(dtype)
        self.loss_of(head, hidden, weight, targets).backward()
        assert weight.grad is not None
        first, address, version = weight.grad.clone(), weight.grad.data_ptr(), weight.grad._version
        with count_allocations(weight.nbytes) as sizes:
            (2 * self.loss_of(head, hidden, weight, targets)).backward()
        assert weight.grad.data_ptr() == address
        assert weight.grad._version > version
        tolerance = {torch.bfloat16: 2**-7}.get(dtype, 1e-5)
        torch.testing.assert_close(weight.grad, 3 * first, rtol=tolerance, atol=tolerance)
        assert sizes == []

    def test_a_hook_sees_the_gradient(self, backend: str) -> None:
        hidden, weight, targets = self.make(torch.float32)
        self.loss_of("loss", hidden, weight, targets).backward()
        seen: list[Tensor] = []
        weight.register_hook(seen.append)
        self.loss_of("loss", hidden, weight, targets).backward()
        torch.testing.assert_close(weight.grad, 2 * seen[0])
        weight = weight.detach().requires_grad_()
        weight.grad = torch.zeros_like(weight)
        after: list[Tensor] = []
        weight.register_post_accumulate_grad_hook(lambda p: after.append(p.grad.clone()))
        self.loss_of("loss", hidden, weight, targets).backward()
        torch.testing.assert_close(after, seen)

    def test_autograd_grad_leaves_the_existing_one_alone(self, backend: str) -> None:
        hidden, weight, targets = self.make(torch.float32)
        weight.grad = torch.full_like(weight, 7.0)
        (gradient,) = torch.autograd.grad(self.loss_of("loss", hidden, weight, targets), weight)
        assert gradient.abs().sum() > 0
        assert (weight.grad == 7).all()

    def test_a_tied_weight_gets_both_parts(self, backend: str) -> None:
        _, weight, targets = self.make(torch.float64)
        for _ in range(2):  # the second time into the gradient that is there
            self.loss_of("loss", F.embedding(targets, weight), weight, targets).backward()
        (expected,) = torch.autograd.grad(self.loss_of("loss", F.embedding(targets, weight), weight, targets), weight)
        torch.testing.assert_close(weight.grad, 2 * expected)


@contextmanager
def count_allocations(num_bytes: int) -> Iterator[list[int]]:
    """Collect, from the allocator's own counters, the allocations of exactly so many bytes."""
    sizes: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield sizes
    sizes += [n for n in allocations(profiler) if n == num_bytes]


def allocations(profiler: profile) -> list[int]:
    """Return bytes allocated, and freed as negative numbers, in order."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


MEMORY_PROBE = """
    import sys, torch
    from torch.profiler import ProfilerActivity, profile
    from edge_kernels import linear_edge_grpo_loss, linear_token_stats
    torch.set_num_threads(2)
    D, V = 8, 151_936
    op, dtype, N = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3])
    hidden = torch.randn(1, N, D).to(dtype).requires_grad_()
    weight = torch.randn(V, D).to(dtype).requires_grad_()
    targets = torch.randint(V, (1, N))

    def status(name):  # getrusage would begin with the peak of the process that started this one
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

    def step(rows):
        h, t = hidden[:, :rows], targets[:, :rows]
        if op == "stats":
            linear_token_stats(h, weight, t).logprobs.sum().backward()
        else:
            mask, advantages = torch.ones_like(t, dtype=torch.bool), torch.ones(1)
            linear_edge_grpo_loss(h, weight, t, mask, advantages=advantages).loss.backward()

    step(16)  # libraries, thread pools, the gradients themselves
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as counters:
        step(256)  # two tiles: the counters see every tile alike, and the profiler's own memory stays small
    events = [e for e in counters.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    before = status("VmRSS")
    step(N)
    print(peak, status("VmHWM") - before, N * V * 4)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "dtype", "num_rows"),
    [("loss", "float32", 1024), ("loss", "float32", 4096), ("loss", "bfloat16", 2048), ("stats", "bfloat16", 1024)],
)
def test_memory_is_one_tile_whatever_the_number_of_rows(op: str, dtype: str, num_rows: int, backend: str) -> None:
    """At most 100 MB, by the allocator's counters and by what the process has resident: a tile is 84 of them."""
    if backend == "reference":
        pytest.skip("the reference takes no care of memory inside a tile")
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process's memory is read from /proc, which only Linux has")
    command = [sys.executable, "-c", textwrap.dedent(MEMORY_PROBE), op, dtype, str(num_rows)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    allocated, resident, logits_bytes = map(int, output.split())
    assert 40e6 < allocated < 100e6  # two tiles of 128 rows, or one of 256
    assert resident < 100e6 < logits_bytes / 4
