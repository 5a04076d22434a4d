"""What a backend offers, and the records that pass between ops and backends. Which backend serves a tensor: backend.py.

reference: backends/plain.py; cpu and cuda: backends/compiled.py; triton: backends/triton. Arguments have been checked,
tensors are real (not fake) and on one device; nothing here is differentiable, the ops add autograd. No function
waits for the device. The mathematics: reference.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from edge_kernels._checks import stats_dtype
from edge_kernels.config import GRPOLossConfig


def pack_numbers(values: Sequence[float]) -> Tensor:
    """Return a record's numbers as one float64 tensor on the CPU, whatever device the op runs on.

    As a tensor a number can change without a new trace by torch.compile: a float argument of an op is a constant of the
    graph.
    """
    if not torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.float64, device="cpu")
    one = torch.ones((), dtype=torch.float64, device="cpu")  # a product with a float is what the tracer keeps symbolic
    return torch.stack([one * value for value in values])


# --- statistics -------------------------------------------------------------------------------------------------------


class Transform(NamedTuple):
    """What happens to raw logits first, and which target means "no token here"."""

    temperature: (
        Any  # a number for backends; for ops also one for each entry of the first dimension: a float64 tensor on
    )
    # the CPU before ``pack``, a tuple after ``unpack``
    softcap: float | None
    logit_scale: float
    ignore_index: int

    def pack(self) -> Tensor:
        """Return the transform as an op's argument ``transform``."""
        numbers = [self.softcap or 0.0, self.logit_scale, float(self.ignore_index)]
        if isinstance(self.temperature, Tensor):
            return torch.cat([pack_numbers(numbers), self.temperature])
        return pack_numbers([*numbers, self.temperature])

    @classmethod
    def unpack(cls, packed: Tensor) -> Transform:
        softcap, logit_scale, ignore_index, *temperatures = packed.tolist()
        if not temperatures:  # of no response
            temperatures = [1.0]
        temperature = temperatures[0] if len(temperatures) == 1 else tuple(temperatures)
        return cls(temperature, softcap or None, logit_scale, int(ignore_index))


HUGE = 2.0**30  # kernels that work in powers of two change their unit there; see backends/triton/arithmetic.py


class KernelStats(NamedTuple):
    """``TokenStats``, and what the backend's own backward pass makes p of: exp(z - maximum) / total.

    ``maximum`` is a row's largest logit as that backend has it (before the temperature, or in powers of two). Not made
    of logsumexp: that of 3e4 in float32 is off by 1e-3, and so p would be.
    """

    logprobs: Tensor
    entropy: Tensor
    logsumexp: Tensor
    maximum: Tensor
    total: Tensor


class StatsGradients(NamedTuple):
    """The incoming gradients of the statistics, (...) each; None is 0."""

    logprobs: Tensor | None
    entropy: Tensor | None
    logsumexp: Tensor | None


def new_stats(logits: Tensor) -> Tensor:
    """Return an uninitialized statistic of each row of ``logits`` (..., V)."""
    return torch.empty(logits.shape[:-1], dtype=stats_dtype(logits.dtype), device=logits.device)


# --- the loss of a token ----------------------------------------------------------------------------------------------

# The entries of the metrics vector. Those ending in _max combine by the maximum, the others by addition.
METRICS = (
    "tokens",
    "entropy_sum",
    "ratio_sum",
    "ratio_max",
    "clip_low",
    "clip_high",
    "clip_region",
    "kl_sum",
    "kl_bounded",
    "sampler_ratio_sum",
    "sampler_ratio_max",
)


class Objective:
    """The policy term, as in csrc/calls.h. Plain numbers: torch.compile does not trace ``float`` of an enum."""

    CLIPPED = 0
    CISPO = 1
    SAPO = 2
    GEOMETRIC = 3  # GMPO: the ratio of a sequence, from log ratios that are clipped token by token
    WEIGHTED = 4  # VESPO: the log-probability, weighted by the factor alone


