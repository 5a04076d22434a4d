"""Calls of the loss kernels, one sweep over the logits or tokens alone, and what must come out of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cuda_on_cpu.harness import Buffer, Call, Device
from cuda_on_cpu.matrices import (
    CACHELESS,
    DTYPES,
    HUGE,
    KEEPS_ALL,
    KEEPS_NONE,
    KEEPS_SOME,
    MANY,
    NAN,
    ONE,
    Case,
    Matrix,
    close,
    fresh,
    matrix,
    per_row,
    special,
)
from cuda_on_cpu.stats_cases import check_gradient, exact_gradient, exact_stats
from edge_kernels.backends.plain import token_loss
from edge_kernels.config import GRPOLossConfig
from edge_kernels.contract import METRICS, LossRule, TokenTerms
from edge_kernels.reference import MAX_KL_LOG_RATIO, MAX_LOG_RATIO


def rule_numbers(rule: LossRule) -> tuple[list[int], list[float]]:
    """Return the rule's integers, and its numbers in the order of their fields."""
    values = rule._asdict()
    integers = (
        "objective",
        "ratio_of_sequence",
        "bias_corrects_kl",
        "sampler_of_sequence",
        "sampler_masks",
        "injected",
    )
    return [int(values.pop(name)) for name in integers], [*values.values(), MAX_LOG_RATIO, MAX_KL_LOG_RATIO]


