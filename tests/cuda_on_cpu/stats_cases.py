"""Calls of the statistics' kernels, forward and backward, and what must come out of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from cuda_on_cpu.harness import Buffer, Call, Device
from cuda_on_cpu.matrices import (
    DTYPES,
    HUGE,
    MANY,
    NAN,
    ONE,
    Case,
    Matrix,
    close,
    fresh,
    matrix,
    per_row,
    repeated,
    some,
    special,
)
from edge_kernels import contract, reference
from edge_kernels.backends import compiled
from edge_kernels.contract import Transform

# Relative error of a gradient's elements: half an ulp of the dtype, and what the exponential's argument loses.
RELATIVE = {torch.float32: 1e-4, torch.bfloat16: 2**-8, torch.float16: 2**-10}


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
            "maximum": fresh(rows),
            "total": fresh(rows),
        },
    )

    def check(result: dict[str, Tensor]) -> None:
        logprobs, entropy, logsumexp = exact_stats(given)
        close(result["entropy"], entropy, rtol=1e-5, atol=1e-5, name="entropy")
        assert not (result["entropy"] < 0).any(), "negative entropy"
        close(result["logsumexp"], logsumexp, rtol=1e-6, atol=1e-5, name="logsumexp")
        # What the backward pass makes p of. z is in powers of two there, its slope as exact as float32 can hold it.
        is_empty = (reference.transform_logits(given.exact, **given.transform) == -math.inf).all(-1)
        if given.targets is not None:
            is_empty = is_empty | (given.targets == given.ignore_index)
        assert torch.equal(result["total"] == 0, is_empty), "total is 0 elsewhere than in rows without a finite logit"
        fine, coarse = compiled.units_per_nat(Transform(**given.reference()), torch.device("cuda"))
        maximum = result["maximum"].double()
        nats = torch.where(maximum.abs() > contract.HUGE, maximum / coarse, maximum / fine)
        pair = nats + result["total"].double().log().masked_fill(result["total"] == 0, 0)
        close(pair, logsumexp, rtol=1e-7, atol=1e-5, name="maximum and total")
        if given.targets is not None:
            close(result["logprobs"], logprobs, rtol=1e-6, atol=1e-5, name="logprobs")
            assert not (result["logprobs"] > 0).any(), "positive log-probability"

    return Case(f"forward {name}", call, check, given.logits.dtype)


def sums_of(given: Matrix) -> tuple[Tensor, Tensor]:
    """Return each row's maximum and total as the kernels would: of z in powers of two, by a slope of float32."""
    temperature, softcap, logit_scale = (given.transform[n] for n in ("temperature", "softcap", "logit_scale"))
    is_linear = softcap is None and logit_scale > 0
    slope = torch.tensor((logit_scale if is_linear else 1) / temperature / math.log(2))  # float32
    y = given.exact if is_linear else reference.transform_logits(given.exact, 1.0, softcap, logit_scale)
    u = y * slope.double()
    maximum = u.amax(-1).float()
    return maximum, (u - maximum[:, None]).exp2().sum(-1).float()


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
    _, entropy, _ = exact_stats(given)
    incoming = [some(rows, 100 + i) if wanted else None for i, wanted in enumerate(grads)]
    if given.targets is None:
        incoming[0] = None
    for gradient in incoming:
        if gradient is not None and rows > 5:
            gradient[rows - 2] = 0.0  # a row without gradient is not read
    maximum, total = sums_of(given)
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
            "maximum": Buffer(maximum),
            "total": Buffer(total),
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
