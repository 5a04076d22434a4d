"""Packed tokens, one response after the other: losses, gradients and advantages are those of the padded batch."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import BACKENDS, INTERPRETING, WIDEST
from grpo_batch import LOSS_TYPES, B, D, T, V, config_of, inputs_for, make_batch, variant_of
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import edge_kernels
from edge_kernels import (
    cumulative_lengths,
    edge_grpo_loss,
    entropy_driven_advantages,
    entropy_weights,
    kl_penalized_rewards,
    linear_edge_grpo_loss,
    reference,
    response_entropy,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread", "backend"),
    pytest.mark.parametrize("backend", BACKENDS, indirect=True),
]

# Of the masks' 6, 4, 0 and 2 tokens: no prompt, two masked tokens between the responses, an empty one, one at the end.
LENGTHS = (6, 6, 0, 3)
CU_SEQLENS = torch.tensor([0, 6, 12, 12, 15], dtype=torch.int32)
KEPT = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
TOLERANCE: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-5} if INTERPRETING else {"rtol": 1e-11, "atol": 1e-12}
PER_TOKEN = ("old_logprobs", "ref_logprobs", "sampling_logprobs", "injected_mask")


def packed(value: Tensor, shape: str) -> Tensor:
    return value[KEPT] if shape == "(N,)" else value[KEPT][None]


def packed_inputs(inputs: dict[str, Any], shape: str) -> dict[str, Any]:
    changed = {name: packed(inputs[name], shape) for name in PER_TOKEN if inputs.get(name) is not None}
    return inputs | changed | {"cu_seqlens": CU_SEQLENS}


def compare(batch: SimpleNamespace, inputs: dict[str, Any], shape: str, name: str, *, inplace: bool = False) -> None:
    """Loss, statistics, metrics, gradients, from logits and hidden states, against the reference on padded tokens."""
    leaves = [x.detach().to(WIDEST).requires_grad_() for x in (batch.hidden, batch.weight, batch.bias)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    if "temperature" in inputs:  # takes no bias
        leaves[2], exact[2] = None, None
    hidden, weight, bias = leaves
    wanted = reference.edge_grpo_loss(F.linear(*exact), batch.targets, batch.mask, **inputs)
    given, padded = packed_inputs(inputs, shape), edge_grpo_loss(F.linear(*leaves), batch.targets, batch.mask, **inputs)
    tokens = (packed(batch.targets, shape), packed(batch.mask, shape))
    outs = [
        edge_grpo_loss(F.linear(packed(hidden, shape), weight, bias), *tokens, inplace=inplace, **given),
        linear_edge_grpo_loss(packed(hidden, shape), weight, *tokens, bias, **given),
    ]
    used, exact = ([x for x in values if x is not None] for values in (leaves, exact))
    expected = torch.autograd.grad(wanted.loss, exact)
    for out, way in zip(outs, ("logits", "hidden"), strict=True):
        what = f"{name}, from {way}: "
        torch.testing.assert_close(out.loss.double(), wanted.loss, **TOLERANCE, msg=lambda m, what=what: what + m)
        for got, gradient in zip(torch.autograd.grad(out.loss, used, retain_graph=True), expected, strict=True):
            torch.testing.assert_close(got.double(), gradient, **TOLERANCE, msg=lambda m, what=what: what + m)
        assert out.entropy.shape == out.logprobs.shape == tokens[0].shape
        torch.testing.assert_close(out.entropy.double(), packed(wanted.entropy, shape), **TOLERANCE)
        torch.testing.assert_close(out.logprobs.double(), packed(wanted.logprobs, shape), **TOLERANCE)
        torch.testing.assert_close(out.advantages.double(), wanted.advantages.double(), **TOLERANCE)
        torch.testing.assert_close(out.metrics, padded.metrics, **TOLERANCE)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss(loss_type: str) -> None:
    """Four variants with every option that sums over a response; both shapes, with and without old logprobs."""
    batch = make_batch(dtype=WIDEST)
    for variant, with_old in itertools.product(range(4), (True, False)):
        config = variant_of(
            loss_type,
            variant,
            sft_weight=0.7,
            delta=1.3,
            sampler_ratio_mode="token_mask" if loss_type == "vespo" or variant < 1 else "sequence_truncate",
        )
        inputs = inputs_for(batch, config, with_old=with_old)
        compare(batch, inputs, ("(N,)", "(1, N)")[with_old], f"{variant} {with_old}", inplace=variant == 0)


def test_advantages_from_rewards() -> None:
    batch = make_batch(dtype=WIDEST)
    for options in ({}, {"loss_type": "grpo", "reward_kl_coef": 0.3, "importance_sampling_level": "sequence"}):
        config = config_of(**options, entropy_coef=0.02, eda=edge_kernels.EDAConfig(preserve_scale=True))
        rewards = {"advantages": None, "rewards": batch.rewards, "group_ids": batch.groups, "ref_logprobs": batch.ref}
        compare(batch, inputs_for(batch, config) | rewards, "(1, N)", f"{options}")


def test_advantages_per_token_and_temperatures_per_response() -> None:
    batch, config = make_batch(dtype=WIDEST), config_of("grpo", importance_sampling_level="sequence")
    each = torch.linspace(-1, 1, B * T, dtype=torch.float64).view(B, T)
    inputs = inputs_for(batch, config)
    of_tokens = inputs | {"advantages": packed(each, "(1, N)")}
    tokens = (packed(batch.targets, "(1, N)"), packed(batch.mask, "(1, N)"))
    out = linear_edge_grpo_loss(
        packed(batch.hidden, "(1, N)"), batch.weight, *tokens, batch.bias, **packed_inputs(of_tokens, "(1, N)")
        | {"advantages": packed(each, "(1, N)")}
    )  # fmt: skip
    logits = F.linear(*(x.double() for x in (batch.hidden, batch.weight, batch.bias)))
    wanted = reference.edge_grpo_loss(logits, batch.targets, batch.mask, **inputs | {"advantages": each})
    torch.testing.assert_close(out.loss.double(), wanted.loss, **TOLERANCE)
    temperatures = torch.tensor([0.5, 2.0, 1.0, 0.7], dtype=torch.float64)
    for options in ({}, {"importance_sampling_level": "sequence", "loss_type": "luspo"}):
        inputs = inputs_for(batch, config_of(beta=0.04, **options)) | {"temperature": temperatures}
        compare(batch, inputs, "(N,)", "temperatures")


@pytest.mark.parametrize("shape", ["(N,)", "(1, N)"])
def test_advantage_functions(shape: str) -> None:
    batch = make_batch()
    entropy = batch.ref.abs()
    own, padded = (packed(entropy, shape), packed(batch.mask, shape)), (entropy, batch.mask)
    cu_seqlens = CU_SEQLENS.long()
    torch.testing.assert_close(response_entropy(*own, cu_seqlens=cu_seqlens), response_entropy(*padded))
    torch.testing.assert_close(
        entropy_weights(*own, batch.groups, cu_seqlens=cu_seqlens), entropy_weights(*padded, batch.groups)
    )
    torch.testing.assert_close(
        entropy_driven_advantages(batch.rewards, *own, batch.groups, cu_seqlens=cu_seqlens),
        entropy_driven_advantages(batch.rewards, *padded, batch.groups),
    )
    kl = {"coef": 0.3, "estimator": "k2"}
    logprobs = batch.sampling.masked_fill(batch.sampling.isnan(), 0)
    torch.testing.assert_close(
        kl_penalized_rewards(batch.rewards, packed(logprobs, shape), *own, **kl, cu_seqlens=cu_seqlens),
        kl_penalized_rewards(batch.rewards, logprobs, *padded, **kl),
    )


def test_a_response_of_nan_leaves_the_others_alone() -> None:
    """Sums over responses that were differences of one running sum would all be NaN."""
    batch = make_batch(dtype=WIDEST)
    hidden = packed(batch.hidden, "(N,)").detach().clone()
    hidden[0] = torch.nan
    hidden.requires_grad_()
    config = config_of("grpo", importance_sampling_level="sequence")
    inputs = packed_inputs(inputs_for(batch, config), "(N,)")
    tokens = (packed(batch.targets, "(N,)"), packed(batch.mask, "(N,)"))
    out = linear_edge_grpo_loss(hidden, batch.weight, *tokens, **inputs)
    (gradient,) = torch.autograd.grad(out.loss, hidden)
    assert out.loss.isnan()
    assert gradient[0].isnan().all()
    assert gradient[6:].isfinite().all()
    assert gradient[6].any()


def test_a_low_rank_part() -> None:
    batch, inputs = make_batch(), inputs_for(make_batch(), config_of("geo_mean", beta=0.04))
    generator = torch.Generator().manual_seed(3)
    states, factor = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((B, T, 2), (V, 2)))
    whole = F.linear(batch.hidden, batch.weight) + F.linear(states, factor)
    for temperature in (None, torch.tensor([0.5, 2.0, 1.0, 0.7], dtype=torch.float64)):
        wanted = reference.edge_grpo_loss(whole, batch.targets, batch.mask, **inputs, temperature=temperature)
        tokens = (packed(x, "(1, N)").to(x.dtype) for x in (batch.hidden, batch.targets, batch.mask, states))
        hidden, targets, mask, own = tokens
        out = linear_edge_grpo_loss(
            hidden.to(WIDEST), batch.weight.to(WIDEST), targets, mask, low_rank=(own.to(WIDEST), factor.to(WIDEST)),
            temperature=temperature, **packed_inputs(inputs, "(1, N)"),
        )  # fmt: skip
        torch.testing.assert_close(out.loss.double(), wanted.loss, **TOLERANCE)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_compiles_into_one_graph_for_any_lengths(level: str) -> None:
    batch = make_batch(dtype=torch.float32)
    inputs = packed_inputs(inputs_for(batch, config_of(beta=0.04, importance_sampling_level=level)), "(1, N)")
    inputs |= {"advantages": None, "rewards": batch.rewards, "group_ids": batch.groups}
    tokens = (packed(batch.targets, "(1, N)"), packed(batch.mask, "(1, N)"))
    hidden = packed(batch.hidden, "(1, N)").detach().requires_grad_()
    num_compiled = 0

    def counting(graph: Any, example_inputs: Any) -> Any:
        nonlocal num_compiled
        num_compiled += 1
        return graph.forward

    def loss(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        options = inputs | {"cu_seqlens": cu_seqlens}
        return linear_edge_grpo_loss(hidden, batch.weight, *tokens, batch.bias, **options).loss

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=counting)
    for lengths in (LENGTHS, (3, 4, 5, 3)):
        cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
        values = compiled(hidden, cu_seqlens), loss(hidden, cu_seqlens)
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*(torch.autograd.grad(value, hidden) for value in values))
    assert num_compiled == 1


@pytest.mark.parametrize("from_hidden", [True, False])
def test_nothing_of_the_padded_size_is_made(from_hidden: bool, backend: str) -> None:
    """One response of 60 tokens among 20 of one: padded, 1,260 rows where there are 80."""
    if backend == "reference":
        pytest.skip("is there to be read")
    lengths = [60] + [1] * 20
    N, width = sum(lengths), D if from_hidden else V
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    values = torch.randn(N, width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight, mask = torch.randn(V, D), torch.ones(N, dtype=torch.bool)
    targets, per_token = torch.arange(N) % V, torch.full((N,), -2.0)
    options: dict[str, Any] = {
        "rewards": torch.arange(21.0) % 2,
        "group_ids": torch.arange(21) // 7,
        "old_logprobs": per_token,
        "config": config_of("grpo", importance_sampling_level="sequence"),
        "cu_seqlens": cu_seqlens,
    }
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        if from_hidden:
            loss = linear_edge_grpo_loss(values, weight, targets, mask, **options).loss
        else:
            loss = edge_grpo_loss(values, targets, mask, **options).loss
        loss.backward()
    sizes = [e.nbytes() for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert max(sizes) < 4 * len(lengths) * 60 * width
    assert max(sizes) >= 4 * N * width  # the gradient is seen


# --- cumulative lengths -----------------------------------------------------------------------------------------------


def test_cumulative_lengths_of_positions() -> None:
    positions = torch.tensor([0, 1, 2, 0, 0, 1, 5, 6])  # the last sequence is the end of a longer one
    expected = torch.tensor([0, 3, 4, 6, 8], dtype=torch.int32)
    for given in (positions, positions[None].int()):
        torch.testing.assert_close(cumulative_lengths(given), expected)
    assert cumulative_lengths(positions[:0]).tolist() == [0]
    assert cumulative_lengths(positions[:1]).tolist() == [0, 1]
    for wrong in (positions.view(2, 4), positions.double()):
        with pytest.raises(ValueError, match="position_ids must be integer"):
            cumulative_lengths(wrong)


def test_what_is_refused() -> None:
    batch = make_batch()
    tokens = (packed(batch.targets, "(N,)"), packed(batch.mask, "(N,)"))
    hidden, credit = packed(batch.hidden, "(N,)"), {"advantages": batch.advantages}
    for wrong, error, message in (
        (CU_SEQLENS.double(), TypeError, "cu_seqlens must be int32 or int64"),
        (CU_SEQLENS[None], TypeError, "shape (B + 1,)"),
        (CU_SEQLENS[:-1], ValueError, "rise from 0 to the number of tokens, 15; got [0, 6, 12, 12]"),
        (CU_SEQLENS.flip(0), ValueError, "rise from 0"),
        (CU_SEQLENS.to("meta"), ValueError, "must be on cpu"),
    ):
        with pytest.raises(error) as caught:
            linear_edge_grpo_loss(hidden, batch.weight, *tokens, **credit, cu_seqlens=wrong)
        assert message in str(caught.value)
    for call, message in (
        (lambda: edge_grpo_loss(torch.zeros(2, 3, V), *tokens, **credit, cu_seqlens=CU_SEQLENS), "(1, N, V)"),
        (lambda: linear_edge_grpo_loss(hidden, batch.weight, *tokens, **credit), "(B, T, D)"),
        (lambda: response_entropy(batch.ref, batch.mask, cu_seqlens=CU_SEQLENS), "(1, N)"),
        (
            lambda: linear_edge_grpo_loss(
                hidden, batch.weight, *tokens, cu_seqlens=CU_SEQLENS, advantages=torch.ones(7).double()
            ),
            "(B,) = (4,) or (N,) = (15,) or (1, N) = (1, 15)",
        ),
    ):
        with pytest.raises(ValueError, match="must") as caught:
            call()
        assert message in str(caught.value)
