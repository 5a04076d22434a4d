"""Calls of the CUDA kernels and what must come out of them, from plain PyTorch in float64.

Every output starts as NaN, and so does what lies between the rows of a matrix with a stride, and around it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cuda_on_cpu.harness import Buffer, Call, Device
from edge_kernels import reference
from edge_kernels.backends.plain import token_loss
from edge_kernels.config import GRPOLossConfig
from edge_kernels.contract import LossRule, TokenTerms

IGNORED = -100
NAN, INF = float("nan"), float("inf")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

HUGE = 2**31  # a stride from which on the memory between rows is not filled

# Relative error of a gradient's elements: half an ulp of the dtype, and what the exponential's argument loses.
RELATIVE = {torch.float32: 1e-4, torch.bfloat16: 2**-8, torch.float16: 2**-10}

# One row over many blocks; whole rows, one block after the other; whole rows of which shared memory holds all, or a
# part, or nothing.
MANY = Device(multiprocessors=64)
ONE = Device(multiprocessors=1)
KEEPS_ALL = Device(multiprocessors=1, shared_bytes_per_block=160 << 10, shared_bytes_per_multiprocessor=160 << 10)
KEEPS_SOME = Device(multiprocessors=1, shared_bytes_per_block=12 << 10, shared_bytes_per_multiprocessor=16 << 10)
KEEPS_NONE = Device(multiprocessors=1, shared_bytes_per_block=1 << 10, shared_bytes_per_multiprocessor=16 << 10)
CACHELESS = replace(KEEPS_SOME, l2_bytes=0)  # the hints for matrices that exceed the cache, and no split of the rest


@dataclass
class Case:
    name: str
    call: Call
    check: Callable[[dict[str, Tensor]], None]  # of the buffers after the call
    dtype: torch.dtype | None = None  # of the logits


def run_checks(cases: list[Case], results: list[dict[str, Tensor]]) -> None:
    for case, result in zip(cases, results, strict=True):
        try:
            case.check(result)
        except AssertionError as error:
            raise AssertionError(f"{case.name}: {error}") from error


@dataclass
class Matrix:
    """Logits (rows, V) in memory that holds more: ``offset`` elements before, ``stride`` from row to row."""

    logits: Tensor
    targets: Tensor | None
    stride: int
    offset: int
    transform: dict[str, Any]
    ignore_index: int = IGNORED

    @property
    def exact(self) -> Tensor:
        return self.logits.double()

    def buffer(self, *, filled: bool = True, stride: int | None = None, offset: int | None = None) -> Buffer:
        """Return the memory, with NaN wherever no logit is."""
        stride = self.stride if stride is None else stride
        offset = self.offset if offset is None else offset
        rows, vocab = self.logits.shape
        if stride >= HUGE:
            content = self.logits if filled else torch.full_like(self.logits, NAN)
            return Buffer(content, spread=stride * self.logits.element_size())
        memory = torch.full((max(0, (rows - 1) * stride + vocab),), NAN, dtype=self.logits.dtype)
        for i, row in enumerate(self.logits if filled else []):
            memory[i * stride : i * stride + vocab] = row
        return Buffer(memory, offset * self.logits.element_size())

    def rows_of(self, memory: Tensor, stride: int | None = None) -> Tensor:
        """Return the matrix in such memory, and check that between its rows nothing was written."""
        stride = self.stride if stride is None else stride
        if stride >= HUGE:
            return memory
        rows, vocab = self.logits.shape
        matrix = memory.as_strided((rows, vocab), (stride, 1)).clone()
        rest = memory.clone()
        rest.as_strided((rows, vocab), (stride, 1)).fill_(NAN)
        assert rest.isnan().all(), "written between the rows"
        return matrix

    def integers(self) -> list[int]:
        return [DTYPES[self.logits.dtype], self.stride, *self.logits.shape, self.ignore_index]

    def numbers(self) -> list[float]:
        softcap = self.transform["softcap"] or 0.0
        return [1 / self.transform["temperature"], softcap, self.transform["logit_scale"]]

    def reference(self) -> dict[str, Any]:
        return {**self.transform, "ignore_index": self.ignore_index}


def matrix(
    dtype: torch.dtype,
    rows: int,
    vocab: int,
    *,
    seed: int,
    stride: int | None = None,
    offset: int = 0,
    scale: float = 4.0,
    shift: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    targets: bool = True,
) -> Matrix:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * scale + shift).to(dtype)
    chosen = torch.randint(vocab, (rows,), generator=generator) if targets else None
    transform = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    return Matrix(logits, chosen, vocab if stride is None else stride, offset, transform)


def special(dtype: torch.dtype, vocab: int, *, seed: int = 0, **options: Any) -> Matrix:
    """Rows that each have something: forbidden tokens, a forbidden target, NaN, infinity, certainty, no row at all."""
    out = matrix(dtype, 12, vocab, seed=seed, **options)
    assert out.targets is not None
    x, targets = out.logits, out.targets
    x[0, ::3] = -INF
    targets[0] = 1
    x[1] = -INF  # nothing is allowed
    x[2] = -INF
    x[2, vocab // 2] = 1.0  # one token is
    targets[2] = vocab // 2
    targets[3] = IGNORED
    x[3] = NAN
    x[4, vocab - 1] = NAN
    x[5, vocab // 3] = INF
    x[6] = -1e4 if dtype != torch.float16 else -1e3
    x[6, 0] = 1e4 if dtype != torch.float16 else 1e3  # one-hot
    targets[6] = 0
    x[7] = 0.0  # uniform
    x[8, 5] = -INF
    targets[8] = 5
    targets[9] = vocab  # out of range, as row 10's
    targets[10] = -1
    x[11] = x[11, 0]
    return out


def some(number: int, seed: int) -> Tensor:
    return torch.randn(number, generator=torch.Generator().manual_seed(seed))


def fresh(*shape: int, dtype: torch.dtype = torch.float32) -> Buffer:
    return Buffer(torch.full(shape, NAN, dtype=dtype))


def per_row(tensor: Tensor | None) -> Buffer | None:
    return None if tensor is None else Buffer(tensor)


# --- token_stats ------------------------------------------------------------------------------------------------------


def exact_stats(given: Matrix) -> tuple[Tensor, Tensor, Tensor]:
    """Return logprobs, entropy and logsumexp in float64; NaN logprobs for targets out of range."""
    targets = given.targets
    if targets is None:
        return tuple(reference.token_stats(given.exact, None, **given.reference()))
    wrong = ((targets < 0) | (targets >= given.logits.shape[1])) & (targets != given.ignore_index)
    logprobs, *others = reference.token_stats(given.exact, targets.masked_fill(wrong, 0), **given.reference())
    return logprobs.masked_fill(wrong, NAN), others[0], others[1]


def forward_case(name: str, given: Matrix, device: Device) -> Case:
    rows = len(given.logits)
    call = Call(
        "forward",
        device,
        given.integers(),
        given.numbers(),
        {
            "logits": given.buffer(),
            "targets": per_row(given.targets),
            "logprobs": None if given.targets is None else fresh(rows),
            "entropy": fresh(rows),
            "logsumexp": fresh(rows),
            "logsumexp_low": fresh(rows),
        },
    )

    def check(result: dict[str, Tensor]) -> None:
        logprobs, entropy, logsumexp = exact_stats(given)
        close(result["entropy"], entropy, rtol=1e-5, atol=1e-5, name="entropy")
        assert not (result["entropy"] < 0).any(), "negative entropy"
        close(result["logsumexp"], logsumexp, rtol=1e-6, atol=1e-5, name="logsumexp")
        exact_sum = result["logsumexp"].double() + result["logsumexp_low"].double()
        # A soft cap's z is as exact as float32 can hold it.
        rtol = 1e-9 if given.transform["softcap"] is None else 1e-7
        close(exact_sum, logsumexp, rtol=rtol, atol=1e-5, name="logsumexp and its low part")
        if given.targets is not None:
            close(result["logprobs"], logprobs, rtol=1e-6, atol=1e-5, name="logprobs")
            assert not (result["logprobs"] > 0).any(), "positive log-probability"

    return Case(f"forward {name}", call, check, given.logits.dtype)


def backward_case(
    name: str,
    given: Matrix,
    device: Device,
    *,
    grads: tuple[bool, bool, bool] = (True, True, True),
    inplace: bool = False,
    out_stride: int | None = None,
    out_offset: int | None = None,
) -> Case:
    rows = len(given.logits)
    _, entropy, logsumexp = exact_stats(given)
    incoming = [some(rows, 100 + i) if wanted else None for i, wanted in enumerate(grads)]
    if given.targets is None:
        incoming[0] = None
    for gradient in incoming:
        if gradient is not None and rows > 5:
            gradient[rows - 2] = 0.0  # a row without gradient is not read
    high = logsumexp.float()
    out_stride = given.stride if inplace or out_stride is None else out_stride
    call = Call(
        "backward",
        device,
        [*given.integers(), out_stride],
        given.numbers(),
        {
            "logits": given.buffer(),
            "targets": per_row(given.targets),
            "grad_logits": None if inplace else given.buffer(filled=False, stride=out_stride, offset=out_offset),
            "entropy": Buffer(entropy.float()),
            "logsumexp": Buffer(high),
            "logsumexp_low": Buffer((logsumexp - high.double()).float()),
            "grad_logprobs": per_row(incoming[0]),
            "grad_entropy": per_row(incoming[1]),
            "grad_logsumexp": per_row(incoming[2]),
        },
    )

    def check(result: dict[str, Tensor]) -> None:
        exact = exact_gradient(given, incoming)
        memory = result["logits"] if inplace else result["grad_logits"]
        check_gradient(given.rows_of(memory, out_stride), exact, incoming)

    return Case(f"backward {name}", call, check, given.logits.dtype)


def exact_gradient(given: Matrix, incoming: list[Tensor | None]) -> Tensor:
    """Return the gradient in float64. A target out of range gets none; reference.py does not take one."""
    targets = given.targets
    if targets is not None:
        wrong = ((targets < 0) | (targets >= given.logits.shape[1])) & (targets != given.ignore_index)
        if wrong.any():
            parts = [given.exact[wrong], None, None]
            parts += [None if g is None else g[wrong].double() for g in incoming]
            # As if the target were a column of its own: what is left of its gradient is -p.
            x, _, _, logprob, entropy, logsumexp = parts
            lacking = None if logprob is None else -logprob
            total = lacking if logsumexp is None else logsumexp if lacking is None else logsumexp + lacking
            of_wrong = reference.token_stats_backward(x, None, None, entropy, total, **given.reference())
            right = replace(given, targets=targets.masked_fill(wrong, 0))
            exact = exact_gradient(right, incoming)
            exact[wrong] = of_wrong
            return exact
    doubles = [None if g is None else g.double() for g in incoming]
    return reference.token_stats_backward(given.exact, targets, *doubles, **given.reference())


def check_gradient(actual: Tensor, exact: Tensor, incoming: list[Tensor | None]) -> None:
    """Compare each element by its own size. Terms that cancel leave 1e-7 of what came in and of the row's largest."""
    smallest = {torch.float32: 1e-37, torch.bfloat16: 1e-37, torch.float16: 1e-7}[actual.dtype]
    present = [gradient.double().abs().nan_to_num() for gradient in incoming if gradient is not None]
    came_in = torch.stack(present).sum(0) if present else torch.zeros(len(exact), dtype=torch.float64)
    atol = smallest + 1e-7 * came_in[:, None]
    if exact.numel():
        atol = atol + 1e-7 * exact.abs().nan_to_num(posinf=0.0).amax(-1, keepdim=True)
    close(actual, exact, rtol=RELATIVE[actual.dtype], atol=atol, name="gradient")


