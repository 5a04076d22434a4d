"""Log-probability, entropy and logsumexp of each token from its logits: what kernels take and return, the
``torch.library`` ops around them, autograd, and the public functions, top to bottom. The mathematics: reference.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from edge_kernels._checks import (
    IGNORE_INDEX,
    check_float,
    check_like,
    check_targets_in_range,
    check_transform,
    stats_dtype,
)
from edge_kernels.backend import kernels
from edge_kernels.memory import fresh
from edge_kernels.types import TokenStats

# --- kernels ----------------------------------------------------------------------------------------------------------


class Transform(NamedTuple):
    """What happens to raw logits first, and which target means "no token here"; the ops' trailing arguments."""

    temperature: float
    softcap: float | None
    logit_scale: float
    ignore_index: int

    def for_extension(self) -> dict[str, Any]:
        """Return the transform as the compiled kernels take it."""
        return {
            "inv_temperature": 1 / self.temperature,
            "softcap": self.softcap or 0.0,
            "logit_scale": self.logit_scale,
            "ignore_index": self.ignore_index,
        }


class KernelStats(NamedTuple):
    """``TokenStats``, and what rounding took from logsumexp: at logits of 3e4 it is 1e-3, and p would be off by it."""

    logprobs: Tensor
    entropy: Tensor
    logsumexp: Tensor
    logsumexp_low: Tensor


class StatsGradients(NamedTuple):
    """The incoming gradients of the statistics, (...) each; None is 0."""

    logprobs: Tensor | None
    entropy: Tensor | None
    logsumexp: Tensor | None


def run_forward(logits: Tensor, targets: Tensor | None, transform: Transform) -> KernelStats:
    """Return the statistics of real (not fake) logits (..., V) by the backend that serves them, unchecked."""
    return kernels(logits).token_stats_forward(logits, targets, transform)


def run_backward(
    logits: Tensor,  # (..., V)
    targets: Tensor | None,  # (...)
    stats: KernelStats,
    gradients: StatsGradients,
    transform: Transform,
    *,
    out: Tensor,
) -> None:
    """Write the gradient of the logits into ``out``: a contiguous tensor of their shape, or the logits themselves."""
    if targets is None:
        gradients = gradients._replace(logprobs=None)
    kernels(logits).token_stats_backward(logits, targets, stats, gradients, transform, out=out)


def new_stats(logits: Tensor) -> Tensor:
    """Return an uninitialized statistic of each row of ``logits`` (..., V)."""
    return torch.empty(logits.shape[:-1], dtype=stats_dtype(logits.dtype), device=logits.device)


