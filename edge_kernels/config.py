"""The two frozen configurations that the loss and the advantage functions take.

Names and meanings are TRL's where TRL has the option. Validation happens here, once, so that no kernel checks again.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, cast, get_args

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "geo_mean", "vespo"]
ImportanceLevel = Literal["token", "sequence"]
SamplerRatioMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
KLEstimator = Literal["k1", "k2", "k3", "abs"]
InjectedTreatment = Literal["credit", "mask", "sft", "shaped"]
MeanOver = Literal["group", "batch"]
ScaleRewards = Literal["group", "batch", "none"]


def _one_of(name: str, value: object, choices: object) -> None:
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def _number(
    name: str, value: Any, *, above: float | None = None, least: float | None = None, finite: bool = False
) -> None:
    """Require a real number (NaN is none, infinity is where it need not be finite), above or at least a bound."""
    bound = f" greater than {above}" if above is not None else f" of at least {least}" if least is not None else ""
    bad = isinstance(value, bool) or not isinstance(value, (int, float, Real)) or value != value  # Real: NumPy's too
    if bad or (above is not None and not value > above) or (least is not None and not value >= least):
        raise ValueError(f"{name} must be a number{bound}; got {value!r}")
    if finite and value in (float("inf"), float("-inf")):
        raise ValueError(f"{name} must be finite; got {value!r}")


def scale_of(scale_rewards: bool | str) -> ScaleRewards:
    """Return by whose standard deviation a group advantage is divided; True is the group's, False nobody's."""
    scale: Any = scale_rewards
    if isinstance(scale_rewards, bool):
        scale = "group" if scale_rewards else "none"
    _one_of("scale_rewards", scale, ScaleRewards)
    return cast(ScaleRewards, scale)


@dataclass(frozen=True)
class EDAConfig:
    """How an Entropy-Driven Advantage is formed (arXiv:2507.21848, eqs. 3, 6, 7).

    ``min_ratio``, ``max_ratio``  bounds of the normalized entropy P_hat (a response of entropy 0 would otherwise get an
                                  infinite weight); 0 and infinity restore the unbounded published form.
    ``preserve_scale``            rescale the weights of a group so that its mean absolute advantage is unchanged.
    ``mean_over``                 "group": P_hat is relative to the response's own group, as in the paper; "batch":
                                  relative to all responses passed, as in the published code.
    ``scale_rewards``             whose standard deviation of rewards divides the group advantage: "group", "batch" (all
                                  responses passed, arXiv:2508.08221) or "none". True is "group", False is "none".
    """

    min_ratio: float = 0.1
    max_ratio: float = 10.0
    preserve_scale: bool = False
    mean_over: MeanOver = "group"
    scale_rewards: bool | ScaleRewards = "group"

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale_rewards", scale_of(self.scale_rewards))
        _number("min_ratio", self.min_ratio, least=0)
        _number("max_ratio", self.max_ratio, above=0)
        if self.min_ratio > self.max_ratio:
            raise ValueError(f"min_ratio must not exceed max_ratio; got {self.min_ratio} > {self.max_ratio}")
        _one_of("mean_over", self.mean_over, MeanOver)


@dataclass(frozen=True)
class GRPOLossConfig:
    """Everything that decides the loss of a token besides the tensors; the formulas are in ``edge_kernels.reference``.

    ``loss_type``                  per-token objective and normalizer; ``edge_grpo_loss`` has the formulas of each.
    ``epsilon_low, epsilon_high``  clip range of the importance ratio; for "cispo" ``epsilon_high`` is the cap itself;
                                   for "geo_mean" they bound each token's log ratio.
    ``delta``                      upper bound of the unclipped ratio (two-sided clipping), None for none; of the losses
                                   that clip.
    ``sapo_temperature_pos, sapo_temperature_neg``  slopes of the gate that "sapo" has instead of clipping, for tokens
                                   with a positive advantage and for all others (arXiv:2511.20347).
    ``vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg``  exponent and decay of the weight w^k exp(lambda
                                   (1 - w)) that "vespo" gives to a response whose sequence ratio is w, for an
                                   advantage of at least 0 and for a negative one (arXiv:2602.10693).
    ``beta, use_bias_correction_kl``  weight of the KL penalty to the reference policy (the k3 estimator), and whether
                                   the estimate is multiplied by the importance ratio, so that its gradient is
                                   that of the KL divergence.
    ``importance_sampling_level``  "token", or "sequence" (GSPO: one length-normalized ratio per response).
    ``temperature, softcap, logit_scale``  the transformation of the logits; see ``token_stats``.
    ``max_completion_length``      the constant that "dr_grpo" divides by; required there.
    ``entropy_coef``               weight of the entropy bonus.
    ``top_entropy_quantile``       only this share of tokens, those of highest entropy, gets a policy gradient.
    ``sampler_ratio_cap, sampler_ratio_floor, sampler_ratio_mode``  correction of the mismatch between sampler and
                                   trainer, exp(old_logprobs - sampling_logprobs): truncated to or masked outside
                                   [floor, cap], by token or by sequence. None for the cap turns it off.
    ``off_policy_mask_threshold``  nats: a response with a negative advantage has no policy term where the mean over its
                                   tokens of (the sampler's log-probability, or else the old one, minus the current
                                   one) is greater (DeepSeek-V3.2, arXiv:2512.02556, eq. 9). None for no such mask.
    ``mask_truncated_completions``  whether responses that the length limit cut off leave the loss, as in DAPO.
    ``reward_kl_coef, reward_kl_penalty``  weight and estimator ("k1", "k2", "k3", "abs", as in verl) of the KL
                                   divergence to the reference policy that ``rewards`` are lessened by.
    ``injected``                   what a token the policy did not sample does: "credit" it like any other, "mask" it,
                                   "sft" (``sft_weight`` times its negative log-likelihood), "shaped" (its ratio becomes
                                   p / (p + ``shaped_gamma``), unclipped, as in LUFFY).
    """

    loss_type: LossType = "dapo"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    beta: float = 0.0
    use_bias_correction_kl: bool = True
    importance_sampling_level: ImportanceLevel = "token"
    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    max_completion_length: int | None = None
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0
    sampler_ratio_cap: float | None = None
    sampler_ratio_floor: float = 0.0
    sampler_ratio_mode: SamplerRatioMode = "token_truncate"
    off_policy_mask_threshold: float | None = None
    mask_truncated_completions: bool = False
    reward_kl_coef: float = 0.0
    reward_kl_penalty: KLEstimator = "k1"
    injected: InjectedTreatment = "credit"
    sft_weight: float = 1.0
    shaped_gamma: float = 0.1
    eda: EDAConfig = None  # type: ignore[assignment]  # EDAConfig(): torch.compile does not trace objects as defaults

    def __post_init__(self) -> None:
        eda: Any = self.eda
        if eda is None:
            object.__setattr__(self, "eda", EDAConfig())
        _one_of("loss_type", self.loss_type, LossType)
        _one_of("importance_sampling_level", self.importance_sampling_level, ImportanceLevel)
        _one_of("sampler_ratio_mode", self.sampler_ratio_mode, SamplerRatioMode)
        _one_of("injected", self.injected, InjectedTreatment)
        _one_of("reward_kl_penalty", self.reward_kl_penalty, KLEstimator)
        _number("reward_kl_coef", self.reward_kl_coef, least=0, finite=True)
        if self.off_policy_mask_threshold is not None:
            _number("off_policy_mask_threshold", self.off_policy_mask_threshold, above=0)
        _number("epsilon_low", self.epsilon_low, least=0)
        _number("epsilon_high", self.epsilon_high, least=0)
        if self.delta is not None:
            _number("delta", self.delta, above=1)
        _number("sapo_temperature_pos", self.sapo_temperature_pos, above=0, finite=True)
        _number("sapo_temperature_neg", self.sapo_temperature_neg, above=0, finite=True)
        for name in ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"):
            _number(name, getattr(self, name), least=0, finite=True)
        if self.loss_type == "vespo" and self.sampler_ratio_mode.startswith("sequence"):
            raise ValueError(
                "loss_type='vespo' has a weight for sequences in which the sampler's ratios of tokens are factors; got "
                f"sampler_ratio_mode={self.sampler_ratio_mode!r}; use 'token_truncate' or 'token_mask'"
            )
        _number("beta", self.beta, least=0)
        _number("temperature", self.temperature, above=0, finite=True)
        if self.softcap is not None:
            _number("softcap", self.softcap, above=0, finite=True)
        _number("logit_scale", self.logit_scale, finite=True)
        _number("entropy_coef", self.entropy_coef)
        _number("sft_weight", self.sft_weight, least=0)
        _number("shaped_gamma", self.shaped_gamma, above=0)
        _number("sampler_ratio_floor", self.sampler_ratio_floor, least=0)
        if self.sampler_ratio_cap is not None:
            _number("sampler_ratio_cap", self.sampler_ratio_cap, above=0)
            if self.sampler_ratio_floor > self.sampler_ratio_cap:
                raise ValueError(
                    f"sampler_ratio_floor must be at most sampler_ratio_cap = {self.sampler_ratio_cap!r}; "
                    f"got {self.sampler_ratio_floor!r}"
                )
        if not 0 < self.top_entropy_quantile <= 1:
            raise ValueError(f"top_entropy_quantile must lie in (0, 1]; got {self.top_entropy_quantile!r}")
        if self.max_completion_length is not None and self.max_completion_length < 1:
            raise ValueError(f"max_completion_length must be at least 1; got {self.max_completion_length!r}")
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError("loss_type='dr_grpo' divides by max_completion_length; set it to the generation limit")
        if not isinstance(self.eda, EDAConfig):
            raise TypeError(f"eda must be an EDAConfig; got {type(self.eda).__name__}")
