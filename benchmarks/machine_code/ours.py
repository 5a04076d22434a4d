"""Our GPU kernels: launches of the Triton kernels by their own launchers, in the shapes of peers.py; the CUDA kernels.

A launch is a call of the backend's functions (edge_kernels/contract.py) on fake tensors, as ops call them. No kernel's
arguments are named here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine_code import aot
from benchmarks.machine_code.peers import HIDDEN, SEQUENCES, TEMPERATURE, TOKENS, VOCAB
from edge_kernels import use_backend
from edge_kernels.config import GRPOLossConfig
from edge_kernels.contract import LossRule, StatsGradients, TokenTerms, Transform
from edge_kernels.ops import linear_grpo_loss, linear_token_stats
from edge_kernels.ops.head import Head
from edge_kernels.ops.head_plan import COLUMNS, TILES, use_way

SHAPE = SEQUENCES, TOKENS
ROWS = SEQUENCES * TOKENS
TILES_BUDGET = 2**31  # several tiles of that many rows
FEW_ROWS = 8  # too few to fill a GPU: a row is split over programs
TRANSFORM = Transform(TEMPERATURE, None, 1.0, -100)
CAPPED, NEGATIVE = TRANSFORM._replace(softcap=30.0), TRANSFORM._replace(logit_scale=-1.0)


def _per_token(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(ROWS, dtype=dtype, device="cuda")


def _scalar() -> Tensor:
    return torch.empty((), device="cuda")


def _terms(**present: Tensor) -> TokenTerms:
    absent = dict.fromkeys(TokenTerms._fields)
    always = {"mask": _per_token(torch.bool), "weight": _scalar().expand(ROWS), "advantages": _per_token()}
    return TokenTerms(**{**absent, **always, **present})  # type: ignore[arg-type]


def _in_sequences(terms: TokenTerms) -> TokenTerms:
    values = terms._asdict().items()
    return terms._replace(**{name: value.view(SHAPE) for name, value in values if value is not None and value.dim()})


@contextmanager
def _triton_backend() -> Iterator[Any]:
    """The backend's module, with no device cached before or after."""
    from edge_kernels.backends import triton as backend
    from edge_kernels.backends.triton import tuning

    tuning._gpu.cache_clear()
    try:
        yield backend
    finally:
        tuning._gpu.cache_clear()


def triton_logits(architecture: int, dtype: torch.dtype = torch.bfloat16, vocab: int = VOCAB) -> None:
    """The statistics and their gradient, the one-sweep loss, and the statistics of so few rows that each is split."""
    logits, targets = torch.empty(ROWS, vocab, dtype=dtype, device="cuda"), _per_token(torch.int64)
    gradients = StatsGradients(_per_token(), _per_token(), None)
    with _triton_backend() as backend:
        stats = backend.token_stats_forward(logits, targets, TRANSFORM)
        for given in (gradients, gradients._replace(entropy=None)):
            backend.token_stats_backward(logits, targets, stats, given, TRANSFORM, out=logits)
        terms, rule = _terms(old_logprobs=_per_token()), LossRule.of(GRPOLossConfig())
        backend.grpo_sweep(logits, targets, terms, rule, TRANSFORM, out=logits)
        backend.token_stats_forward(logits.narrow(0, 0, FEW_ROWS), targets.narrow(0, 0, FEW_ROWS), TRANSFORM)