def close(actual: Tensor, exact: Tensor, *, rtol: float, atol: float | Tensor, name: str) -> None:
    """Compare in float64, NaN with NaN and infinities with themselves."""
    actual, exact = actual.double(), exact.double()
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}"
    same_special = torch.where(exact.isnan(), actual.isnan(), actual == exact)
    is_close = (actual - exact).abs() <= atol + rtol * exact.abs()
    fine = torch.where(exact.isfinite(), is_close, same_special)
    if not fine.all():
        at = tuple(int(i) for i in (~fine).nonzero()[0])
        count = int((~fine).sum())
        raise AssertionError(
            f"{name}: {count} of {fine.numel()} wrong, first at {at}: {actual[at].item()} for {exact[at].item()}"
        )


# --- the one-sweep loss -----------------------------------------------------------------------------------------------


def rule_numbers(rule: LossRule) -> tuple[list[int], list[float]]:
    options = rule_options(rule)
    integers = [int(options["cispo"]), int(options["sampler_masks"]), options["injected_treatment"]]
    names = ("epsilon_low", "epsilon_high", "delta", "beta", "sampler_cap", "sampler_floor")
    return integers, [options[name] for name in (*names, "sft_weight", "shaped_gamma", "max_log_ratio")]


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
    "sampler truncates": GRPOLossConfig(sampler_ratio_cap=1.5, sampler_ratio_mode="sequence_truncate"),
    "sampler masks": GRPOLossConfig(
        sampler_ratio_cap=3.0, sampler_ratio_mode="sequence_mask", importance_sampling_level="sequence"
    ),
}


