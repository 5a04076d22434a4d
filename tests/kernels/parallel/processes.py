"""What every process of test_parallel.py runs: each case compares shards with the op on the whole vocabulary.

python processes.py RANK WORLD FOLDER; writes the names of the cases that passed into FOLDER/passed.RANK.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import edge_kernels
from edge_kernels import parallel, use_backend

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
import agreement_cases
import dtensor_cases
import sequence_cases
from grpo_batch import LOSS_TYPES, V, config_of, inputs_for, make_batch, variant_of
from traffic import TOLERANCE, close, counted, random, refuses, without_reading

CASES: dict[str, Callable[[Any], None]] = {
    function.__name__: function for function in (*sequence_cases.CASES, *agreement_cases.CASES, *dtensor_cases.CASES)
}


def case(function: Callable[[Any], None]) -> Callable[[Any], None]:
    CASES[function.__name__] = function
    return function


def spans(sizes: Sequence[int]) -> list[slice]:
    ends = list(itertools.accumulate(sizes))
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def compare_stats(
    logits: Tensor,
    targets: Tensor,
    sizes: Sequence[int],
    group: Any,
    name: str,
    *,
    inplace: bool = False,
    **options: Any,
) -> None:
    """Values, and the gradient of a random combination of all three statistics, of this process's columns."""
    whole, columns = logits.clone().requires_grad_(), spans(sizes)[dist.get_rank(group)]
    shard = logits[..., columns].clone().requires_grad_()
    expected = edge_kernels.token_stats(whole, targets, **options)
    places = {"group": group, "inplace": inplace, "vocab_sizes": sizes if inplace else None}
    given = shard * 1 if inplace else shard
    actual = parallel.token_stats(given, targets, **places, **options)
    for field, a, e in zip(expected._fields, actual, expected, strict=True):
        close(a, e, f"{name}: {field}")
    weights = [random(*targets.shape, seed=seed, dtype=expected[0].dtype, scale=1.0) for seed in range(3)]
    (d_whole,) = torch.autograd.grad(expected, whole, weights)
    (d_shard,) = torch.autograd.grad(actual, shard, weights)
    close(d_shard, d_whole[..., columns], f"{name}: gradient", logits.dtype)
    if inplace and given.numel():
        assert given._version > 0
        close(given.detach(), d_shard, f"{name}: in place")


# --- token_stats ------------------------------------------------------------------------------------------------------

# Even, uneven, without columns first, in the middle, last, and fewer columns than ranks.
DIVISIONS = {
    3: [(4, 4, 4), (1, 7, 5), (0, 5, 8), (6, 0, 7), (6, 7, 0), (1, 0, 0), (0, 1, 1)],
    2: [(6, 7), (12, 1), (0, 3)],
}


@case
def logits_of_every_division(group: Any) -> None:
    for sizes, dtype in itertools.product(DIVISIONS[dist.get_world_size(group)], TOLERANCE):
        vocab = sum(sizes)
        targets = torch.arange(2 * vocab).view(2, vocab) % vocab  # each column is a target
        compare_stats(random(2, vocab, vocab, dtype=dtype), targets, sizes, group, f"{sizes} {dtype}")


@case
def transforms(group: Any) -> None:
    sizes = DIVISIONS[dist.get_world_size(group)][0]
    vocab = sum(sizes)
    logits, targets = random(2, 3, vocab), torch.tensor([[0, 3, vocab - 1], [4, 1, 0]])
    for options in (
        {"temperature": 0.7},
        {"softcap": 5.0},
        {"logit_scale": -0.3, "temperature": 1.3},
        {"softcap": 2.0, "logit_scale": 1.5, "temperature": 0.6},
        {"temperature": torch.tensor([0.5, 2.0])},
        {"ignore_index": 0},  # a first column everywhere, which must not be taken for another shard's
        {"ignore_index": 4},
    ):
        for backend, dtype in itertools.product(("cpu", "reference"), (torch.float64, torch.float32)):
            with use_backend(backend):
                compare_stats(logits.to(dtype), targets, sizes, group, f"{options} {backend}", **options)


