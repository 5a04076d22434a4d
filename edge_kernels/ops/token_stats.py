"""Log-probability, entropy and logsumexp of each token from its logits: the ops, autograd, and the public functions,
top to bottom. What a backend computes: contract.py; the mathematics: reference.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edge_kernels._checks import (
    IGNORE_INDEX,
    check_float,
    check_like,
    check_targets_in_range,
    check_temperature,
    check_transform,
)
from edge_kernels.backend import kernels
from edge_kernels.contract import KernelStats, StatsGradients, Transform, new_stats
from edge_kernels.ops.autograd import refuse_second_derivative
from edge_kernels.ops.memory import fresh
from edge_kernels.ops.temperatures import token_stats_backward, token_stats_forward
from edge_kernels.types import TokenStats

# --- ops --------------------------------------------------------------------------------------------------------------


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
    token_stats_backward(kernels(logits), logits, targets, stats, gradients, transform, out=out)


@torch.library.custom_op("edge_kernels::token_stats", mutates_args=())
def token_stats_op(
    logits: Tensor, targets: Tensor | None, transform: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    unpacked = Transform.unpack(transform)
    if targets is not None:
        check_targets_in_range(targets, logits.shape[-1], unpacked.ignore_index)
    return token_stats_forward(kernels(logits), logits, targets, unpacked)


@token_stats_op.register_fake
def _(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(new_stats(logits) for _ in KernelStats._fields)


def stats_for_backward(saved: list[Tensor]) -> KernelStats:
    """Return the statistics from those that are saved: the gradient has no use for logprobs and logsumexp."""
    entropy, maximum, total = saved
    return KernelStats(entropy, entropy, entropy, maximum, total)


@torch.library.custom_op("edge_kernels::token_stats_backward", mutates_args=())
def token_stats_backward_op(
    logits: Tensor,
    targets: Tensor | None,
    stats: list[Tensor],  # entropy, maximum, total
    gradients: list[Tensor | None],
    transform: Tensor,
) -> Tensor:
    out = fresh(logits.shape, logits)
    options = (stats_for_backward(stats), StatsGradients(*gradients), Transform.unpack(transform))
    run_backward(logits, targets, *options, out=out)
    return out


@token_stats_backward_op.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


token_stats_backward_op.register_autograd(refuse_second_derivative)

# --- autograd ---------------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, output[1], *output[3:])
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)  # what is not used stays None, and the kernel skips it


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    gradient = None
    if any(g is not None for g in grads[:3]):
        logits, targets, transform, *stats = ctx.saved_tensors
        gradient = token_stats_backward_op(logits, targets, stats, list(grads[:3]), transform)
    return gradient, None, None


token_stats_op.register_autograd(_backward, setup_context=_setup_context)


class _InplaceTokenStats(torch.autograd.Function):
    """The same, with the backward pass writing the gradient over the logits.

    Autograd does not see that write, so the version counter is raised by hand. A function that saved these logits for
    its own backward pass, or a second run of this one, then gets autograd's "modified by an inplace operation" instead
    of a wrong gradient.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = token_stats_op(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            refuse_second_derivative()
        logits, targets, transform, *stats = ctx.saved_tensors
        out = logits.detach()
        options = (stats_for_backward(stats), StatsGradients(*grads[:3]), Transform.unpack(transform))
        run_backward(out, targets, *options, out=out)
        torch.autograd.graph.increment_version(logits)
        return out, None, None


# --- public -----------------------------------------------------------------------------------------------------------


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
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
    temperature   > 0, a number or one for each entry of the first dimension (floating point; on the CPU, or a GPU
                  waits for it); softcap > 0 or None; logit_scale: see above.
    ignore_index  rows with this target are not read, give 0 in all three and get no gradient.

    Returns float32 (float64 for float64 logits) in the shape of ``targets``; all three are differentiable in
    ``logits``, once: a second derivative raises RuntimeError. Raises TypeError or ValueError for wrong dtypes, shapes
    and targets (a target out of range gives NaN on a GPU, where checking it would wait for all queued work). Under
    autocast the logits are taken as they are: sums are float32 whatever their dtype.
    """
    _check(logits, targets, temperature, softcap)
    transform = Transform(check_temperature(temperature, logits.shape[0]), softcap, logit_scale, ignore_index)
    return TokenStats(*token_stats_op(logits, targets, transform.pack())[:3])


def token_entropy(
    logits: Tensor, *, temperature: float = 1.0, softcap: float | None = None, logit_scale: float = 1.0
) -> Tensor:
    """Return the entropy of each row of ``logits`` (..., V) in nats, (...).

    Equivalent to ``torch.distributions.Categorical(logits=z).entropy()`` with z as in ``token_stats``; dtypes, special
    values, errors and gradient as there.
    """
    check_float("logits", logits, least_dims=1)
    check_transform(temperature, softcap)
    transform = Transform(temperature, softcap, logit_scale, IGNORE_INDEX)
    return token_stats_op(logits, None, transform.pack())[1]


def inplace_token_stats(logits: Tensor, targets: Tensor, transform: Transform) -> TokenStats:
    """Return ``token_stats`` whose backward pass writes the gradient into the logits' own storage.

    ``torch.compile`` plans buffers itself and forbids such writes: there this is ``token_stats``.
    """
    if torch.compiler.is_compiling():
        return token_stats(logits, targets, **transform._asdict())
    check_writable_rows(logits)
    _check(logits, targets, transform.temperature, transform.softcap)
    return TokenStats(*_InplaceTokenStats.apply(logits, targets, transform.pack())[:3])


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


def _check(logits: Tensor, targets: Tensor, temperature: float | Tensor, softcap: float | None) -> None:
    check_float("logits", logits, least_dims=1)
    remedy = "pass one token id per row of logits"
    check_like("targets", targets, {"logits.shape[:-1]": tuple(logits.shape[:-1])}, "int64", logits, remedy=remedy)
    check_transform(temperature, softcap)
