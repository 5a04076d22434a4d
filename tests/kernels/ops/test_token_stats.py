"""``token_stats`` and ``token_entropy``: each backend against float64, special values, strides, errors, and PyTorch's
own machinery (opcheck, compile, checkpointing, autocast, fake tensors).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from backends import BACKENDS, DTYPES, INTERPRETING, WIDEST
from error_budget import assert_within_budget
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from edge_kernels import reference, token_entropy, token_stats, use_backend
from edge_kernels._checks import IGNORE_INDEX
from edge_kernels.ops.token_stats import Transform, inplace_token_stats, token_stats_op

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


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


def make_rows(rows: int, vocab: int, dtype: torch.dtype, *, scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=generator) * scale).to(dtype)
    return logits, torch.randint(vocab, (rows,), generator=generator)


def plain_stats(logits: Tensor, targets: Tensor, temperature: float = 1, softcap: float = 0, logit_scale: float = 1):
    """What a user would write with PyTorch's own functions, in float32 (float64)."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    z = (softcap * torch.tanh(z / softcap) if softcap else z) / temperature
    logp = z.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, targets[..., None])[..., 0], entropy, z.logsumexp(-1)


def gradients(stats, logits: Tensor, seed: int = 1) -> Tensor:
    """Return the logits' gradient of a random combination of the three statistics."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(stats[0].shape, generator=generator).to(stats[0].dtype) for _ in stats]
    return torch.autograd.grad(stats, logits, weights)[0]


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
# 4099: longer than a cache line of partial sums, prime.
@pytest.mark.parametrize("vocab", [1, 2, 7, 16, 17, 257, *([] if INTERPRETING else [4099])])
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
    small = torch.tensor([[0.0, 1.0, 2.0, -3.0]])
    for offset in (1e4, -1e4, 32768.0):
        large = (small + offset).requires_grad_()
        stats = token_stats(large, torch.tensor([2]))
        exact = reference.token_stats(small.double().requires_grad_(), torch.tensor([2]))
        assert stats.logprobs.item() == pytest.approx(exact.logprobs.item(), abs=1e-6)
        assert stats.entropy.item() == pytest.approx(exact.entropy.item(), abs=1e-6)
        (gradient,) = torch.autograd.grad(stats.logprobs + stats.entropy, large)
        wide = small.double().requires_grad_()
        exact = reference.token_stats(wide, torch.tensor([2]))
        (expected,) = torch.autograd.grad(exact.logprobs + exact.entropy, wide)
        torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=1e-6)


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


class TestInplace:
    transform = Transform(0.7, None, 1.0, IGNORE_INDEX)

    def test_the_gradient_lies_where_the_logits_were(self, backend: str) -> None:
        logits, targets = make_rows(4, 9, torch.float32)
        targets[1] = IGNORE_INDEX
        whole = torch.randn(4, 12)
        view = whole[:, :9].copy_(logits).requires_grad_()
        logits.requires_grad_()
        expected = gradients(token_stats(logits, targets, temperature=0.7), logits)
        stats = inplace_token_stats(view, targets, self.transform)
        torch.testing.assert_close(view.detach(), logits.detach())
        gradient = gradients(stats, view)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6 if backend == "triton" else 0)
        assert gradient.data_ptr() == view.data_ptr()
        torch.testing.assert_close(whole[:, :9].detach(), gradient, rtol=0, atol=0)

    def test_whoever_saved_the_logits_hears_of_it(self) -> None:
        logits, targets = make_rows(4, 9, torch.float32)
        hidden = logits.requires_grad_()
        logits = hidden.tanh()  # saves its output for its own backward pass
        loss = inplace_token_stats(logits, targets, self.transform).logprobs.sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_a_second_backward_pass_raises(self) -> None:
        logits, targets = make_rows(4, 9, torch.float32)
        loss = inplace_token_stats(logits.requires_grad_(), targets, self.transform).logprobs.sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_layouts_that_cannot_be_written_are_rejected(self) -> None:
        targets = torch.zeros(3, dtype=torch.long)
        with pytest.raises(ValueError, match=r"last dimension is contiguous; got strides \(1, 3\)"):
            inplace_token_stats(torch.zeros(4, 3).t(), targets, self.transform)
        with pytest.raises(ValueError, match=r"without overlapping rows; got strides \(0, 1\) for shape \(3, 4\)"):
            inplace_token_stats(torch.zeros(4).expand(3, 4), targets, self.transform)

    def test_under_compile_it_is_the_ordinary_op(self) -> None:
        logits, targets = make_rows(4, 9, torch.float32)
        before = logits.clone()
        logits.requires_grad_()
        function = torch.compile(
            lambda x: inplace_token_stats(x, targets, self.transform).entropy.sum(), fullgraph=True, backend="aot_eager"
        )
        function(logits).backward()
        torch.testing.assert_close(logits.detach(), before, rtol=0, atol=0)
        assert logits.grad is not None


class TestErrors:
    logits = torch.zeros(2, 3, 5)
    targets = torch.zeros(2, 3, dtype=torch.long)

    @pytest.mark.parametrize("target", [5, -1, 2**40])
    def test_targets_out_of_range(self, target: int) -> None:
        targets = self.targets.clone()
        targets[1, 2] = target
        message = rf"targets must lie in \[0, V\) = \[0, 5\) or equal ignore_index = -100; got {target} at \(1, 2\)"
        with pytest.raises(ValueError, match=message):
            token_stats(self.logits, targets)

    def test_wrong_dtypes(self) -> None:
        with pytest.raises(TypeError, match=r"logits must be float32, .* or float64; got int64 \(2, 5\)"):
            token_stats(torch.zeros(2, 5, dtype=torch.long), self.targets[:, 0])
        with pytest.raises(TypeError, match=r"targets must be int64 with shape .* = \(2, 3\); got int32 \(2, 3\)"):
            token_stats(self.logits, self.targets.int())
        with pytest.raises(TypeError, match="logits must be a tensor; got list"):
            token_stats([[0.0]], self.targets)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"targets must be int64 .*; got NoneType"):
            token_stats(self.logits, None)  # type: ignore[arg-type]

    def test_wrong_shapes(self) -> None:
        with pytest.raises(ValueError, match=r"targets must .* logits.shape\[:-1\] = \(2, 3\); got int64 \(2,\)"):
            token_stats(self.logits, self.targets[:, 0])
        with pytest.raises(ValueError, match="at least 1 dimension"):
            token_stats(torch.zeros(()), torch.zeros((), dtype=torch.long))
        with pytest.raises(ValueError, match="last dimension of logits must not be empty"):
            token_entropy(torch.zeros(2, 0))

    def test_wrong_options(self) -> None:
        for temperature in (0.0, -1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match=r"temperature must be a finite number greater than 0; got"):
                token_stats(self.logits, self.targets, temperature=temperature)
        with pytest.raises(ValueError, match=r"softcap must be a number greater than 0, or None; got 0\.0"):
            token_entropy(self.logits, softcap=0.0)

    def test_a_second_derivative(self) -> None:
        logits = torch.randn(2, 5, requires_grad=True)
        loss = token_stats(logits, self.targets[:, 0]).logprobs.sum()
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        with pytest.raises(RuntimeError, match=r"no second derivative; use edge_kernels\.reference"):
            gradient.sum().backward()


class TestMachinery:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_opcheck(self, dtype: torch.dtype) -> None:
        logits, targets = make_rows(4, 9, dtype)
        targets[1] = IGNORE_INDEX
        logits.requires_grad_()
        torch.library.opcheck(token_stats_op, (logits, targets, 0.7, 5.0, 1.0, IGNORE_INDEX))
        torch.library.opcheck(token_stats_op, (logits, None, 1.0, None, 1.0, IGNORE_INDEX))
        torch.library.opcheck(token_stats_op, (logits.detach()[:, ::2], targets % 4, 1.0, None, 1.0, IGNORE_INDEX))

    @pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_compiles_into_one_graph(self, compiler: str, backend: str) -> None:
        if compiler == "inductor" and backend != "cpu":
            pytest.skip("what surrounds the op is the same for every backend, and a compilation takes seconds")
        logits, targets = make_rows(6, 9, torch.float32)
        logits.requires_grad_()

        def function(x: Tensor) -> Tensor:
            stats = token_stats(x * 2, targets, temperature=0.7)
            return (stats.logprobs * stats.entropy).sum() + token_entropy(x).sum()

        compiled = torch.compile(function, fullgraph=True, backend=compiler)
        expected, actual = function(logits), compiled(logits)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(torch.autograd.grad(actual, logits), torch.autograd.grad(expected, logits))

    def test_fake_tensors_have_the_right_shapes_without_computing(self) -> None:
        with FakeTensorMode():  # no GPU is needed to trace for one; autograd would ask it for a stream
            logits = torch.empty(2, 3, 10**6, dtype=torch.bfloat16, device="cuda")
            stats = token_stats(logits, torch.empty(2, 3, dtype=torch.long, device="cuda"))
            assert [(s.shape, s.dtype, s.device.type) for s in stats] == [((2, 3), torch.float32, "cuda")] * 3
            logits = torch.empty(2, 3, 10**9, dtype=torch.bfloat16, requires_grad=True)
            token_stats(logits, torch.empty(2, 3, dtype=torch.long)).logprobs.sum().backward()
        assert logits.grad is not None
        assert (logits.grad.shape, logits.grad.dtype) == (logits.shape, logits.dtype)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_activation_checkpointing(self, use_reentrant: bool) -> None:
        logits, targets = make_rows(4, 9, torch.float32)
        logits.requires_grad_()

        def function(x: Tensor) -> Tensor:
            return token_stats(x * 2, targets).logprobs.sum()

        (expected,) = torch.autograd.grad(function(logits), logits)
        checkpoint(function, logits, use_reentrant=use_reentrant).backward()
        torch.testing.assert_close(logits.grad, expected)

    def test_autocast_leaves_precision_alone(self) -> None:
        logits, targets = make_rows(4, 9, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            stats = token_stats(logits, targets)
        torch.testing.assert_close(stats, token_stats(logits, targets), rtol=0, atol=0)

    def test_without_gradient_nothing_is_recorded(self) -> None:
        logits, targets = make_rows(4, 9, torch.float32)
        with torch.no_grad():
            assert not token_stats(logits.requires_grad_(), targets).logprobs.requires_grad


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
