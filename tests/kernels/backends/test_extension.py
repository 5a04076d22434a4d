"""The compiled kernels, called by address as the ops call them, against float64; how they are built and loaded."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from paths import ROOT
from torch import Tensor

from edge_kernels import _extension

_C = _extension.load()
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
IGNORE = -100
INF, NAN = float("inf"), float("nan")

# Sums, exponentials and the rounding of the result, for statistics of size about 10; float64 through the C library.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6, torch.float64: 1e-13}

SIZES = (
    1,  # certain: logprob and entropy are exactly 0
    3,  # less than any vector
    16,  # one AVX-512 vector, two of AVX2
    17,  # one vector and a tail of one
    64,  # one turn of the unrolled AVX-512 loop
    127,  # a turn, three more vectors, a full tail but one
    4096,  # one block
    4097,  # a second block that holds a single element
    12345,  # four blocks, the last one odd
)


@pytest.fixture(params=_C.instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once for each instruction set of this machine."""
    before = _C.instruction_set()
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set(before)


class Stats(NamedTuple):
    logprobs: Tensor
    entropy: Tensor
    logsumexp: Tensor
    logsumexp_low: Tensor


def poisoned(rows: int, like: torch.dtype) -> Tensor:
    return torch.full((rows,), NAN, dtype=torch.float64 if like == torch.float64 else torch.float32)


def transform(temperature: float = 1.0, softcap: float = 0.0, logit_scale: float = 1.0) -> dict[str, float]:
    return {"inv_temperature": 1 / temperature, "softcap": softcap, "logit_scale": logit_scale}


def forward(logits: Tensor, targets: Tensor | None, *, threads: int = 1, **options: float) -> Stats:
    """Statistics of (N, V) logits whose rows may lie at any stride."""
    rows, vocab = logits.shape
    stats = Stats(*(poisoned(rows, logits.dtype) for _ in range(4)))
    _C.token_stats_forward(
        dtype=CODES[logits.dtype],
        logits=logits.data_ptr(),
        row_stride=logits.stride(0),
        rows=rows,
        vocab=vocab,
        targets=0 if targets is None else targets.data_ptr(),
        ignore_index=IGNORE,
        **transform(**options),
        logprobs=0 if targets is None else stats.logprobs.data_ptr(),
        entropy=stats.entropy.data_ptr(),
        logsumexp=stats.logsumexp.data_ptr(),
        logsumexp_low=stats.logsumexp_low.data_ptr(),
        threads=threads,
    )
    return stats


def backward(
    logits: Tensor,
    targets: Tensor | None,
    stats: Stats,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    *,
    out: Tensor | None = None,
    low: bool = True,
    threads: int = 1,
    **options: float,
) -> Tensor:
    """Gradient of the logits, into ``out`` or a poisoned tensor."""
    rows, vocab = logits.shape
    out = torch.full((rows, vocab), NAN, dtype=logits.dtype) if out is None else out
    addresses = [0 if grad is None else grad.data_ptr() for grad in grads]
    _C.token_stats_backward(
        dtype=CODES[logits.dtype],
        logits=logits.data_ptr(),
        row_stride=logits.stride(0),
        rows=rows,
        vocab=vocab,
        targets=0 if targets is None else targets.data_ptr(),
        ignore_index=IGNORE,
        **transform(**options),
        entropy=stats.entropy.data_ptr(),
        logsumexp=stats.logsumexp.data_ptr(),
        logsumexp_low=stats.logsumexp_low.data_ptr() if low else 0,
        grad_logprobs=addresses[0],
        grad_entropy=addresses[1],
        grad_logsumexp=addresses[2],
        grad_logits=out.data_ptr(),
        grad_row_stride=out.stride(0),
        threads=threads,
    )
    return out


def oracle(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, softcap: float = 0.0, logit_scale: float = 1.0
) -> tuple[Tensor, list[Tensor]]:
    """Float64 leaves and their statistics by PyTorch's own log_softmax and logsumexp; finite logits only."""
    leaf = logits.double().requires_grad_()
    z = leaf * logit_scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    log_p = z.log_softmax(-1)
    logprobs = log_p.gather(-1, targets[:, None])[:, 0]
    return leaf, [logprobs, -(log_p.exp() * log_p).sum(-1), z.logsumexp(-1)]