class Injected:
    """What tokens that the policy did not sample do instead; as in csrc/calls.h."""

    NOTHING = 0
    SFT = 1
    SHAPED = 2


class LossRule(NamedTuple):
    """The part of ``GRPOLossConfig`` that acts on a single token; every field is a number."""

    objective: int
    ratio_of_sequence: bool  # one importance ratio per response instead of one per token
    epsilon_low: float
    epsilon_high: float
    delta: float  # inf for none
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    beta: float
    bias_corrects_kl: bool  # the KL estimate is multiplied by the ratio
    sampler_cap: float  # inf for none
    sampler_floor: float
    sampler_of_sequence: bool
    sampler_masks: bool  # outside of [floor, cap]; else it truncates
    injected: int
    sft_weight: float
    shaped_gamma: float

    @classmethod
    def of(cls, config: GRPOLossConfig) -> LossRule:
        infinity = float("inf")
        objective = {
            "cispo": Objective.CISPO,
            "sapo": Objective.SAPO,
            "geo_mean": Objective.GEOMETRIC,
            "vespo": Objective.WEIGHTED,
        }
        treatment = {"sft": Injected.SFT, "shaped": Injected.SHAPED}
        return cls(
            objective=objective.get(config.loss_type, Objective.CLIPPED),
            ratio_of_sequence=config.importance_sampling_level == "sequence" or config.loss_type == "geo_mean",
            epsilon_low=float(config.epsilon_low),
            epsilon_high=float(config.epsilon_high),
            delta=infinity if config.delta is None else float(config.delta),
            sapo_temperature_pos=float(config.sapo_temperature_pos),
            sapo_temperature_neg=float(config.sapo_temperature_neg),
            beta=float(config.beta),
            bias_corrects_kl=config.use_bias_correction_kl,
            sampler_cap=infinity if config.sampler_ratio_cap is None else float(config.sampler_ratio_cap),
            sampler_floor=float(config.sampler_ratio_floor),
            sampler_of_sequence=config.sampler_ratio_mode.startswith("sequence"),
            sampler_masks=config.sampler_ratio_mode.endswith("mask"),
            injected=treatment.get(config.injected, Injected.NOTHING),
            sft_weight=float(config.sft_weight),
            shaped_gamma=float(config.shaped_gamma),
        )

    def pack(self) -> Tensor:
        """Return the rule as an op's argument ``rule``."""
        return pack_numbers(self)

    @classmethod
    def unpack(cls, packed: Tensor) -> LossRule:
        kinds: dict[str, Any] = {"objective": int, "injected": int}
        kinds |= dict.fromkeys(("ratio_of_sequence", "bias_corrects_kl", "sampler_of_sequence", "sampler_masks"), bool)
        values: list[Any] = [kinds.get(name, float)(x) for name, x in zip(cls._fields, packed.tolist(), strict=True)]
        return cls(*values)


class TokenTerms(NamedTuple):
    """What the loss of each token depends on besides its statistics. Per-token tensors have one shape.

    That shape is (B, T); where every quantity is the token's own (no ratio of whole sequences), any selection of
    tokens, (n,), gives that selection's part of the sum.
    """

    mask: Tensor  # bool: tokens that have a loss
    weight: Tensor  # 1 / normalizer; the loss is the weighted sum
    advantages: Tensor
    old_logprobs: Tensor | None = None  # NaN where there is no record; None: the current ones
    ref_logprobs: Tensor | None = None
    sampler_ratio: Tensor | None = None  # the correction factor, where it is known beforehand
    sampling_logprobs: Tensor | None = None  # else what it is made from, with the current logprobs
    injected: Tensor | None = None  # bool: tokens to treat as ``LossRule.injected`` says
    entropy_threshold: Tensor | None = None  # (): tokens below it have no policy gradient
    bonus_weight: Tensor | None = None  # (): entropy coefficient / number of tokens it acts on

    def pack(self) -> list[Tensor | None]:
        """Return the terms as an op's argument ``Tensor?[] terms``."""
        return list(self)

    @classmethod
    def unpack(cls, packed: Sequence[Tensor | None]) -> TokenTerms:
        mask, weight, advantages, *others = packed
        assert mask is not None
        assert weight is not None
        assert advantages is not None
        return cls(mask, weight, advantages, *others)

    def select(self, rows: Tensor | slice) -> TokenTerms:
        """Return the terms of some rows, where the per-token tensors have shape (N,)."""
        return self._map(lambda value: value[rows])

    def flatten(self) -> TokenTerms:
        """Return the same with per-token tensors of shape (N,)."""
        return self._map(torch.flatten)

    def _map(self, function: Callable[[Tensor], Tensor]) -> TokenTerms:
        per_token = {name: value for name, value in self._asdict().items() if value is not None and value.dim()}
        return self._replace(**{name: function(value) for name, value in per_token.items()})