@case
def special_rows(group: Any) -> None:
    sizes = {3: (3, 5, 4), 2: (5, 7)}[dist.get_world_size(group)]
    inf, nan = torch.inf, torch.nan
    for backend, dtype in itertools.product(("cpu", "reference"), (torch.float64, torch.float32, torch.bfloat16)):
        logits = random(13, 12, dtype=dtype)
        first = slice(0, sizes[0])
        logits[0] += 3e4  # where float32 has no digit of an entropy that is made of logsumexp
        logits[1] *= 1e4  # one column has everything
        logits[2, first] = -inf  # one shard adds nothing
        logits[3, first] = -inf  # and has the target
        logits[4, sizes[0] :] = -inf
        logits[5] = -inf
        logits[6, 2] = nan
        logits[7, 11] = inf
        logits[8] = nan  # ignored
        logits[9, 7] = -inf  # a forbidden target
        logits[10] = 1e30  # equal, and beyond any unit
        logits[11, 1], logits[11, 10] = 1e30, 1e30
        targets = torch.tensor([1, 6, 7, 1, 2, 3, 8, 8, -100, 7, 11, 10, 5])
        with use_backend(backend):
            compare_stats(logits, targets, sizes, group, f"{backend} {dtype}")


@case
def gradients_in_place(group: Any) -> None:
    for sizes in DIVISIONS[dist.get_world_size(group)][:4]:
        logits, targets = random(3, sum(sizes), dtype=torch.float32), torch.tensor([0, 1, sum(sizes) - 1])
        compare_stats(logits, targets, sizes, group, f"{sizes}", inplace=True)


@case
def no_rows(group: Any) -> None:
    compare_stats(
        random(0, 6),
        torch.zeros(0, dtype=torch.int64),
        {3: (2, 2, 2), 2: (3, 3)}[dist.get_world_size(group)],
        group,
        "",
    )


# --- with a head ------------------------------------------------------------------------------------------------------


def compare_losses(
    batch: Any, sizes: Sequence[int], group: Any, name: str, *, inplace: bool = False, **options: Any
) -> None:
    """Loss, results, metrics and every gradient, from logits and from hidden states."""
    columns = spans(sizes)[dist.get_rank(group)]
    expected = edge_kernels.linear_edge_grpo_loss(
        batch.hidden, batch.weight, batch.targets, batch.mask, batch.bias, **options
    )
    d_hidden, d_weight, d_bias = torch.autograd.grad(expected.loss, (batch.hidden, batch.weight, batch.bias))
    hidden = batch.hidden.detach().clone().requires_grad_()
    weight, bias = (value.detach()[columns].clone().requires_grad_() for value in (batch.weight, batch.bias))
    actual = parallel.linear_edge_grpo_loss(hidden, weight, batch.targets, batch.mask, bias, group=group, **options)
    gradients = torch.autograd.grad(actual.loss, (hidden, weight, bias))
    for part, a, e in zip(
        ("hidden", "weight", "bias"), gradients, (d_hidden, d_weight[columns], d_bias[columns]), strict=True
    ):
        close(a, e, f"{name}: gradient of {part}")
    logits = F.linear(batch.hidden, batch.weight, batch.bias).detach()
    whole, shard = logits.clone().requires_grad_(), logits[..., columns].clone().requires_grad_()
    from_whole = edge_kernels.edge_grpo_loss(whole, batch.targets, batch.mask, **options)
    places = {"group": group, "inplace": inplace}
    from_shard = parallel.edge_grpo_loss(shard * 1, batch.targets, batch.mask, **places, **options)
    from_whole.loss.backward()
    from_shard.loss.backward()
    assert whole.grad is not None
    assert shard.grad is not None
    close(shard.grad, whole.grad[..., columns], f"{name}: gradient of logits")
    dtype = batch.hidden.dtype
    for out, wanted in ((actual, expected), (from_shard, from_whole)):
        for field in ("loss", "logprobs", "entropy", "advantages"):
            close(getattr(out, field), getattr(wanted, field), f"{name}: {field}", dtype)
        assert out.metrics.keys() == wanted.metrics.keys()
        for key, value in wanted.metrics.items():
            close(out.metrics[key], value, f"{name}: {key}", dtype)