def make(rows: int, vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 4.0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * scale).to(dtype)
    targets = torch.randint(vocab, (rows,), generator=generator)
    double = dtype == torch.float64
    grads = tuple(
        torch.randn(3, rows, generator=generator, dtype=torch.float64).to((double and dtype) or torch.float32)
    )
    return logits, targets, grads


def assert_stats(stats: Stats, expected: list[Tensor], dtype: torch.dtype, extra: float = 0.0) -> None:
    for got, wanted, name in zip(stats, expected, Stats._fields, strict=False):
        limit = TOLERANCE[dtype] * (1 + wanted.abs() / 10) + extra
        error = (got.double() - wanted).abs()
        assert (error <= limit).all(), f"{name}: off by {error.max():.2e}"


def assert_gradient(got: Tensor, wanted: Tensor, extra: float = 0.0) -> None:
    # The last term is float16's smallest step; the others are half a step of the type and the float32 arithmetic.
    spacing = torch.finfo(got.dtype).eps / 2 * wanted.abs() * 1.01
    arithmetic = 1e-12 if got.dtype == torch.float64 else 5e-6
    step = 2.0**-25 if got.dtype == torch.float16 else 0.0
    error = (got.double() - wanted).abs()
    assert (error <= spacing + arithmetic * wanted.abs().amax(-1, keepdim=True) + step + extra).all(), (
        f"off by {error.max():.2e}"
    )


# ---- Values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("vocab", SIZES)
def test_agrees_with_float64(isa: str, dtype: torch.dtype, vocab: int) -> None:
    logits, targets, grads = make(5, vocab, dtype, seed=vocab)
    stats = forward(logits, targets)
    leaf, expected = oracle(logits, targets)
    assert_stats(stats, [value.detach() for value in expected], dtype)
    wanted = torch.autograd.grad(expected, leaf, [grad.double() for grad in grads])[0]
    assert_gradient(backward(logits, targets, stats, grads), wanted)


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6},
        {"temperature": 3.0, "logit_scale": 0.25},
        {"softcap": 30.0},  # Gemma's
        {"softcap": 5.0, "temperature": 0.7, "logit_scale": 0.5},  # most of tanh's range
        {"logit_scale": -2.0},  # the largest logit becomes the least likely
        {"logit_scale": 0.0},  # uniform
    ],
    ids=str,
)
def test_transforms(isa: str, dtype: torch.dtype, options: dict[str, float]) -> None:
    logits, targets, grads = make(4, 5001, dtype, seed=7)
    stats = forward(logits, targets, **options)
    leaf, expected = oracle(logits, targets, **options)
    # A softcap's tanh is off by a few parts in 1e7, of the cap.
    extra = 0.0 if dtype == torch.float64 else 4e-7 * options.get("softcap", 0.0) / options.get("temperature", 1.0)
    assert_stats(stats, [value.detach() for value in expected], dtype, extra)
    wanted = torch.autograd.grad(expected, leaf, [grad.double() for grad in grads])[0]
    assert_gradient(backward(logits, targets, stats, grads, **options), wanted, extra=4 * extra)


def test_probabilities_are_relatively_exact(isa: str) -> None:
    """The gradient of logsumexp is p: down to 1e-35 each must be right in proportion, not only in absolute terms."""
    logits = torch.linspace(-80, 0, 20001)[None]
    stats = forward(logits, None)
    p = backward(logits, None, stats, (None, None, torch.ones(1))).double()
    wanted = logits.double().softmax(-1)
    log_p = wanted.log().abs()
    assert ((p - wanted).abs() / wanted <= 1.2e-7 * (3 + log_p)).all()


