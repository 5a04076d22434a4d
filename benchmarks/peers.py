"""The contenders: ours, plain PyTorch, torch.compile of it, the peers; and the float64 result to compare them with.

Each computes the GRPO loss of completions whose log-ratios are 0 (the current policy sampled them) and, if it can, the
entropy, detached. Packages are imported on demand; a contender that is not available is listed with the reason.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import COMPILED, OURS, WrongError, explain

PLAIN = "PyTorch"
TRL = "TRL"


class Batch(NamedTuple):
    targets: Tensor  # (B, T), as mask
    mask: Tensor
    advantages: Tensor  # (B,), as the following two
    rewards: Tensor
    group_ids: Tensor


class Answer(NamedTuple):
    """The loss, and logprobs and entropy (B, T) if the contender returns them."""

    loss: Tensor
    logprobs: Tensor | None
    entropy: Tensor | None


Statistics = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # logits, targets -> logprobs, entropy
LogitsLoss = Callable[[Tensor, Batch, bool], Answer]  # the flag: entropy-driven advantages from rewards
HeadLoss = Callable[[Tensor, Tensor, Batch], Answer]  # hidden (B, T, D), weight (V, D)


def make_batch(num_sequences: int, num_tokens: int, vocab: int) -> Batch:
    generator = torch.Generator().manual_seed(num_tokens)
    targets = torch.randint(vocab, (num_sequences, num_tokens), generator=generator)
    rewards = torch.arange(num_sequences) % 2.0
    return Batch(
        targets, torch.ones_like(targets, dtype=torch.bool), rewards * 2 - 1, rewards, torch.arange(num_sequences) // 4
    )


def split(rows: int) -> tuple[int, int]:
    """Return sequences and tokens a sequence: groups of four if ``rows`` is a multiple."""
    num_sequences = 4 if rows % 4 == 0 else 1
    return num_sequences, rows // num_sequences


# --- pieces that the contenders share ---------------------------------------------------------------------------------


def policy_loss(logprobs: Tensor, advantages: Tensor, batch: Batch) -> Tensor:
    """The clipped loss at ratio 1, a mean over tokens: TRL's lines for ``loss_type="dapo"``."""
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    ratio = torch.exp(logprobs - logprobs.detach())
    per_token = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return (per_token * batch.mask).sum() / batch.mask.sum().clamp(min=1.0)


def driven_advantages(entropy: Tensor, batch: Batch) -> Tensor:
    """Entropy-driven advantages (arXiv:2507.21848, eqs. 3, 6, 7) of whole, adjacent groups of four."""
    group = min(4, len(batch.rewards))
    rewards = batch.rewards.to(entropy.dtype).view(-1, group)
    spread = rewards.std(1, keepdim=True) if group > 1 else torch.zeros_like(rewards)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (spread + 1e-4)
    means = ((entropy * batch.mask).sum(-1) / batch.mask.sum(-1)).view(-1, group)
    return (advantages / (means / means.mean(1, keepdim=True)).clamp(0.1, 10)).flatten()


def answer(logprobs: Tensor, entropy: Tensor | None, batch: Batch, driven: bool = False) -> Answer:
    entropy = None if entropy is None else entropy.detach()
    advantages = driven_advantages(entropy, batch) if driven and entropy is not None else batch.advantages
    return Answer(policy_loss(logprobs, advantages, batch), logprobs.detach(), entropy)


