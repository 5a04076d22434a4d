"""The compiled kernels, called by address as the ops call them, against float64."""

from __future__ import annotations

import pytest
import torch
from extension_calls import _C, CODES, IGNORE, INF, NAN, assert_gradient, assert_stats, backward, forward, make, oracle

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
    exact = stats.maximum.double() / 0.7 + stats.total.double().log()
    assert exact.numpy() == pytest.approx(expected[2].detach().numpy(), abs=1e-6)
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
