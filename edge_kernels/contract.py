"""What a backend offers: the functions of its module, as a protocol. Which backend serves a tensor: backend.py.

reference: plain.py; cpu: cpu.py; triton: triton/; cuda: cuda.py. Arguments have been checked, tensors are real (not
fake) and on one device; nothing here is differentiable, autograd stands around it. No function waits for the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from edge_kernels.ops.token_loss import LossRule, TokenLoss, TokenTerms
    from edge_kernels.ops.token_stats import KernelStats, StatsGradients, Transform


class Kernels(Protocol):
    """The functions that every backend's module has."""

    def token_stats_forward(self, logits: Tensor, targets: Tensor | None, transform: Transform) -> KernelStats:
        """Return the statistics of each row of ``logits`` (..., V), whatever their strides.

        ``targets`` (...), int64; None: every row counts, and logprobs are 0. All four results are contiguous tensors of
        shape (...) in ``stats_dtype(logits.dtype)``. Special values as csrc/token_stats.h says: -inf contributes
        nothing, a row with NaN or +inf or of -inf only is NaN, an ignored row is not read and gives 0, a target outside
        [0, V) has logprob NaN. Entropy is never negative. ``logsumexp_low`` is what rounding took from ``logsumexp``
        (0 is allowed, where p in the backward pass is exact without).
        """

    def token_stats_backward(
        self,
        logits: Tensor,
        targets: Tensor | None,
        stats: KernelStats,
        gradients: StatsGradients,
        transform: Transform,
        *,
        out: Tensor,
    ) -> None:
        """Write the gradient of ``logits`` (..., V) into ``out``: contiguous, of their shape, or the logits themselves.

        ``stats`` are the forward pass's (its logprobs are not needed and may be anything). ``gradients`` (...) each, in
        any floating dtype and stride, None for 0; ``gradients.logprobs`` is None where ``targets`` is. Rows that are
        ignored, or whose gradients are all 0, get 0 and are not read.
        """

    def grpo_sweep(
        self, logits: Tensor, targets: Tensor, terms: TokenTerms, rule: LossRule, transform: Transform, *, out: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write the loss's gradient into ``out`` (may be the logits); return logprobs and entropy, as forward does.

        ``logits`` (..., V) with rows of adjacent elements; ``targets`` and the per-token tensors of ``terms`` (...),
        the latter of any stride. The coefficient of a row is ``token_loss``'s derivative there, for rules under which
        it depends on the row's own statistics alone (level "token", sampler_mode "token_..." or a given sampler_ratio).
        """

    def token_loss(self, logprobs: Tensor, entropy: Tensor, terms: TokenTerms, rule: LossRule) -> TokenLoss:
        """Return what ``edge_kernels.ops.token_loss.token_loss`` returns, which is the specification."""


class HeadKernels(Kernels, Protocol):
    """A backend that makes the logits of a linear head itself, so that no tile of them passes through memory."""

    def linear_forward(
        self,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        dtype: torch.dtype,  # of the products
        transform: Transform,
    ) -> KernelStats:
        """Return the statistics of the rows of logits ``hidden @ weight.T + bias``, (N,) each."""

    def linear_backward(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        stats: KernelStats,
        gradients: StatsGradients,
        wanted: tuple[bool, bool, bool],
        dtype: torch.dtype,
        transform: Transform,
        into: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of hidden states, weight and bias in their dtypes; an empty tensor for an unwanted one.

        Where ``into`` is given, the weight's is added to it, and an empty tensor stands for it.
        """
