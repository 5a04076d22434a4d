"""The peers on a GPU: plain PyTorch and torch.compile as on a CPU, and kernels that only run on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.machine_code.peers import verl_kernels
from benchmarks.peers import PLAIN, Answer, Batch


def _trl_fused() -> tuple[peers.Statistics, peers.LogitsLoss]:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    def of_statistics(values: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return selective_log_softmax_and_entropy(values, targets, entropy_requires_grad=False)

    def of_loss(values: Tensor, batch: Batch, driven: bool) -> Answer:
        return peers.answer(*of_statistics(values, batch.targets), batch, driven)

    return of_statistics, of_loss


def _cut_fused() -> peers.HeadLoss:
    from cut_cross_entropy import linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, batch: Batch) -> Answer:
        nll = linear_cross_entropy(hidden, weight, batch.targets, reduction="none", impl="cce")
        return peers.answer(-nll, None, batch)

    return loss


def _verl_fused() -> peers.HeadLoss:
    major, minor = torch.cuda.get_device_capability()
    kernels = verl_kernels(10 * major + minor)
    options = kernels.get_entropy_reduction_enum_number("none"), 1.0, None  # reduction, temperature, process group

    class Function(torch.autograd.Function):  # as verl's own, whose module needs ray
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            logprobs, entropy, *kept = kernels.efficient_entropy_forward(hidden, weight, labels, *options)
            ctx.save_for_backward(hidden, weight, labels, *kept)
            return logprobs, entropy

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            reduction, temperature, group = options
            given = (*gradients, *ctx.saved_tensors, reduction, False, temperature, group)
            return (*kernels.efficient_entropy_backward(*given), None)

    def loss(hidden: Tensor, weight: Tensor, batch: Batch) -> Answer:
        logprobs, entropy = Function.apply(hidden.flatten(0, 1), weight, batch.targets.flatten())
        return peers.answer(logprobs.view_as(batch.targets), entropy.view_as(batch.targets), batch)

    return loss


CUT_FUSED, VERL_FUSED = "cut-cross-entropy (Triton)", "verl kernels (Triton)"
LOGITS = {name: peers.LOGITS[name] for name in (PLAIN, peers.COMPILED)} | {peers.TRL: _trl_fused}
HEADS = {name: peers.HEADS[name] for name in (PLAIN, peers.COMPILED, peers.TRL_HEAD, peers.LIGER)} | {
    CUT_FUSED: _cut_fused,
    VERL_FUSED: _verl_fused,
}