def test_exponential_over_every_exponent(isa: str) -> None:
    """Relative error of exp(d * slope) for d of every binary exponent from the denormals to where exp is 0."""
    generator = torch.Generator().manual_seed(0)
    mantissas = 1 + torch.rand(200, generator=generator, dtype=torch.float64)
    d = -(mantissas[:, None] * 2.0 ** torch.arange(-140, 128)).float().flatten()
    edges = -torch.linspace(80, 90, 4001)  # where the result leaves the normal numbers
    special = torch.tensor([-0.0, -float("inf"), -3.4028234663852886e38])
    for slope in (1.0, 0.6**-1, 0.01, 37.0):
        x = torch.cat([d, edges / slope, special])
        got = torch.full_like(x, float("nan"))
        for start in range(0, len(x), 4095):  # each block led by the maximum, 0
            block = torch.cat([torch.zeros(1), x[start : start + 4095]])
            out = torch.full_like(block, float("nan"))
            _C.exponentials(x=block.data_ptr(), out=out.data_ptr(), count=len(block), slope=slope)
            assert out[0] == 1
            got[start : start + 4095] = out[1:]
        z = x.double() * slope
        wanted = z.exp()
        is_normal = wanted > 2.0**-126
        error = (got.double() - wanted).abs() / wanted
        # A portable build may lack fused multiply-add, and then rounds d * slope before it is reduced.
        bound = 1.6e-7 + (1e-7 if isa == "portable" else 6e-8) * z.abs()
        assert (error <= bound)[is_normal].all(), (slope, error[is_normal].max())
        assert (got.double() <= 2.0**-125)[~is_normal].all()
        assert (got[z < -88.1] == 0).all()
    poisoned = torch.tensor([0.0, float("nan"), -1.0])
    out = torch.zeros(3)
    _C.exponentials(x=poisoned.data_ptr(), out=out.data_ptr(), count=3, slope=1.0)
    assert out.isnan().tolist() == [False, True, False]


def test_long_rows_lose_nothing(isa: str) -> None:
    """A uniform row of 151,936: float32 sums that ran through the whole row would be off in the fifth digit."""
    vocab = 151936
    logits = torch.full((1, vocab), 0.1)
    stats = forward(logits, torch.tensor([vocab - 1]), temperature=0.7)
    expected = torch.tensor(float(vocab), dtype=torch.float64).log().item()
    assert stats.entropy.item() == pytest.approx(expected, abs=1e-6)
    assert stats.logprobs.item() == pytest.approx(-expected, abs=1e-6)


@pytest.mark.parametrize("offset", [-1e4, 1e4, 3e4])
def test_offsets_cancel(isa: str, offset: float) -> None:
    """Softmax ignores a common offset. In float32 exp(z - logsumexp) alone would be off by 1e-3 at 3e4."""
    logits, targets, grads = make(3, 6000, seed=3)
    logits = logits + offset
    stats = forward(logits, targets, temperature=0.7)
    leaf, expected = oracle(logits, targets, temperature=0.7)
    assert_stats(stats, [value.detach() for value in expected[:2]], torch.float32)
    assert (stats.logsumexp.double() + stats.logsumexp_low.double()).numpy() == pytest.approx(
        expected[2].detach().numpy(), abs=1e-6
    )
    wanted = torch.autograd.grad(expected, leaf, [grad.double() for grad in grads])[0]
    assert_gradient(backward(logits, targets, stats, grads, temperature=0.7), wanted)


def test_extreme_logits(isa: str) -> None:
    """One logit at 1e4, the rest at -1e4: certainty, exactly, and the least likely logprob to full precision."""
    logits = torch.full((2, 5000), -1e4)
    logits[:, 4321] = 1e4
    stats = forward(logits, torch.tensor([4321, 0]))
    assert stats.logprobs.tolist() == [0.0, -2e4]
    assert stats.entropy.tolist() == [0.0, 0.0]
    grad = backward(logits, torch.tensor([4321, 0]), stats, (torch.ones(2), torch.ones(2), torch.zeros(2)))
    assert grad[0].abs().max() == 0
    assert grad[1, 0] == 1
    assert grad[1, 4321] == -1
    assert grad[1].abs().sum() == 2


def test_one_column(isa: str) -> None:
    logits = torch.tensor([[-7.5], [3.0]])
    stats = forward(logits, torch.zeros(2, dtype=torch.int64))
    assert stats.logprobs.tolist() == [0, 0]
    assert stats.entropy.tolist() == [0, 0]
    assert stats.logsumexp.tolist() == [-7.5, 3.0]
    assert backward(logits, torch.zeros(2, dtype=torch.int64), stats, (torch.ones(2),) * 3).tolist() == [[1], [1]]


