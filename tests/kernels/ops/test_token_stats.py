"""``token_stats`` and ``token_entropy``: each backend against float64, special values, strides, threads."""

from __future__ import annotations

import math

import huge_logits
import pytest
import torch
from backends import BACKENDS, DTYPES, INTERPRETING, ROUNDS_ONCE, WIDEST
from error_budget import assert_within_budget
from token_rows import gradients, make_rows
from torch import Tensor

from edge_kernels import reference, token_entropy, token_stats
from edge_kernels._checks import IGNORE_INDEX

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.parametrize("backend", BACKENDS, indirect=True)]

TRANSFORMS = [
    {},
    {"temperature": 0.6},
    {"softcap": 5.0},
    {"temperature": 1.3, "softcap": 30.0, "logit_scale": 0.125},
]
# Statistics are float32 sums whatever the input; float64 has its own. Gradients are rounded to the input's dtype, of
# which one unit in the last place is allowed.
STATS_TOLERANCE = {torch.float64: 1e-13}
GRADIENT_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-13}
if INTERPRETING:  # Triton's interpreter truncates to bfloat16 where a GPU rounds to nearest
    GRADIENT_TOLERANCE[torch.bfloat16] = 2**-7


def plain_stats(logits: Tensor, targets: Tensor, temperature: float = 1, softcap: float = 0, logit_scale: float = 1):
    """What a user would write with PyTorch's own functions, in float32 (float64)."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    z = (softcap * torch.tanh(z / softcap) if softcap else z) / temperature
    logp = z.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, targets[..., None])[..., 0], entropy, z.logsumexp(-1)


def assert_exact(logits: Tensor, targets: Tensor, options: dict) -> None:
    dtype = logits.dtype
    logits = logits.detach().requires_grad_()
    wide = logits.detach().double().requires_grad_()
    actual, plain = token_stats(logits, targets, **options), plain_stats(logits, targets, **options)
    exact = reference.token_stats(wide, targets, **options)
    for name, *values in zip(exact._fields, actual, plain, exact, strict=True):
        assert values[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_within_budget(*values, tolerance=STATS_TOLERANCE.get(dtype, 1e-6), name=name)
    assert (actual.entropy >= 0).all()
    results = gradients(actual, logits), gradients(plain, logits), gradients(exact, wide)
    assert results[0].dtype == dtype
    assert_within_budget(*results, tolerance=GRADIENT_TOLERANCE[dtype], name="gradient")


# 1: no sum at all. 2 and 7: less than any vector. 16, 17: one AVX-512 vector and its tail. 257: several, odd.
# 4099: longer than a cache line of partial sums, prime. The interpreter has no vectors, and takes a second for each.
@pytest.mark.parametrize("vocab", [1, 17, 257] if INTERPRETING else [1, 2, 7, 16, 17, 257, 4099])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_are_as_exact_as_plain_pytorch(dtype: torch.dtype, vocab: int) -> None:
    for options in TRANSFORMS:
        assert_exact(*make_rows(5, vocab, dtype), options)


@pytest.mark.skipif(INTERPRETING, reason="half a minute there, and a longer row is not another case")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vocabulary_of_today(dtype: torch.dtype) -> None:
    assert_exact(*make_rows(3, 151_936, dtype), {"temperature": 0.6})


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_certain(dtype: torch.dtype) -> None:
    logits, _ = make_rows(4, 50, dtype, scale=1.0)
    logits[0, 3] += 60
    logits[1] = -1e4
    logits[1, 7] = 1e4
    assert_exact(logits, torch.tensor([3, 7, 0, 1]), {})


def test_logits_of_ten_thousand_lose_no_digits(backend: str) -> None:
    # Offsets that float32 represents: the exact answer is that of the small logits.
    tolerance = 1e-6 if ROUNDS_ONCE else 2e-3  # half a unit of 32768 * log2(e)
    small = torch.tensor([[0.0, 1.0, 2.0, -3.0]])
    for offset in (1e4, -1e4, 32768.0):
        large = (small + offset).requires_grad_()
        stats = token_stats(large, torch.tensor([2]))
        exact = reference.token_stats(small.double().requires_grad_(), torch.tensor([2]))
        assert stats.logprobs.item() == pytest.approx(exact.logprobs.item(), abs=tolerance)
        assert stats.entropy.item() == pytest.approx(exact.entropy.item(), abs=tolerance)
        (gradient,) = torch.autograd.grad(stats.logprobs + stats.entropy, large)
        wide = small.double().requires_grad_()
        exact = reference.token_stats(wide, torch.tensor([2]))
        (expected,) = torch.autograd.grad(exact.logprobs + exact.entropy, wide)
        torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "logit_scale": 2.0}])
def test_forbidden_tokens(dtype: torch.dtype, options: dict) -> None:
    logits, targets = make_rows(6, 40, dtype)
    logits[:, ::3] = -math.inf
    logits[5, :38] = -math.inf  # and 39 already is: one token left
    targets = torch.tensor([1, 2, 4, 0, 1, 38])  # the fourth is forbidden
    logits.requires_grad_()
    stats = token_stats(logits, targets, **options)
    allowed = torch.cat([logits.detach()[:5, 1::3], logits.detach()[:5, 2::3]], dim=1).double()
    exact = reference.token_stats(allowed, torch.zeros(5, dtype=torch.long), **options)
    torch.testing.assert_close(stats.entropy[:5].double(), exact.entropy, rtol=0, atol=1e-5)
    assert stats.logprobs[3] == -math.inf
    rounding = 1e-6 if INTERPRETING else 0  # a GPU's exp2 and log2 are not each other's exact inverse
    assert abs(stats.logprobs[5]) <= rounding
    assert 0 <= stats.entropy[5] <= rounding
    gradient = gradients(stats, logits)
    assert gradient.isfinite().all()
    forbidden = logits.detach().isinf()
    forbidden[3, 0] = False  # its own gradient is that of the target
    assert (gradient[forbidden] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_without_a_distribution_is_nan_and_no_other_is(dtype: torch.dtype, value: float) -> None:
    logits, targets = make_rows(3, 33, dtype)
    logits[1, slice(None) if value == -math.inf else 20] = value
    logits.requires_grad_()
    stats = token_stats(logits, targets)
    for statistic in stats:
        assert statistic.isnan().tolist() == [False, True, False]
    gradient = gradients(stats, logits)
    assert gradient[1].isnan().any()
    assert gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_are_zero_and_not_read(dtype: torch.dtype) -> None:
    logits, targets = make_rows(4, 19, dtype)
    logits[2] = math.nan
    targets[2] = -1
    logits.requires_grad_()
    stats = token_stats(logits, targets, ignore_index=-1)
    assert all(statistic[2] == 0 for statistic in stats)
    assert all((statistic[[0, 1, 3]] != 0).all() for statistic in stats)
    gradient = gradients(stats, logits)
    assert (gradient[2] == 0).all()
    assert gradient.isfinite().all()
    everything = token_stats(logits, torch.full((4,), IGNORE_INDEX))
    assert all((statistic == 0).all() for statistic in everything)
    assert (gradients(everything, logits) == 0).all()


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Return tensors of shape (3, 4, 10) that lie differently in memory."""
    return {
        "contiguous": x[:3, :4, :10].contiguous(),
        "padded rows": x[:3, :4, :10],
        "all but the last token": x[:3, :, :10][:, :4],
        "every second token": x[:3, ::2, :10],
        "sequences across": x.transpose(0, 1)[:3, :4, :10],
        "vocabulary across": x.transpose(0, 2)[:3, :4, :10],
        "every second logit": x[:3, :4, ::2],
        "one row for all": x[:1, :1, :10].expand(3, 4, 10),
        "last of each": x[:3, -1:, :10].expand(3, 4, 10),
    }