@case
def every_loss(group: Any) -> None:
    sizes = {3: (2, 8, 3), 2: (0, 13)}[dist.get_world_size(group)]
    batch = make_batch()
    for loss_type, variant in itertools.product(LOSS_TYPES, range(4)):
        config = variant_of(
            loss_type,
            variant,
            sft_weight=0.7,
            delta=1.3,
            temperature=(1.0, 0.8)[variant % 2],
            softcap=(None, 4.0)[variant == 1],
        )
        compare_losses(batch, sizes, group, f"{loss_type} {variant}", **inputs_for(batch, config))


@case
def rewards_and_dtypes(group: Any) -> None:
    sizes = {3: (5, 5, 3), 2: (9, 4)}[dist.get_world_size(group)]
    for dtype in (torch.float64, torch.float32):
        batch = make_batch(dtype=dtype)
        rewards = {"rewards": batch.rewards, "group_ids": batch.groups}
        compare_losses(batch, sizes, group, f"{dtype}", **rewards, config=config_of(entropy_coef=0.02))
        compare_losses(batch, sizes, group, f"{dtype} tiles", **inputs_for(batch, config_of("grpo")))


@case
def losses_of_every_kind(group: Any) -> None:
    """16-bit inputs, gradients in place, packed responses, a batch in which nothing counts."""
    sizes = {3: (5, 0, 8), 2: (9, 4)}[dist.get_world_size(group)]
    for dtype, inplace in ((torch.float16, False), (torch.bfloat16, False), (torch.float64, True)):
        for loss_type in ("grpo", "geo_mean"):
            batch = make_batch(dtype=dtype)
            inputs = inputs_for(batch, config_of(loss_type))
            compare_losses(batch, sizes, group, f"{loss_type} {dtype} {inplace}", inplace=inplace, **inputs)
    batch = make_batch()
    batch.mask[:] = False
    options = {"top_entropy_quantile": 0.5, "entropy_coef": 0.1, "importance_sampling_level": "sequence"}
    compare_losses(batch, sizes, group, "masked", **inputs_for(batch, config_of("grpo", **options)))
    for cu_seqlens, level in itertools.product(([0, 24], [0, 0, 5, 5, 24]), ("token", "sequence")):
        batch = make_batch()
        batch.hidden = batch.hidden.detach().flatten(0, 1).requires_grad_()
        batch.targets, batch.mask = batch.targets.flatten(), batch.mask.flatten()
        packed = {
            "cu_seqlens": torch.tensor(cu_seqlens),
            "advantages": batch.advantages[: len(cu_seqlens) - 1],
            "old_logprobs": batch.old.flatten(),
            "config": config_of("grpo", importance_sampling_level=level),
        }
        compare_losses(batch, sizes, group, f"packed {cu_seqlens} {level}", inplace=True, **packed)


