"""The memory of the linear head: where the weight's gradient is summed, and one tile whatever the number of rows."""

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
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from edge_kernels import GRPOLossConfig, linear_edge_grpo_loss, linear_token_stats
from edge_kernels.backend import extension as load_extension

pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.parametrize("backend", ["cpu", "reference"], indirect=True),
]

D, V = 6, 23


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
        module = sys.modules["edge_kernels.ops.head"]
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


@pytest.mark.parametrize(
    ("op", "dtype", "num_rows"),
    [("loss", "float32", 1024), ("loss", "float32", 4096), ("loss", "bfloat16", 2048), ("stats", "bfloat16", 1024)],
)
@pytest.mark.slow
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_products_of_a_cpu_without_bfloat16_instructions_are_float32(dtype: torch.dtype, backend: str) -> None:
    """As they are in a process that is told to do without AVX-512."""
    product_dtype, extension = sys.modules["edge_kernels.ops.head"].product_dtype, load_extension()
    before = extension.instruction_set()
    widest = torch.float32 if dtype.itemsize == 2 else dtype
    try:
        for name in extension.instruction_sets():
            extension.use_instruction_set(name)
            is_native = name == "avx512" and extension.cpu_features()["avx512bf16"] and dtype == torch.bfloat16
            assert product_dtype(dtype, torch.device("cpu")) == (dtype if is_native else widest)
            assert product_dtype(dtype, torch.device("cuda")) == dtype
    finally:
        extension.use_instruction_set(before)