# ---- Forbidden and broken logits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_forbidden_logits_contribute_nothing(isa: str, dtype: torch.dtype) -> None:
    """A row with -inf must equal the row without those columns; whole blocks of -inf are skipped too."""
    logits, _, grads = make(4, 9000, dtype, seed=11)
    allowed = torch.zeros(9000, dtype=torch.bool)
    allowed[[1, 2, 15, 16, 17, 4095, 8190, 8999]] = True  # nothing is allowed in most of the second block
    masked = logits.masked_fill(~allowed, -INF)
    targets = torch.tensor([1, 16, 4095, 8999])
    few = torch.tensor([0, 3, 5, 7])
    stats = forward(masked, targets)
    leaf, expected = oracle(logits[:, allowed], few)
    assert_stats(stats, [value.detach() for value in expected], dtype)
    grad = backward(masked, targets, stats, grads)
    assert (grad[:, ~allowed] == 0).all()
    wanted = torch.autograd.grad(expected, leaf, [grad.double() for grad in grads])[0]
    assert_gradient(grad[:, allowed], wanted)


def test_forbidden_target(isa: str) -> None:
    """logprob is -inf; the gradient keeps the formula's 1[j = y] - p, so -p for the others, and no NaN."""
    logits = torch.tensor([[0.0, -INF, 0.0]])
    stats = forward(logits, torch.tensor([1]))
    assert stats.logprobs.item() == -INF
    assert stats.entropy.item() == pytest.approx(0.6931472)
    grad = backward(logits, torch.tensor([1]), stats, (torch.ones(1), torch.zeros(1), torch.zeros(1)))
    assert grad[0].tolist() == pytest.approx([-0.5, 1.0, -0.5])


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("column", [0, 40, 4095, 4096, 5000])  # first, inside a turn, block's end, next block, tail
def test_broken_rows_are_nan(isa: str, dtype: torch.dtype, bad: float, column: int) -> None:
    logits, targets, grads = make(3, 5001, dtype)
    logits[1, column] = bad
    stats = forward(logits, targets)
    for value in stats[:3]:
        assert value.isnan().tolist() == [False, True, False]
    grad = backward(logits, targets, stats, grads)
    assert grad[1].isnan().all()
    assert grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_nan_among_forbidden_logits(isa: str, dtype: torch.dtype) -> None:
    """Neither a row of -inf nor a NaN in it has a maximum to start from."""
    logits = torch.full((2, 5000), -INF, dtype=dtype)
    logits[1, 4321] = NAN
    for value in forward(logits, torch.zeros(2, dtype=torch.int64))[:3]:
        assert value.isnan().all()


def test_softcap_bounds_infinities(isa: str) -> None:
    """softcap * tanh(±inf) is ±softcap, a finite z, as in the definition."""
    logits = torch.tensor([[INF, -INF, 0.0]])
    stats = forward(logits, torch.tensor([0]), softcap=2.0)
    _, expected = oracle(torch.tensor([[2.0, -2.0, 0.0]]), torch.tensor([0]))
    assert_stats(stats, expected, torch.float32)
    grad = backward(logits, torch.tensor([0]), stats, (torch.ones(1),) * 3, softcap=2.0)
    assert grad[0, :2].tolist() == [0, 0]
    assert grad.isfinite().all()


# ---- Rows ----------------------------------------------------------------------------------------------------------


def test_ignored_rows_are_not_read(isa: str) -> None:
    logits, targets, _ = make(4, 300)
    logits[[0, 2]] = NAN
    targets[[0, 2]] = IGNORE
    stats = forward(logits, targets)
    for value in stats[:3]:
        assert value[[0, 2]].tolist() == [0, 0]
        assert (value[[1, 3]] != 0).all()
    grad = backward(logits, targets, stats, (torch.full((4,), 2.0),) * 3)
    assert (grad[[0, 2]] == 0).all()
    assert (grad[[1, 3]] != 0).any(-1).all()


def test_rows_without_gradient_are_zero(isa: str) -> None:
    logits, targets, _ = make(2, 300)
    grad = backward(logits, targets, forward(logits, targets), (torch.tensor([0.0, 1.0]), None, None))
    assert (grad[0] == 0).all()
    assert (grad[1] != 0).any()


@pytest.mark.parametrize("target", [-1, 300, 2**62])
def test_targets_out_of_range_read_nothing(isa: str, target: int) -> None:
    logits, _, grads = make(1, 300)
    stats = forward(logits, torch.tensor([target]))
    assert stats.logprobs.isnan().all()
    assert stats.entropy.isfinite().all()
    assert backward(logits, torch.tensor([target]), stats, (grads[0][:1], None, None)).isfinite().all()