@pytest.mark.parametrize("name", list(layouts(torch.empty(8, 8, 20))))
def test_any_strides_give_what_a_contiguous_copy_gives(name: str, backend: str) -> None:
    x = torch.randn(8 if "across" not in name else 10, 8, 20, generator=torch.Generator().manual_seed(0))
    logits = layouts(x)[name].detach().requires_grad_()
    assert logits.shape == (3, 4, 10)
    targets = torch.randint(10, (4, 3)).t()  # not contiguous either
    copy = logits.detach().contiguous().requires_grad_()
    stats, expected = token_stats(logits, targets), token_stats(copy, targets.contiguous())
    # PyTorch and Triton sum in an order that depends on where in memory a row begins.
    tolerance = 0 if backend == "cpu" else 1e-6
    torch.testing.assert_close(stats, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(gradients(stats, logits), gradients(expected, copy), rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(7,), (0, 7), (3, 0, 7), (1, 1, 1), (2, 1, 3, 7)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, requires_grad=True)
    targets = torch.zeros(shape[:-1], dtype=torch.long)
    stats = token_stats(logits, targets)
    assert all(statistic.shape == shape[:-1] for statistic in stats)
    assert token_entropy(logits).shape == shape[:-1]
    assert gradients(stats, logits).shape == shape


@pytest.mark.parametrize("used", [0, 1, 2])
def test_a_gradient_through_one_statistic_alone(used: int) -> None:
    logits, targets = make_rows(4, 23, WIDEST)
    logits.requires_grad_()
    (actual,) = torch.autograd.grad(token_stats(logits, targets)[used].sum(), logits)
    (expected,) = torch.autograd.grad(reference.token_stats(logits, targets)[used].sum(), logits)
    torch.testing.assert_close(actual, expected)


def test_entropy_alone() -> None:
    logits, _ = make_rows(4, 23, WIDEST)
    logits.requires_grad_()
    entropy, expected = token_entropy(logits, temperature=0.7), reference.token_entropy(logits, temperature=0.7)
    torch.testing.assert_close(entropy, expected)
    torch.testing.assert_close(
        torch.autograd.grad(entropy.sum(), logits)[0], torch.autograd.grad(expected.sum(), logits)[0]
    )
    categorical = torch.distributions.Categorical(logits=logits / 0.7).entropy()
    torch.testing.assert_close(entropy, categorical)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter's, of lanes that store nothing
@pytest.mark.parametrize("temperature", [0.7] if INTERPRETING else [1.0, 0.7])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float16])
def test_logits_without_a_fraction(dtype: torch.dtype, temperature: float) -> None:
    huge_logits.check(dtype, temperature)