def terms_buffers(terms: TokenTerms) -> dict[str, Buffer | None]:
    names = ("weight", "advantages", "old_logprobs", "ref_logprobs", "sampler_ratio", "sampling_logprobs")
    values = {name: per_row(getattr(terms, name)) for name in names}
    values["injected"] = None if terms.injected is None else Buffer(terms.injected.to(torch.uint8))
    values["entropy_threshold"] = per_row(terms.entropy_threshold)
    values["bonus_weight"] = per_row(terms.bonus_weight)
    return values


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


# --- the token-level loss ---------------------------------------------------------------------------------------------


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
    of_sequence = config.sampler_ratio_cap is not None and config.sampler_ratio_mode.startswith("sequence")
    call = Call(
        "token_loss",
        MANY,
        [sequences, length, int(rule.level == "sequence"), int(of_sequence), *integers],
        numbers,
        {
            "given_logprobs": Buffer(logprobs),
            "given_entropy": Buffer(entropy),
            "mask": Buffer(mask.to(torch.uint8)),
            **terms_buffers(terms),
            "loss": fresh(1),
            "metrics": fresh(10),
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


# --- all of them ------------------------------------------------------------------------------------------------------


def token_stats_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        short = str(dtype).removeprefix("torch.")
        # 1: no packet; 7: fewer than one; 1000 and 4097: odd strides put every alignment into one matrix.
        for vocab, offset in ((1, 0), (1, 1), (7, 3), (1000, 0), (1000, 1), (4097, 5)):
            given = matrix(dtype, 9, vocab, seed=vocab, offset=offset, stride=vocab + 3)
            name = f"{short} V={vocab} offset={offset}"
            yield forward_case(name, given, ONE)
            yield backward_case(name, given, ONE, inplace=offset > 0)
        # One row over several blocks, aligned and not.
        for rows, offset in ((1, 0), (2, 1)):
            given = matrix(dtype, rows, 50257, seed=rows, offset=offset)
            yield forward_case(f"{short} split rows={rows}", given, MANY)
            yield backward_case(f"{short} split rows={rows}", given, MANY, inplace=offset > 0)
        for vocab, device, sharing in ((1000, ONE, "whole"), (17000, MANY, "split")):
            given = special(dtype, vocab, stride=vocab + 1)
            yield forward_case(f"{short} special, {sharing}", given, device)
            yield backward_case(f"{short} special, {sharing}", given, device, inplace=True)
        shift = 1e4 if dtype != torch.float16 else 1e3
        given = matrix(dtype, 3, 1003, seed=3, shift=shift, scale=40.0)
        yield forward_case(f"{short} offset {shift}", given, ONE)
        yield backward_case(f"{short} offset {shift}", given, ONE)
        # A gradient that is aligned differently from its logits.
        given = matrix(dtype, 3, 515, seed=4, offset=1, stride=520)
        yield backward_case(f"{short} other alignment", given, ONE, out_stride=517, out_offset=0)
        for options in ({"temperature": 0.7, "logit_scale": 0.5}, {"softcap": 30.0}, {"logit_scale": -1.3}):
            given = matrix(dtype, 3, 771, seed=5, stride=773, scale=20.0, **options)
            yield forward_case(f"{short} {options}", given, ONE)
            yield backward_case(f"{short} {options}", given, ONE, inplace=True)
    given = special(torch.bfloat16, 600, softcap=5.0, temperature=0.5)
    yield forward_case("special, soft cap", given, ONE)
    given = matrix(torch.bfloat16, 3, 300, seed=6, softcap=2e4, scale=3e3)
    yield forward_case("a large soft cap", given, ONE)
    given = matrix(torch.float32, 4, 130, seed=7, targets=False)
    yield forward_case("no targets", given, ONE)
    yield backward_case("no targets", given, ONE)
    for grads in itertools.product((True, False), repeat=3):
        given = matrix(torch.bfloat16, 3, 130, seed=8)
        yield backward_case(f"gradients {grads}", given, ONE, grads=grads)
    # The third row begins beyond 2^32 elements.
    given = matrix(torch.bfloat16, 3, 100, seed=10, stride=HUGE + 8)
    yield forward_case("beyond 2^32 elements", given, ONE)
    yield backward_case("beyond 2^32 elements", given, ONE, inplace=True)
    # One row repeated by a stride of 0; no row.
    yield forward_case("stride 0", repeated(torch.float16, 5, 129), ONE)
    yield forward_case("no row", matrix(torch.bfloat16, 0, 10, seed=0), ONE)


def repeated(dtype: torch.dtype, rows: int, vocab: int) -> Matrix:
    given = matrix(dtype, rows, vocab, seed=9, stride=0)
    given.logits[:] = given.logits[-1]
    return given


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


ALL = {"token_stats": token_stats_cases, "grpo_sweep": grpo_sweep_cases, "token_loss": token_loss_cases}