# --- ops --------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("edge_kernels::token_stats", mutates_args=())
def token_stats_op(
    logits: Tensor,
    targets: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if targets is not None:
        check_targets_in_range(targets, logits.shape[-1], ignore_index)
    return run_forward(logits, targets, Transform(temperature, softcap, logit_scale, ignore_index))


@token_stats_op.register_fake
def _(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return new_stats(logits), new_stats(logits), new_stats(logits), new_stats(logits)


@torch.library.custom_op("edge_kernels::token_stats_backward", mutates_args=())
def token_stats_backward_op(
    logits: Tensor,
    targets: Tensor | None,
    entropy: Tensor,
    logsumexp: Tensor,
    logsumexp_low: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logsumexp: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
) -> Tensor:
    out = fresh(logits.shape, logits)
    stats = KernelStats(entropy, entropy, logsumexp, logsumexp_low)  # the gradient has no use for the logprobs
    transform = Transform(temperature, softcap, logit_scale, ignore_index)
    gradients = StatsGradients(grad_logprobs, grad_entropy, grad_logsumexp)
    run_backward(logits, targets, stats, gradients, transform, out=out)
    return out


@token_stats_backward_op.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def refuse_second_derivative(*_: Any) -> Any:
    """Stand where a backward pass's own derivative would: the kernels have none, and 0 would be wrong."""
    raise RuntimeError(
        "edge_kernels ops have no second derivative; use edge_kernels.reference, which is plain PyTorch, "
        "for the part of the loss that is differentiated twice"
    )


token_stats_backward_op.register_autograd(refuse_second_derivative)

# --- autograd ---------------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, *transform = inputs
    _, entropy, logsumexp, logsumexp_low = output
    ctx.save_for_backward(logits, targets, entropy, logsumexp, logsumexp_low)
    ctx.mark_non_differentiable(logsumexp_low)
    ctx.set_materialize_grads(False)  # what is not used stays None, and the kernel skips it
    ctx.transform = transform


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    gradient = None
    if any(g is not None for g in grads[:3]):
        gradient = token_stats_backward_op(*ctx.saved_tensors, *grads[:3], *ctx.transform)
    return gradient, None, None, None, None, None


token_stats_op.register_autograd(_backward, setup_context=_setup_context)


class _InplaceTokenStats(torch.autograd.Function):
    """The same, with the backward pass writing the gradient over the logits.

    Autograd does not see that write, so the version counter is raised by hand. Whoever saved these logits for a
    backward pass of their own, this one a second time included, then gets autograd's "modified by an inplace operation"
    instead of a wrong gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, *transform: Any) -> tuple[Tensor, ...]:
        output = token_stats_op(logits, targets, *transform)
        _setup_context(ctx, (logits, targets, *transform), output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            refuse_second_derivative()
        logits, targets, entropy, logsumexp, logsumexp_low = ctx.saved_tensors
        stats = KernelStats(entropy, entropy, logsumexp, logsumexp_low)
        out = logits.detach()
        run_backward(out, targets, stats, StatsGradients(*grads[:3]), Transform(*ctx.transform), out=out)
        torch.autograd.graph.increment_version(logits)
        return out, None, None, None, None, None


# --- public -----------------------------------------------------------------------------------------------------------


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
) -> TokenStats:
    """Return ``TokenStats(logprobs, entropy, logsumexp)`` of each token, in nats, from one read of the logits.

    Equivalent::

        z = logit_scale * logits.float()
        z = (softcap * torch.tanh(z / softcap) if softcap else z) / temperature
        logp = z.log_softmax(-1)
        logprobs = logp.gather(-1, targets[..., None])[..., 0]
        entropy = -(logp.exp() * logp).sum(-1)
        logsumexp = z.logsumexp(-1)

    except that a logit of -inf (a forbidden token) contributes 0 to the entropy and to every gradient instead of NaN,
    and that the sums are shifted, so that large logits cost no digits. A row with NaN or +inf, or of nothing but -inf,
    gives NaN.

    logits        (..., V): float32, bfloat16, float16 or float64, V >= 1; any strides (copied only if a row's elements
                  are not adjacent).
    targets       (...), int64, in [0, V) or ``ignore_index``.
    temperature   > 0; softcap > 0 or None; logit_scale: see above.
    ignore_index  rows with this target are not read, give 0 in all three and get no gradient.

    Returns float32 (float64 for float64 logits) in the shape of ``targets``; all three are differentiable in
    ``logits``, once: a second derivative raises RuntimeError. Raises TypeError or ValueError for wrong dtypes, shapes
    and targets (a target out of range gives NaN on a GPU, where looking at it would wait for all work queued). Under
    autocast the logits are taken as they are: sums are float32 whatever their dtype.
    """
    return TokenStats(*_checked(logits, targets, temperature, softcap, logit_scale, ignore_index)[:3])


def token_entropy(
    logits: Tensor, *, temperature: float = 1.0, softcap: float | None = None, logit_scale: float = 1.0
) -> Tensor:
    """Return the entropy of each row of ``logits`` (..., V) in nats, (...).

    Equivalent to ``torch.distributions.Categorical(logits=z).entropy()`` with z as in ``token_stats``; dtypes, special
    values, errors and gradient as there.
    """
    check_float("logits", logits, least_dims=1)
    check_transform(temperature, softcap)
    return token_stats_op(logits, None, temperature, softcap, logit_scale, IGNORE_INDEX)[1]


def inplace_token_stats(logits: Tensor, targets: Tensor, transform: Transform) -> TokenStats:
    """Return ``token_stats`` whose backward pass writes the gradient into the logits' own storage.

    ``torch.compile`` plans buffers itself and forbids such writes: there this is ``token_stats``.
    """
    if torch.compiler.is_compiling():
        return token_stats(logits, targets, **transform._asdict())
    check_writable_rows(logits)
    return TokenStats(*_checked(logits, targets, *transform, inplace=True)[:3])


def check_writable_rows(logits: Tensor) -> None:
    """Require logits whose rows a gradient can be written over."""
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(
            f"inplace=True needs logits whose last dimension is contiguous; got strides {logits.stride()}; "
            "pass logits.contiguous(), or inplace=False"
        )
    if any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)):
        raise ValueError(
            f"inplace=True needs logits without overlapping rows; got strides {logits.stride()} for shape "
            f"{tuple(logits.shape)}; pass logits.contiguous(), or inplace=False"
        )


def _checked(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    inplace: bool = False,
) -> tuple[Tensor, ...]:
    check_float("logits", logits, least_dims=1)
    remedy = "pass one token id per row of logits"
    check_like("targets", targets, {"logits.shape[:-1]": tuple(logits.shape[:-1])}, "int64", logits, remedy=remedy)
    check_transform(temperature, softcap)
    op = _InplaceTokenStats.apply if inplace else token_stats_op
    return op(logits, targets, temperature, softcap, logit_scale, ignore_index)