def triton_capped(architecture: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """The statistics of logits with a soft cap."""
    logits, targets = torch.empty(ROWS, VOCAB, dtype=dtype, device="cuda"), _per_token(torch.int64)
    with _triton_backend() as backend:
        backend.token_stats_forward(logits, targets, CAPPED)


def triton_head(architecture: int) -> None:
    """The fused head, forward and backward."""
    hidden = torch.empty(ROWS, HIDDEN, dtype=torch.bfloat16, device="cuda")
    weight = torch.empty(VOCAB, HIDDEN, dtype=torch.bfloat16, device="cuda")
    inputs = hidden, weight, None, _per_token(torch.int64)
    gradients, wanted = StatsGradients(_per_token(), _per_token(), None), (True, True, False)
    with _triton_backend() as backend:
        stats = backend.linear_forward(*inputs, hidden.dtype, TRANSFORM)
        backend.linear_backward(*inputs, stats, gradients, wanted, hidden.dtype, TRANSFORM, None)


def triton_tiles(architecture: int, dtype: torch.dtype = torch.bfloat16, vocab: int = VOCAB) -> None:
    """The head by tiles, each way, with the advantages known and with the statistics first: what it launches itself."""
    hidden = torch.empty(ROWS, HIDDEN, dtype=dtype, device="cuda")
    weight = torch.empty(vocab, HIDDEN, dtype=dtype, device="cuda")
    inputs, wanted = (hidden, weight, None, _per_token(torch.int64)), [True, True, False]
    terms, rule = _terms(old_logprobs=_per_token()), LossRule.of(GRPOLossConfig())
    with _triton_backend(), use_backend("triton"):
        for way in (TILES, COLUMNS):
            with use_way(way):
                call = linear_grpo_loss._Call(*inputs, wanted, dtype, TRANSFORM, terms, rule)
                linear_grpo_loss._sweep(call, False, TILES_BUDGET)
                head = linear_token_stats._way(hidden, weight, None, dtype, TILES_BUDGET)
                assert isinstance(head, Head)
                stats = linear_token_stats._forward(hidden, weight, inputs[3], head, TRANSFORM)
                gradients = StatsGradients(_per_token(), None, None)
                options = (wanted, dtype, TILES_BUDGET, TRANSFORM)
                linear_token_stats._gradient(*inputs, stats, gradients, *options)


def triton_loss(architecture: int) -> None:
    """The loss of tokens, whose statistics are known."""
    with _triton_backend() as backend:
        terms = _terms(old_logprobs=_per_token())
        backend.token_loss(_per_token(), _per_token(), terms, LossRule.of(GRPOLossConfig()))


def triton_options(architecture: int) -> None:
    """Every kernel once more, with the options that the launches above leave out; for bfloat16."""
    dtype = torch.bfloat16
    logits, targets = torch.empty(ROWS, VOCAB, dtype=dtype, device="cuda"), _per_token(torch.int64)
    elsewhere = torch.empty(ROWS, VOCAB + 1, dtype=dtype, device="cuda").narrow(1, 1, VOCAB)
    everything = StatsGradients(_per_token(), _per_token(), _per_token())
    full = _terms(
        old_logprobs=_per_token(),
        ref_logprobs=_per_token(),
        sampling_logprobs=_per_token(),
        injected=_per_token(torch.bool),
        entropy_threshold=_scalar(),
        bonus_weight=_scalar(),
    )
    bare, sampler = _terms(sampler_ratio=_per_token()), {"sampler_ratio_cap": 2.0, "sampler_ratio_mode": "token_mask"}
    shaped = LossRule.of(GRPOLossConfig(injected="shaped", beta=0.1, **sampler))  # type: ignore[arg-type]
    cispo = LossRule.of(GRPOLossConfig(loss_type="cispo", injected="sft", beta=0.1, **sampler))  # type: ignore[arg-type]
    sapo = LossRule.of(GRPOLossConfig(loss_type="sapo"))
    with _triton_backend() as backend:
        stats = backend.token_stats_forward(logits, None, NEGATIVE)
        backend.token_stats_forward(logits.narrow(0, 0, FEW_ROWS), None, CAPPED)
        backend.token_stats_backward(logits, targets, stats, everything, CAPPED, out=elsewhere)
        backend.token_stats_backward(logits, None, stats, everything._replace(logprobs=None), NEGATIVE, out=logits)
        for terms, rule, transform in ((full, shaped, CAPPED), (full, cispo, NEGATIVE), (bare, sapo, NEGATIVE)):
            backend.grpo_sweep(logits, targets, terms, rule, transform, out=logits)
            whole = rule._replace(ratio_of_sequence=True, sampler_of_sequence=True, sampler_masks=True)
            backend.token_loss(*(_per_token().view(SHAPE) for _ in range(2)), _in_sequences(terms), whole)
        for loss_type in ("geo_mean", "vespo"):
            rule = LossRule.of(GRPOLossConfig(loss_type=loss_type))
            backend.token_loss(*(_per_token().view(SHAPE) for _ in range(2)), _in_sequences(full), rule)
        hidden = torch.empty(ROWS, HIDDEN, dtype=dtype, device="cuda")
        weight = torch.empty(VOCAB, HIDDEN, dtype=dtype, device="cuda")
        inputs = hidden, weight, torch.empty(VOCAB, dtype=dtype, device="cuda"), targets
        stats = backend.linear_forward(*inputs, dtype, CAPPED)
        for wanted, into in (((True, True, True), weight), ((False, False, True), None)):
            backend.linear_backward(*inputs, stats, everything, wanted, dtype, CAPPED, into)


def cuda_kernels(architecture: int, names: str = "*") -> list[aot.Compiled]:
    """Return the kernels of the CUDA sources of these names: those for bfloat16, and those without an element type."""
    sources = sorted(aot.CUDA_SOURCES.glob(f"{names}.cu"))
    compiled = aot.cuda_kernels(sources, architecture)
    return [each for each in compiled if not re.search(r"<(float|__half)\b", each.kernel.name)]