class TokenLoss(NamedTuple):
    """The weighted sum of token losses, its metrics, and its derivatives by each token's logprob and entropy."""

    loss: Tensor  # ()
    metrics: Tensor  # (len(METRICS),)
    d_logprobs: Tensor
    d_entropy: Tensor

    def gradients(self, terms: TokenTerms) -> StatsGradients:
        """Return the derivatives as incoming gradients of the statistics; without a bonus entropy has none."""
        return StatsGradients(self.d_logprobs, None if terms.bonus_weight is None else self.d_entropy, None)


# --- backends ---------------------------------------------------------------------------------------------------------


class Kernels(Protocol):
    """The functions that every backend's module has."""

    def token_stats_forward(self, logits: Tensor, targets: Tensor | None, transform: Transform) -> KernelStats:
        """Return the statistics of each row of ``logits`` (..., V), whatever their strides.

        ``targets`` (...), int64; None: every row counts, and logprobs are 0. All results are contiguous tensors of
        shape (...) in ``stats_dtype(logits.dtype)``. Special values as csrc/token_stats.h says: -inf contributes
        nothing, a row with NaN or +inf or of -inf only is NaN, an ignored row is not read and gives 0, a target outside
        [0, V) has logprob NaN. Entropy is never negative. ``maximum`` and ``total`` are for ``token_stats_backward``;
        of a row of -inf only, total is 0.
        """

    def units_per_nat(self, transform: Transform, device: torch.device) -> tuple[float, float]:
        """Return how many units of ``KernelStats.maximum`` one nat of z is: up to ``HUGE`` units, and beyond."""

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

        ``stats`` are the forward pass's (its logprobs are not needed and may be anything), or where the logits are some
        columns of a row, the whole row's; a target below 0 is then in none of these columns. ``gradients`` (...) each,
        in any floating dtype and stride, None for 0; ``gradients.logprobs`` is None where ``targets`` is. Rows that are
        ignored, or whose gradients are all 0, get 0 and are not read.
        """

    def grpo_sweep(
        self, logits: Tensor, targets: Tensor, terms: TokenTerms, rule: LossRule, transform: Transform, *, out: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write the loss's gradient into ``out`` (may be the logits); return logprobs and entropy, as forward does.

        ``logits`` (..., V) with rows of adjacent elements; ``targets`` and the per-token tensors of ``terms`` (...),
        the latter of any stride. The coefficient of a row is ``token_loss``'s derivative there, for rules under which
        it depends on the row's own statistics alone (no ratio, and no sampler correction to be made, of sequences).
        """

    def token_loss(self, logprobs: Tensor, entropy: Tensor, terms: TokenTerms, rule: LossRule) -> TokenLoss:
        """Return loss, metrics and derivatives of tokens; the specification is ``backends.plain.token_loss``."""


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
        wanted: Sequence[bool],  # of hidden states, weight and bias
        dtype: torch.dtype,
        transform: Transform,
        into: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of hidden states, weight and bias in their dtypes; an empty tensor for an unwanted one.

        Where ``into`` is given, the weight's gradient is added to it, and an empty tensor is returned instead.
        """