@case
def what_requires_a_gradient(group: Any) -> None:
    """Frozen inputs have none and change no other's; under autocast gradients have the dtypes of their inputs."""
    sizes = {3: (5, 0, 8), 2: (9, 4)}[dist.get_world_size(group)]
    columns, batch = spans(sizes)[dist.get_rank(group)], make_batch()
    inputs = inputs_for(batch, config_of("grpo"))

    def gradients(cut: Any, wanted: Any, dtypes: Any, function: Any, **places: Any) -> list[Tensor | None]:
        made = zip((batch.hidden, batch.weight[cut], batch.bias[cut]), wanted, dtypes, strict=True)
        hidden, weight, bias = (x.detach().to(dtype).requires_grad_(want) for x, want, dtype in made)
        loss = function(hidden, weight, batch.targets, batch.mask, bias, **inputs, **places).loss
        if any(wanted):
            loss.backward()
        return [loss.detach(), hidden.grad, weight.grad, bias.grad]

    double, mixed = (torch.float64,) * 3, (torch.bfloat16, torch.float32, torch.float32)
    kinds = [(wanted, double) for wanted in itertools.product((False, True), repeat=3)] + [((True,) * 3, mixed)]
    for wanted, dtypes in kinds:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtypes is mixed):
            whole = gradients(slice(None), wanted, dtypes, edge_kernels.linear_edge_grpo_loss)
            own = gradients(columns, wanted, dtypes, parallel.linear_edge_grpo_loss, group=group)
        for n, (a, e) in enumerate(zip(own, whole, strict=True)):
            assert (a is None) == (e is None), (wanted, n)
            if a is not None and e is not None:
                precision = torch.bfloat16 if dtypes is mixed else None
                close(a, e[columns] if n > 1 else e, f"{wanted} {dtypes} {n}", precision)


@case
def heads(group: Any) -> None:
    """Tiles of few rows, 16-bit weights by columns, a low-rank part, a temperature for each response, autocast."""
    sizes = {3: (2, 0, 11), 2: (7, 6)}[dist.get_world_size(group)]
    columns, targets = spans(sizes)[dist.get_rank(group)], torch.arange(12).view(3, 4)
    for dtype, options in itertools.product(
        (torch.float64, torch.bfloat16), ({}, {"memory_budget": 80}, {"temperature": torch.tensor([0.5, 1.0, 2.0])})
    ):
        made = [
            random(*shape, seed=n, dtype=dtype, scale=1.0)
            for n, shape in enumerate([(3, 4, 5), (V, 5), (3, 4, 2), (V, 2)])
        ]
        is_low_rank = "memory_budget" not in options
        whole = [value.clone().requires_grad_() for value in made]
        mine = [(value[columns] if n % 2 else value).clone().requires_grad_() for n, value in enumerate(made)]
        results = []
        for function, (hidden, weight, states, factor), place in (
            (edge_kernels.linear_token_stats, whole, {}),
            (parallel.linear_token_stats, mine, {"group": group}),
        ):
            low_rank = (states, factor) if is_low_rank else None
            results.append(function(hidden, weight, targets, low_rank=low_rank, **options, **place))
        for field, a, e in zip(results[0]._fields, results[1], results[0], strict=True):
            close(a, e, f"{dtype} {options}: {field}", dtype)
        used = 4 if is_low_rank else 2
        weights = [random(3, 4, seed=n, dtype=results[0][0].dtype, scale=1.0) for n in range(3)]
        expected = torch.autograd.grad(results[0], whole[:used], weights)
        actual = torch.autograd.grad(results[1], mine[:used], weights)
        for n, (a, e) in enumerate(zip(actual, expected, strict=True)):
            close(a, e[columns] if n % 2 else e, f"{dtype} {options}: gradient {n}")