def make_terms(
    shape: tuple[int, ...], config: GRPOLossConfig, *, seed: int, current: Tensor, mask: Tensor
) -> TokenTerms:
    """Return terms of every kind that the configuration has a use for, ratios on both sides of every limit."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    finite = current.nan_to_num(nan=-1.0, neginf=-1.0).float()
    old = finite + normal(0.4)
    old[..., ::7] = NAN  # no record
    sampling = finite + normal(0.5)
    sampling[..., ::5] = NAN
    advantages = normal(1.0)
    advantages[..., ::11] = 0.0
    has_sampler = config.sampler_ratio_cap is not None
    is_known = has_sampler and config.sampler_ratio_mode == "token_truncate" and config.beta > 0
    return TokenTerms(
        mask=mask,
        weight=torch.rand(shape, generator=generator) + 0.1,
        advantages=advantages,
        old_logprobs=old if config.epsilon_low != 0.3 else None,
        ref_logprobs=finite + normal(0.3) if config.beta > 0 else None,
        sampler_ratio=torch.rand(shape, generator=generator) * 2 if is_known else None,
        sampling_logprobs=sampling if has_sampler and not is_known else None,
        injected=torch.rand(shape, generator=generator) < 0.4 if config.injected in ("sft", "shaped") else None,
        entropy_threshold=torch.tensor(1.5) if config.top_entropy_quantile < 1 else None,
        bonus_weight=torch.tensor(0.03) if config.entropy_coef != 0 else None,
    )


CONFIGS = {
    "plain": GRPOLossConfig(loss_type="dapo"),
    "two-sided, KL": GRPOLossConfig(delta=1.3, beta=0.1, epsilon_high=0.28),
    "no records": GRPOLossConfig(epsilon_low=0.3),
    "cispo": GRPOLossConfig(loss_type="cispo", epsilon_high=1.2, beta=0.04),
    "sapo": GRPOLossConfig(loss_type="sapo", sapo_temperature_neg=2.5, beta=0.04),
    "bonus, quantile": GRPOLossConfig(entropy_coef=0.03, top_entropy_quantile=0.8),
    "sft": GRPOLossConfig(injected="sft", sft_weight=0.7, beta=0.1),
    "shaped": GRPOLossConfig(injected="shaped", shaped_gamma=0.2),
    "sampler truncates": GRPOLossConfig(sampler_ratio_cap=1.5, sampler_ratio_floor=0.5),
    "sampler masks": GRPOLossConfig(sampler_ratio_cap=1.5, sampler_ratio_mode="token_mask", entropy_coef=-0.01),
    "sampler known": GRPOLossConfig(sampler_ratio_cap=1.5, beta=0.05),
}
SEQUENCE_CONFIGS = {
    "gspo": GRPOLossConfig(importance_sampling_level="sequence"),
    "gspo, shaped, KL": GRPOLossConfig(importance_sampling_level="sequence", injected="shaped", beta=0.1, delta=1.02),
    "gspo, cispo": GRPOLossConfig(importance_sampling_level="sequence", loss_type="cispo", epsilon_high=1.01),
    "gmpo": GRPOLossConfig(loss_type="geo_mean", beta=0.1),
    "vespo": GRPOLossConfig(loss_type="vespo", sampler_ratio_cap=1.5, beta=0.1),
    "sampler truncates": GRPOLossConfig(sampler_ratio_cap=1.5, sampler_ratio_mode="sequence_truncate"),
    "sampler masks": GRPOLossConfig(
        sampler_ratio_cap=3.0, sampler_ratio_mode="sequence_mask", importance_sampling_level="sequence"
    ),
}


def terms_buffers(terms: TokenTerms) -> dict[str, Buffer | None]:
    bytes_or_floats = {
        name: value.to(torch.uint8) if value is not None and value.dtype == torch.bool else value
        for name, value in terms._asdict().items()
    }
    return {name: per_row(value) for name, value in bytes_or_floats.items()}


def double_terms(terms: TokenTerms) -> TokenTerms:
    values = {
        name: value.double() if value is not None and value.is_floating_point() else value
        for name, value in terms._asdict().items()
    }
    return TokenTerms(**values)


def sweep_case(
    name: str,
    given: Matrix,
    config: GRPOLossConfig,
    device: Device,
    *,
    inplace: bool = True,
    out_stride: int | None = None,
    out_offset: int | None = None,
) -> Case:
    rows = len(given.logits)
    rule = LossRule.of(config)
    logprobs, entropy, _ = exact_stats(given)
    assert given.targets is not None
    mask = given.targets != given.ignore_index
    terms = make_terms((rows,), config, seed=rows, current=logprobs, mask=mask)
    integers, numbers = rule_numbers(rule)
    out_stride = given.stride if inplace or out_stride is None else out_stride
    call = Call(
        "sweep",
        device,
        [*given.integers(), out_stride, *integers],
        [*given.numbers(), *numbers],
        {
            "logits": given.buffer(),
            "targets": per_row(given.targets),
            "grad_logits": None if inplace else given.buffer(filled=False, stride=out_stride, offset=out_offset),
            **terms_buffers(terms),
            "logprobs": fresh(rows),
            "entropy": fresh(rows),
        },
    )

    def check(result: dict[str, Tensor]) -> None:
        close(result["logprobs"], logprobs, rtol=1e-6, atol=1e-5, name="logprobs")
        close(result["entropy"], entropy, rtol=1e-5, atol=1e-5, name="entropy")
        part = token_loss(logprobs, entropy, double_terms(terms), rule)
        d_entropy = None if terms.bonus_weight is None else part.d_entropy
        incoming = [part.d_logprobs, d_entropy, None]
        memory = result["logits" if inplace else "grad_logits"]
        check_gradient(given.rows_of(memory, out_stride), exact_gradient(given, incoming), incoming)

    return Case(f"sweep {name}", call, check, given.logits.dtype)


def token_loss_case(name: str, sequences: int, length: int, config: GRPOLossConfig, *, with_nan: bool = False) -> Case:
    shape = (sequences, length)
    generator = torch.Generator().manual_seed(sequences * 1000 + length)
    logprobs = -torch.rand(shape, generator=generator) * 3
    entropy = torch.rand(shape, generator=generator) * 4
    mask = torch.rand(shape, generator=generator) < 0.8
    if sequences > 2:
        mask[1] = False
    terms = make_terms(shape, config, seed=length, current=logprobs, mask=mask)
    logprobs[~mask], entropy[~mask] = NAN, NAN  # what no loss is taken of is not looked at
    if terms.old_logprobs is not None and mask.numel() > 3:
        terms.old_logprobs[0, 1] = logprobs[0, 1] - 100.0  # a ratio beyond MAX_LOG_RATIO
    if with_nan:
        mask[0, 0], logprobs[0, 0] = True, NAN
    rule = LossRule.of(config)
    integers, numbers = rule_numbers(rule)
    call = Call(
        "token_loss",
        MANY,
        [sequences, length, *integers],
        numbers,
        {
            "given_logprobs": Buffer(logprobs),
            "given_entropy": Buffer(entropy),
            **terms_buffers(terms),
            "loss": fresh(1),
            "metrics": fresh(len(METRICS)),
            "d_logprobs": fresh(*shape),
            "d_entropy": fresh(*shape),
        },
    )

    def check(result: dict[str, Tensor]) -> None:
        exact = token_loss(logprobs.double(), entropy.double(), double_terms(terms), rule)
        close(result["loss"][0], exact.loss, rtol=1e-6, atol=1e-6, name="loss")
        close(result["metrics"], exact.metrics, rtol=1e-6, atol=1e-6, name="metrics")
        close(result["d_logprobs"], exact.d_logprobs, rtol=1e-6, atol=1e-7, name="d_logprobs")
        close(result["d_entropy"], exact.d_entropy, rtol=1e-6, atol=1e-7, name="d_entropy")

    return Case(f"token_loss {name}", call, check)


def grpo_sweep_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        short = str(dtype).removeprefix("torch.")
        for vocab, offset in ((1, 0), (7, 3), (1000, 1), (4097, 5)):
            given = matrix(dtype, 9, vocab, seed=vocab, offset=offset, stride=vocab + 3)
            config = CONFIGS["bonus, quantile" if vocab == 1000 else "plain"]
            yield sweep_case(f"{short} V={vocab} offset={offset}", given, config, ONE, inplace=vocab != 7)
        # Whole rows of which shared memory holds all, a part, nothing; and rows split over blocks.
        devices = {"all": KEEPS_ALL, "some": KEEPS_SOME, "none": KEEPS_NONE, "cacheless": CACHELESS, "split": MANY}
        for name, device in devices.items():
            given = matrix(dtype, 3, 17003, seed=17, offset=1)
            yield sweep_case(f"{short} keeps {name}", given, CONFIGS["plain"], device, inplace=name != "some")
        given = matrix(dtype, 5, 517, seed=4, offset=1, stride=520)
        yield sweep_case(
            f"{short} other alignment", given, CONFIGS["plain"], ONE, inplace=False, out_stride=518, out_offset=0
        )
        for vocab, device, sharing in ((1000, ONE, "whole"), (17000, MANY, "split")):
            given = special(dtype, vocab, stride=vocab + 1)
            yield sweep_case(f"{short} special, {sharing}", given, CONFIGS["bonus, quantile"], device)
        given = matrix(dtype, 4, 771, seed=5, stride=773, scale=20.0, softcap=30.0, temperature=0.8)
        yield sweep_case(f"{short} soft cap", given, CONFIGS["plain"], ONE)
    for name, config in CONFIGS.items():
        given = matrix(torch.bfloat16, 24, 130, seed=24)
        yield sweep_case(name, given, config, ONE)
    for device, sharing in ((ONE, "whole"), (Device(multiprocessors=512), "split")):
        given = matrix(torch.bfloat16, 3, 100, seed=10, stride=HUGE + 8)
        yield sweep_case(f"beyond 2^32 elements, {sharing}", given, CONFIGS["plain"], device)
    yield sweep_case("no row", matrix(torch.bfloat16, 0, 10, seed=0), CONFIGS["plain"], ONE)


def token_loss_cases() -> Iterator[Case]:
    for name, config in {**CONFIGS, **SEQUENCE_CONFIGS}.items():
        yield token_loss_case(name, 4, 300, config)
    for sequences, length in ((1, 1), (3, 7), (2, 1025), (1, 2048), (0, 5), (5, 0)):
        for name, config in (("plain", CONFIGS["plain"]), ("gspo", SEQUENCE_CONFIGS["gspo"])):
            yield token_loss_case(f"{name} {sequences} x {length}", sequences, length, config)
    yield token_loss_case("NaN", 3, 40, CONFIGS["plain"], with_nan=True)