def plain_statistics(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return log_p.gather(-1, targets[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def plain_loss(logits: Tensor, batch: Batch, driven: bool) -> Answer:
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    logprobs, fixed = log_p.gather(-1, batch.targets[..., None])[..., 0], log_p.detach()
    return answer(logprobs, -(fixed.exp() * fixed).sum(-1), batch, driven)


def plain_head(hidden: Tensor, weight: Tensor, batch: Batch) -> Answer:
    return plain_loss(F.linear(hidden, weight), batch, False)


def plain_head_by_float32(hidden: Tensor, weight: Tensor, batch: Batch) -> Answer:
    """Return what ``plain_head`` does: it sums in float32 and rounds as often. A fast measure of its accuracy."""
    return plain_loss(F.linear(hidden.float(), weight.float()).to(hidden.dtype), batch, False)


# --- from logits: (statistics, loss) of each --------------------------------------------------------------------------


def _ours(inplace: bool) -> tuple[Statistics, LogitsLoss]:
    import edge_kernels

    def statistics(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        stats = edge_kernels.token_stats(logits, targets)
        return stats.logprobs, stats.entropy

    def loss(logits: Tensor, batch: Batch, driven: bool) -> Answer:
        from_rewards = {"rewards": batch.rewards, "group_ids": batch.group_ids}
        how: dict[str, Any] = from_rewards if driven else {"advantages": batch.advantages}
        out = edge_kernels.edge_grpo_loss(logits, batch.targets, batch.mask, inplace=inplace, **how)
        return Answer(out.loss, out.logprobs, out.entropy)

    return statistics, loss


def _compiled() -> tuple[Statistics, LogitsLoss]:
    return torch.compile(plain_statistics, dynamic=False), torch.compile(plain_loss, dynamic=False)


def _trl() -> tuple[Statistics, LogitsLoss]:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    def statistics(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return selective_log_softmax(logits, targets), entropy_from_logits(logits)

    def loss(logits: Tensor, batch: Batch, driven: bool) -> Answer:
        logprobs = selective_log_softmax(logits, batch.targets)
        with torch.no_grad():
            entropy = entropy_from_logits(logits)
        return answer(logprobs, entropy, batch, driven)

    return statistics, loss


def _published() -> tuple[Statistics, LogitsLoss]:
    """The published EDGE-GRPO code's formula: in the logits' dtype, entropy not detached, mean over the whole batch."""

    def statistics(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_p, p = logits.log_softmax(-1), logits.softmax(-1)
        return log_p.gather(-1, targets[..., None])[..., 0], -(p * log_p).sum(-1)

    def loss(logits: Tensor, batch: Batch, driven: bool) -> Answer:
        logprobs, entropy = statistics(logits, batch.targets)
        means = entropy.mean(-1)
        advantages = batch.advantages / (means / means.mean())
        return Answer(policy_loss(logprobs, advantages, batch), logprobs.detach(), entropy.detach())

    return statistics, loss


NEW_BUFFER, PUBLISHED = f"{OURS}, gradient in a new buffer", "published formula"
LOGITS: dict[str, Callable[[], tuple[Statistics, LogitsLoss]]] = {
    OURS: lambda: _ours(inplace=True),
    NEW_BUFFER: lambda: _ours(inplace=False),
    PLAIN: lambda: (plain_statistics, plain_loss),
    COMPILED: _compiled,
    TRL: _trl,
    PUBLISHED: _published,
}


# --- from hidden states -----------------------------------------------------------------------------------------------


def _our_head() -> HeadLoss:
    import edge_kernels

    def loss(hidden: Tensor, weight: Tensor, batch: Batch) -> Answer:
        out = edge_kernels.linear_edge_grpo_loss(hidden, weight, batch.targets, batch.mask, advantages=batch.advantages)
        return Answer(out.loss, out.logprobs, out.entropy)

    return loss


def _trl_head() -> HeadLoss:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK_SIZE

    def loss(hidden: Tensor, weight: Tensor, batch: Batch) -> Answer:
        options = (1.0, CHUNK_SIZE, None, 1.0, ("log_probs", "entropy"))  # as GRPOTrainer calls it
        flat = hidden.flatten(0, 1), weight, None, batch.targets.flatten()
        logprobs, entropy, *_ = ChunkedLogProbFunction.apply(*flat, *options)
        return answer(logprobs.view_as(batch.targets), entropy.view_as(batch.targets), batch)

    return loss


def _liger_head() -> HeadLoss:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    function = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)

    def loss(hidden: Tensor, weight: Tensor, batch: Batch) -> Answer:
        return Answer(function(hidden, weight, batch.targets, batch.mask, batch.advantages)[0], None, None)

    return loss


def verl_module(file: str, name: str) -> tuple[ModuleType, Callable[[], None]]:
    """Return a module from one file of verl, and what executes it: importing verl would need ray, tensordict and more.

    Raises ModuleNotFoundError.
    """
    verl = importlib.util.find_spec("verl")  # finds without importing
    if verl is None or not verl.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'verl'")
    spec = importlib.util.spec_from_file_location(name, Path(verl.submodule_search_locations[0]) / file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    return module, partial(spec.loader.exec_module, module)


def _verl_head() -> HeadLoss:
    module, execute = verl_module("utils/experimental/torch_functional.py", "verl_torch_functional")
    execute()
    function = module.FusedLinearForPPO()

    def loss(hidden: Tensor, weight: Tensor, batch: Batch) -> Answer:
        logprobs, entropy = function(hidden, weight, batch.targets)
        return answer(logprobs, entropy, batch)

    return loss


def _cut_head() -> HeadLoss:
    from cut_cross_entropy.torch_compile import torch_compile_linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, batch: Batch) -> Answer:
        return answer(-torch_compile_linear_cross_entropy(hidden, weight, batch.targets, reduction="none"), None, batch)

    return loss


TRL_HEAD, LIGER, VERL, CUT = "TRL fused head", "Liger fused GRPO", "verl FusedLinearForPPO", "cut-cross-entropy (torch)"
HEADS: dict[str, Callable[[], HeadLoss]] = {
    OURS: _our_head,
    PLAIN: lambda: plain_head,
    COMPILED: lambda: torch.compile(plain_head, dynamic=False),
    TRL_HEAD: _trl_head,
    VERL: _verl_head,
    CUT: _cut_head,
    LIGER: _liger_head,
}
NOTES = {
    LIGER: "no entropy",
    CUT: "no entropy",
    PUBLISHED: "its own loss: entropy not detached",
}


def is_timed(name: str, names: Sequence[str] | None) -> bool:
    """Whether to time a contender. Plain PyTorch always runs, as the measure of accuracy; it is timed only if named."""
    return names is None or name in names or name.startswith(OURS)


def available(
    makers: Mapping[str, Callable[[], Any]], names: Sequence[str] | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the contenders in ``names`` (None: all; ours and plain PyTorch always), and why others are missing."""
    found, missing = {}, {}
    for name, make in makers.items():
        if names is None or name in names or name in (OURS, PLAIN):
            try:
                found[name] = make()
            except Exception as error:  # a broken installation can raise anything
                missing[name] = explain(error)
    return found, missing


# --- the float64 result, and errors against it ------------------------------------------------------------------------


def exact_statistics(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return logprobs, entropy and probabilities in float64; a forbidden token (-inf) contributes nothing."""
    log_p = logits.double().log_softmax(-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    return log_p.gather(-1, targets[..., None])[..., 0], entropy, p


def exact_coefficients(entropy: Tensor, batch: Batch, driven: bool) -> Tensor:
    """Return d loss / d logprob of each token, (B * T,), float64."""
    advantages = driven_advantages(entropy.view_as(batch.targets), batch) if driven else batch.advantages.double()
    return (-advantages[:, None] * batch.mask / batch.mask.sum()).flatten()


def exact_gradient(p: Tensor, targets: Tensor, coefficients: Tensor) -> Tensor:
    """Return the gradient of rows of logits: coefficient times (one-hot less probabilities)."""
    gradient = p * -coefficients[:, None]
    gradient[torch.arange(len(targets)), targets] += coefficients
    return gradient


class Checked(NamedTuple):
    """What a check found for each contender."""

    errors: dict[str, dict[str, float]]
    failed: dict[str, str]  # the reasons
    lowest_entropy: dict[str, float]


T = TypeVar("T")


def attempt(name: str, call: Callable[[], T], failed: dict[str, str]) -> T | None:
    """Return ``call()``, or None with the reason in ``failed``. Ours and plain PyTorch must not fail."""
    try:
        return call()
    except Exception as error:  # any failure of a peer is a result
        failed[name] = explain(error)
        if name in (OURS, PLAIN):
            raise
        return None


def error(got: Tensor | None, wanted: Tensor, *, relative: bool = False) -> float:
    """Return the largest difference; NaN if the result has NaN or infinities where the exact one has none."""
    if got is None:
        return math.nan
    largest = (got.detach().double().reshape(wanted.shape) - wanted).abs().max().item()
    return largest / max(wanted.abs().max().item(), 1e-300) if relative else largest


def require_exact(errors: Mapping[str, Mapping[str, float]], where: str) -> None:
    """Raise WrongError unless ours is as accurate as plain PyTorch in the same dtype, with a margin of half."""
    for name in (name for name in errors if name.startswith(OURS)):
        for kind, plain in errors[PLAIN].items():
            ours, allowed = errors[name][kind], (1.5 * plain if math.isfinite(plain) else 0.0) + 1e-6
            if math.isfinite(plain) and not ours <= allowed:
                raise WrongError(f"{where}: {name}'s {kind} is off by {ours:.3g}, plain PyTorch's by {plain:.3g}")
            if not math.isfinite(ours):
                raise WrongError(f"{where}: {name}'s {kind} is {ours}")