@case
def traffic(group: Any) -> None:
    """Two all-reduces forward, none backward from logits and one from hidden states; agreeing on a CPU costs one more.

    Where values are not read, sizes that are known spare that one: what must agree goes with the maxima.
    """
    world, (N, D) = dist.get_world_size(group), (6, 5)
    sizes = {3: (4, 0, 2), 2: (1, 5)}[world]
    size = sizes[dist.get_rank(group)]
    targets, known, asked = torch.arange(N), {"group": group, "vocab_sizes": sizes}, ("allgather_", 40 * world)
    for dtype, itemsize in ((torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 4)):
        forward = ("allreduce_", 8 * N), ("allreduce_", 3 * itemsize * N)
        logits = random(N, size, dtype=dtype).requires_grad_()
        with counted(asked, *forward):
            stats = parallel.token_stats(logits, targets, **known)
        with counted(("allreduce_", 8 * N + 32), forward[1]), without_reading():
            unread = parallel.token_stats(logits, targets, **known)
        torch.testing.assert_close(unread, stats, rtol=0, atol=0)
        with counted():
            torch.autograd.grad(stats.logprobs.sum() + stats.entropy.sum(), logits)
        hidden, weight = random(N, D, dtype=dtype).requires_grad_(), random(size, D, dtype=dtype).requires_grad_()
        with counted(asked, *forward):
            stats = parallel.linear_token_stats(hidden, weight, targets, group=group)
        with counted(("allreduce_", N * D * itemsize)):
            torch.autograd.grad(stats.logprobs.sum() + stats.entropy.sum(), (hidden, weight))
        with counted(("allreduce_", 8 * N + 32), forward[1]), without_reading():
            stats = parallel.linear_token_stats(hidden.detach(), weight, targets, **known)
        with counted():
            torch.autograd.grad(stats.logprobs.sum(), weight)
    batch = make_batch()
    sizes = {3: (4, 4, 5), 2: (6, 7)}[world]
    weight, bias = (value[spans(sizes)[dist.get_rank(group)]] for value in (batch.weight, batch.bias))
    N, D = batch.targets.numel(), batch.hidden.shape[-1]
    options = {"group": group, "vocab_sizes": sizes, "rewards": batch.rewards, "group_ids": batch.groups}
    with counted(asked, ("allreduce_", 8 * N), ("allreduce_", 24 * N)):
        out = parallel.linear_edge_grpo_loss(batch.hidden, weight, batch.targets, batch.mask, bias, **options)
    with counted(("allreduce_", 8 * N * D)):
        out.loss.backward()


# --- errors -----------------------------------------------------------------------------------------------------------


@case
def errors(group: Any) -> None:
    """Raised on every process, so that none waits for another."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    logits, targets = random(4, 3), torch.zeros(4, dtype=torch.int64)
    refuses("[0, V) = [0, ", parallel.token_stats, logits, targets + 3 * world, group=group)
    refuses("vocab_sizes", parallel.token_stats, logits, targets, group=group, vocab_sizes=[3] * (world + 1))
    refuses("same rows", parallel.token_stats, logits[: 4 - rank], targets[: 4 - rank], group=group)
    refuses("targets must be int64", parallel.token_stats, logits, targets.int(), group=group)
    refuses("dtype of hidden", parallel.linear_token_stats, logits, logits.float(), targets, group=group)
    refuses("temperature", parallel.token_stats, logits, targets, temperature=0.0, group=group)
    refuses("rewards", parallel.edge_grpo_loss, logits[None], targets[None], targets[None] == 0, group=group)
    refuses("(B, T, V)", parallel.edge_grpo_loss, logits[None, None], targets, targets == 0, group=group)
    arguments = (logits[None], targets[None], targets[None] == 0)
    refuses("unexpected", parallel.edge_grpo_loss, *arguments, advantage=1, group=group)
    stats = parallel.token_stats(logits.requires_grad_(), targets, group=group)
    gradient = torch.autograd.grad(stats.logprobs.sum(), logits, create_graph=False, retain_graph=True)
    assert gradient[0].isfinite().all()
    refuses("second derivative", torch.autograd.grad, stats.logprobs.sum(), logits, create_graph=True)


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    pair = dist.new_group([0, 2])  # ranks of the group are not the processes'
    for group in (dist.group.WORLD, pair):
        for name, function in CASES.items():
            if group is pair and rank == 1:
                continue
            function(group)
            with (folder / f"passed.{rank}").open("a") as passed:
                passed.write(f"{name} {dist.get_world_size(group)}\n")
    if rank == 1:
        refuses(
            "must belong to group", parallel.token_stats, random(4, 3), torch.zeros(4, dtype=torch.int64), group=pair
        )
    dist.barrier()  # none may leave while another still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
