"""``token_stats`` in place, what it refuses, and PyTorch's own machinery: opcheck, compile, checkpointing, autocast,
fake tensors.
"""

from __future__ import annotations

import math

import pytest
import torch
from backends import BACKENDS
from token_rows import gradients, make_rows
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from edge_kernels import token_entropy, token_stats
from edge_kernels._checks import IGNORE_INDEX
from edge_kernels.contract import Transform
from edge_kernels.ops.token_stats import inplace_token_stats, token_stats_op

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.parametrize("backend", BACKENDS, indirect=True)]


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
        plain = Transform(1.0, None, 1.0, IGNORE_INDEX).pack()
        torch.library.opcheck(token_stats_op, (logits, targets, Transform(0.7, 5.0, 1.0, IGNORE_INDEX).pack()))
        torch.library.opcheck(token_stats_op, (logits, None, plain))
        torch.library.opcheck(token_stats_op, (logits.detach()[:, ::2], targets % 4, plain))

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