def test_entropy_only(isa: str) -> None:
    logits, targets, grads = make(3, 700)
    with_targets, without = forward(logits, targets), forward(logits, None)
    assert without.entropy.equal(with_targets.entropy)
    assert without.logprobs.isnan().all()  # not written
    grad = backward(logits, None, without, (None, grads[1], None))
    assert grad.equal(backward(logits, targets, with_targets, (None, grads[1], None)))


def test_no_rows() -> None:
    stats = forward(torch.empty(0, 10), torch.empty(0, dtype=torch.int64))
    assert stats.entropy.shape == (0,)
    assert backward(torch.empty(0, 10), None, stats, (None, None, None)).shape == (0, 10)


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_row_strides(isa: str, dtype: torch.dtype) -> None:
    """Rows far apart, with NaN between them that must be neither read nor overwritten; and one row repeated."""
    logits, targets, grads = make(3, 333, dtype)
    wide = torch.full((3, 400), NAN, dtype=dtype)
    wide[:, 5:338] = logits
    view = wide[:, 5:338]
    dense, spread = forward(logits, targets), forward(view, targets)
    assert spread.logprobs.equal(dense.logprobs)
    expected = backward(logits, targets, dense, grads)
    out = torch.full((3, 350), 9.0, dtype=dtype)
    backward(view, targets, spread, grads, out=out[:, 1:334])
    assert out[:, 1:334].equal(expected)
    assert (out[:, 0] == 9).all()
    assert (out[:, 334:] == 9).all()
    repeated = forward(logits[:1].expand(3, 333), targets[:1].expand(3).contiguous())
    assert repeated.entropy.equal(dense.entropy[:1].expand(3))


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 20.0}], ids=str)
def test_in_place(isa: str, dtype: torch.dtype, options: dict[str, float]) -> None:
    """The gradient may overwrite the logits; the target's logit, needed last, must have been read before."""
    logits, targets, grads = make(3, 5000, dtype)
    stats = forward(logits, targets, **options)
    expected = backward(logits, targets, stats, grads, **options)
    assert backward(logits, targets, stats, grads, out=logits, **options).equal(expected)