@pytest.mark.skipif(INTERPRETING, reason="finite differences need float64")
def test_gradcheck() -> None:
    logits, targets = make_rows(3, 6, torch.float64)
    targets[1] = IGNORE_INDEX
    options = {"temperature": 0.8, "softcap": 4.0}
    assert torch.autograd.gradcheck(lambda x: tuple(token_stats(x, targets, **options)), logits.requires_grad_())


@pytest.mark.skipif(INTERPRETING, reason="the interpreter has one")
def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    logits, targets = make_rows(64, 300, torch.float32)
    logits.requires_grad_()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            stats = token_stats(logits, targets)
            results.append((*stats, gradients(stats, logits)))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_rows_beyond_the_reach_of_32_bits(backend: str) -> None:
    """The third row begins past element 2^31 of its storage. Only what the rows touch is ever given memory."""
    if backend == "reference":
        pytest.skip("indexing is PyTorch's own there")
    vocab, stride = 8, 2**30 + 5
    logits = torch.empty_strided((3, vocab), (stride, 1), dtype=torch.bfloat16)
    logits.copy_(make_rows(3, vocab, torch.bfloat16)[0])
    targets = torch.tensor([1, 2, 3])
    near = token_stats(logits.contiguous(), targets)
    torch.testing.assert_close(token_stats(logits, targets), near, rtol=0, atol=0 if backend == "cpu" else 1e-6)