def test_beyond_two_to_the_31_elements() -> None:
    """Offsets that overflow 32 bits. The memory between the rows is never touched, so it costs none."""
    stride = 2**30 + 7
    flat = torch.empty(2 * stride + 64, dtype=torch.bfloat16)
    view = flat.as_strided((3, 64), (stride, 1))
    logits, targets, _ = make(3, 64, torch.bfloat16)
    view.copy_(logits)
    assert forward(view, targets).logprobs.equal(forward(logits, targets).logprobs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_round_to_nearest_even(isa: str, dtype: torch.dtype) -> None:
    """The same logits as float32 give the gradient before rounding; PyTorch's conversion rounds it for comparison."""
    logits, targets, grads = make(8, 4999, dtype, scale=2.0)
    stats = forward(logits, targets)
    rounded = backward(logits.float(), targets, stats, grads).to(dtype)
    assert backward(logits, targets, stats, grads).equal(rounded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_logit_is_read_right(isa: str, dtype: torch.dtype) -> None:
    """All 65,536 bit patterns, denormals included: with one column, logsumexp is the logit itself."""
    logits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[:, None]
    got, wanted = forward(logits, None).logsumexp, logits[:, 0].float()
    finite = wanted.isfinite()
    assert got[finite].equal(wanted[finite])
    assert got[~finite].isnan().all()


# ---- Threads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 40])  # one row, fewer rows than threads, rows enough to share out whole
def test_threads_do_not_change_a_bit(isa: str, rows: int) -> None:
    logits, targets, grads = make(rows, 30011)
    stats = forward(logits, targets)
    grad = backward(logits, targets, stats, grads)
    for threads in (2, 7):
        again = forward(logits, targets, threads=threads)
        assert all(a.equal(b) for a, b in zip(stats, again, strict=True))
        assert backward(logits, targets, stats, grads, threads=threads).equal(grad)


def test_other_threads_run_meanwhile() -> None:
    """The interpreter's lock is released: Python code of the main thread runs during a long call."""
    logits = torch.zeros(1, 100_000, dtype=torch.float64).expand(300, -1)
    span: list[float] = []

    def call() -> None:
        span.append(time.perf_counter())
        forward(logits, None)
        span.append(time.perf_counter())

    worker = threading.Thread(target=call)
    ticks = []
    worker.start()
    while worker.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    begin, end = span
    assert any(begin + 0.1 * (end - begin) < tick < begin + 0.9 * (end - begin) for tick in ticks)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter outside the source tree's import path."""
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc/self/task")
def test_torch_and_the_extension_share_one_openmp() -> None:
    """One runtime is mapped, its threads are the ones torch made, and torch.set_num_threads rules them."""
    code = """
import os, json, torch
from edge_kernels import _extension
C = _extension.load()
logits, out = torch.zeros(64, 20000), torch.empty(2, 64)
def threads_after(torch_threads, asked):
    torch.set_num_threads(torch_threads)
    C.token_stats_forward(dtype=0, logits=logits.data_ptr(), row_stride=20000, rows=64, vocab=20000, targets=0,
        ignore_index=-100, inv_temperature=1.0, softcap=0.0, logit_scale=1.0, logprobs=0,
        entropy=out[0].data_ptr(), logsumexp=out[1].data_ptr(), threads=asked)
    return len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
base = len(os.listdir("/proc/self/task"))
counts = [threads_after(1, 0) - base, threads_after(3, 0) - base]
torch.exp(torch.zeros(1 << 22))  # torch's own loop: needs the same three threads, no new ones
counts += [len(os.listdir("/proc/self/task")) - base, threads_after(1, 5) - base]
print(json.dumps([_extension.openmp_runtimes(), counts]))
"""
    result = run_python(code, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    runtimes, counts = json.loads(result.stdout)
    assert len(runtimes) == 1
    assert counts == [0, 2, 2, 4]


def test_openmp_runtimes_are_recognized(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the names that distributions, torch wheels, LLVM and Intel give them, and nothing that looks alike."""
    runtimes = ["/usr/lib/libgomp.so.1", "/v/torch/lib/libgomp-a34b3233.so.1", "/l/libomp.so.5", "/i/libiomp5.so"]
    others = ["/usr/lib/libompi.so", "/usr/lib/libgomp_helper.so", "/x/gomp.so", "[heap]"]
    lines = [f"7f00-7f01 r-xp 00000000 fe:00 12 {path}" for path in (*runtimes, *others, runtimes[0])]
    monkeypatch.setattr(Path, "read_text", lambda self: "\n".join(lines))
    assert _extension.openmp_runtimes() == sorted(runtimes)


def test_names_no_openmp_library() -> None:
    """A name recorded here would map a second runtime wherever torch's copy is called otherwise."""
    binary = Path(_C.__file__).read_bytes()
    assert b"GOMP_parallel" in binary
    assert b"libgomp" not in binary


# ---- Choice of instruction set, build ------------------------------------------------------------------------------


def test_instruction_sets_follow_the_cpu() -> None:
    sets, features = _C.instruction_sets(), _C.cpu_features()
    assert sets[0] == "portable"
    assert _C.instruction_set() in sets
    assert ("avx2" in sets) == all(features.get(name) for name in ("avx2", "fma", "f16c"))
    assert ("avx512" in sets) == (
        "avx2" in sets and all(features[name] for name in ("avx512f", "avx512bw", "avx512dq", "avx512vl"))
    )
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and platform.machine() == "x86_64":
        flags = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")).split()
        names = {name: name.replace("avx512bf16", "avx512_bf16") for name in features}
        assert features == {name: flag in flags for name, flag in names.items()}


def test_environment_lowers_the_instruction_set() -> None:
    # Without torch, which takes seconds to import: any copy of its OpenMP runtime will do here.
    code = f"""
import ctypes, os
ctypes.CDLL({_extension.openmp_runtimes()[0]!r}, mode=os.RTLD_GLOBAL)
import edge_kernels._C as C
try:
    print(C.instruction_set())
except ValueError as error:
    print(error)
"""
    best = _C.instruction_sets()[-1]
    for asked, answer in (("portable", "portable"), ("", best), ("sse9", "EDGE_KERNELS_ISA must be one of")):
        result = run_python(code, EDGE_KERNELS_ISA=asked)
        assert result.stdout.startswith(answer), (asked, result)


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match=r"got 'mmx'; leave it unset"):
        _C.use_instruction_set("mmx")


def test_vector_code_stays_in_its_files() -> None:
    """No symbol that the linker could share: it might hand AVX-512 code to a CPU without it."""
    tree = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
    objects = [tree / f"CMakeFiles/edge_cpu.dir/csrc/cpu/{name}.cpp.o" for name in ("avx2", "avx512")]
    if shutil.which("nm") is None or not all(path.exists() for path in objects):
        pytest.skip("needs nm and a build tree with AVX objects (x86-64, built in place)")
    for path in objects:
        listing = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout
        shared = [line for line in listing.splitlines() if line[17:18] in "WVu"]
        assert shared == []


def test_built_with() -> None:
    built = _C.built_with()
    assert built["compiler"].split()[0] in ("GNU", "Clang", "AppleClang", "IntelLLVM")
    assert (built["cuda"] is None) == (built["cuda_architectures"] == [])
    if built["cuda"] is None:
        assert _C.cuda_devices() == []
        assert _C.cuda_versions() == {"driver": None, "runtime": None}
    for device in _C.cuda_devices():
        assert set(device) == {"index", "name", "capability", "multiprocessors", "memory_bytes"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-DEDGE_KERNELS_CUDA=on", "-DCMAKE_CUDA_COMPILER=NOTFOUND"], "put nvcc on PATH or set CUDACXX"),
        (["-DEDGE_KERNELS_CUDA=perhaps"], "EDGE_KERNELS_CUDA must be auto, on or off; got 'perhaps'"),
    ],
)
def test_build_options_are_checked(tmp_path: Path, options: list[str], message: str) -> None:
    cmake = pytest.importorskip("cmake", reason="needs the cmake package")
    pybind11 = pytest.importorskip("pybind11", reason="needs the pybind11 package")
    command = [
        Path(cmake.CMAKE_BIN_DIR) / "cmake",
        "-S",
        ROOT,
        "-B",
        tmp_path,
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    result = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert message in " ".join(result.stderr.split())


# ---- Arguments -----------------------------------------------------------------------------------------------------

FORWARD = {
    "dtype": 0,
    "logits": 64,
    "row_stride": 8,
    "rows": 2,
    "vocab": 8,
    "targets": 64,
    "ignore_index": IGNORE,
    **transform(),
    "logprobs": 64,
    "entropy": 64,
    "logsumexp": 64,
}
BACKWARD = {
    **{name: value for name, value in FORWARD.items() if name != "logprobs"},
    "grad_logprobs": 64,
    "grad_entropy": 0,
    "grad_logsumexp": 0,
    "grad_logits": 128,
    "grad_row_stride": 8,
}


@pytest.mark.parametrize(
    ("arguments", "wrong", "message"),
    [
        (FORWARD, {"dtype": 4}, r"dtype must be 0 \(float32\), .*; got 4"),
        (FORWARD, {"rows": -1}, "rows must be at least 0; got -1"),
        (FORWARD, {"vocab": 0}, "vocab must be at least 1; got 0"),
        (FORWARD, {"row_stride": -8}, "row_stride must be at least 0 elements; got -8"),
        (FORWARD, {"inv_temperature": 0.0}, "inv_temperature must be positive and finite"),
        (FORWARD, {"inv_temperature": INF}, "inv_temperature must be positive and finite"),
        (FORWARD, {"softcap": -1.0}, "softcap must be positive and finite, or 0 for none"),
        (FORWARD, {"logit_scale": NAN}, "logit_scale must be finite"),
        (FORWARD, {"logits": 0}, "logits must be the address of its first element; got 0"),
        (FORWARD, {"logprobs": 0}, "logprobs must be the address"),
        (FORWARD, {"targets": 0}, "logprobs must be 0 where there are no targets"),
        (FORWARD, {"entropy": 0}, "entropy must be the address"),
        (FORWARD, {"threads": -1}, "threads must be at least 1, or 0 for OpenMP's setting; got -1"),
        (BACKWARD, {"grad_logits": 0}, "grad_logits must be the address"),
        (BACKWARD, {"grad_row_stride": 7}, r"grad_row_stride must be at least vocab \(8\), so that no two rows share"),
        (BACKWARD, {"grad_logits": 64, "grad_row_stride": 9}, r"grad_row_stride must be row_stride \(8\) in place"),
        (BACKWARD, {"targets": 0}, "grad_logprobs must be 0 where there are no targets"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, object], wrong: dict[str, object], message: str) -> None:
    function = _C.token_stats_forward if arguments is FORWARD else _C.token_stats_backward
    with pytest.raises(ValueError, match=message):
        function(**{**arguments, **wrong})
