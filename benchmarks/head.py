"""The fused LM head, loss and gradients from hidden states: correctness first, then time and memory, against peers.

Contenders start without gradients (``zero_grad(set_to_none=True)``); "accumulated" ones add to existing ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import limits, peers
from benchmarks.harness import COMPILED, OURS, Config, Result, Run, main, name_of, take_turns
from edge_kernels.ops.head import product_dtype

ACCUMULATED = (OURS, COMPILED)
WORK = "loss from hidden states"
MAX_EXACT_ROWS = 1024  # with more, checking the weight's gradient would take longer than computing it


def configs(quick: bool) -> Sequence[Config]:
    base: Config = {"repetitions": 7, "contenders": None, "pages": "huge", "accumulated": True}
    few = {"contenders": [COMPILED, peers.TRL_HEAD]}
    dtypes = [{**base, "dtype": dtype} for dtype in ("float32", "bfloat16")]
    small = [{**config, "vocab": 49_152, "hidden": 576, "rows": 256} for config in dtypes]
    if quick:
        few["contenders"].append(peers.PLAIN)
        return [{**config, **few, "rows": 32, "repetitions": 3, "max_seconds": 1.0} for config in small]
    large = [{**config, "vocab": 151_936, "hidden": 896, "rows": 128} for config in dtypes]
    # Without bfloat16 instructions a product takes seconds: fewer contenders.
    large[1]["contenders"] = [COMPILED, peers.TRL_HEAD, peers.VERL]
    wide = [{**config, **few, "hidden": 1536, "accumulated": False} for config in large]
    ordinary = [{**config, "contenders": [COMPILED], "pages": "ordinary"} for config in large]
    return [*large, *wide, *small, *ordinary]


def make_head(rows: int, vocab: int, hidden: int, dtype: torch.dtype, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return hidden states (B, T, D) and weight (V, D) whose logits are like a language model's, the targets likely."""
    generator = torch.Generator().manual_seed(vocab + hidden)
    weight = torch.randn(vocab, hidden, generator=generator).mul_(2.5 / hidden**0.5)
    states = torch.randn(rows, hidden, generator=generator) + 2 * weight[targets.flatten()]
    return states.view(*targets.shape, hidden).to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def measure(config: Config) -> list[Result]:
    rows, vocab, dtype = config["rows"], config["vocab"], getattr(torch, config["dtype"])
    batch = peers.make_batch(*peers.split(rows), vocab)
    hidden, weight = make_head(rows, vocab, config["hidden"], dtype, batch.targets)
    found, missing = peers.available(peers.HEADS, config["contenders"])
    if config.get("skip_plain"):  # plain PyTorch's logits may not fit into memory
        found.pop(peers.PLAIN)
    num_flops = 6.0 * rows * vocab * config["hidden"]
    # Ours is never left out: it multiplies in float32 where bfloat16 is slow.
    flops = {name: num_flops for name in (*found, limits.THREE_PRODUCTS) if name != OURS}
    left_out = limits.too_slow({**flops, limits.SQUARE_PRODUCT: limits.SQUARE_FLOPS}, dtype, config.get("max_seconds"))
    missing |= left_out
    found = {name: loss for name, loss in found.items() if name not in left_out or name == peers.PLAIN}
    if peers.PLAIN in left_out:
        found[peers.PLAIN] = peers.plain_head_by_float32  # the measure of accuracy
    calls = {name: partial(with_gradient, loss, hidden, weight, batch) for name, loss in found.items()}
    errors, failed, _ = check(calls, hidden, weight, batch)
    if peers.PLAIN in found:
        peers.require_exact(errors, WORK)
    drop, own = partial(set_gradients, hidden, weight), hidden.nbytes + weight.nbytes
    skipped = {*failed, *left_out}
    names = [name for name in calls if name not in skipped and peers.is_timed(name, config["contenders"])]
    runs = {name: Run(calls[name], drop, own) for name in names}
    floors: dict[str, Run] = {}
    if config.get("accumulated"):
        keep = partial(set_gradients, hidden, weight, torch.zeros_like(weight))
        for name in ACCUMULATED:
            if name in runs:
                runs[f"{name}, accumulated"] = Run(calls[name], keep, hidden.nbytes)
    if not config.get("memory_only"):
        floors = limits.products(hidden.flatten(0, 1), weight) | limits.square_product(dtype)
        floors = {name: run for name, run in floors.items() if name not in left_out}
    products = product_dtype(dtype, hidden.device)
    times = take_turns({**runs, **floors}, config["repetitions"])
    measured = {name: times.pop(name) for name in floors}
    for name, row in times.items():
        row |= {"errors": errors[name]} if name in errors else {}
        row |= {"note": peers.NOTES[name]} if name in peers.NOTES else {}
        if name.startswith(OURS) and products != dtype:
            row["note"] = f"computes in {name_of(products)}: this CPU has no {name_of(dtype)} instructions"
    times |= {name: {"failed": reason} for name, reason in failed.items()}
    where = {key: config[key] for key in ("dtype", "vocab", "rows", "hidden", "pages")}
    floor_of = limits.rates(measured, num_flops=num_flops)
    return [
        {
            "work": WORK,
            **where,
            "floor": limits.THREE_PRODUCTS,
            "contenders": times,
            "limits": floor_of,
            "missing": missing,
        }
    ]


def set_gradients(hidden: Tensor, weight: Tensor, of_weight: Tensor | None = None) -> None:
    hidden.grad, weight.grad = None, of_weight


def with_gradient(loss: peers.HeadLoss, hidden: Tensor, weight: Tensor, batch: peers.Batch) -> peers.Answer:
    out = loss(hidden, weight, batch)
    out.loss.backward()
    return out


def check(
    calls: Mapping[str, Callable[[], peers.Answer]],
    hidden: Tensor,  # (B, T, D)
    weight: Tensor,  # (V, D)
    batch: peers.Batch,
) -> peers.Checked:
    """Return each contender's errors against float64. It is also the warm-up.

    The weight's gradient is compared in every 37th row and in those of some targets. With more than ``MAX_EXACT_ROWS``
    hidden states it is not compared, and the rest only in 64 rows.
    """
    targets = batch.targets.flatten()
    states, matrix = hidden.detach().flatten(0, 1), weight.detach().double()
    is_whole = len(targets) <= MAX_EXACT_ROWS
    rows = torch.linspace(0, len(targets) - 1, min(64, len(targets))).long()
    if is_whole:
        rows = torch.arange(len(targets))
    columns = torch.cat([torch.arange(0, len(weight), 37), targets[:64]]).unique()
    d_weight = torch.zeros(len(columns), states.shape[1], dtype=torch.float64)
    parts = []
    for part in rows.split(64):
        part_states = states[part].double()
        logprobs, entropy, p = peers.exact_statistics(part_states @ matrix.t(), targets[part])
        coefficients = peers.exact_coefficients(entropy, batch, False)[part]
        gradient = peers.exact_gradient(p, targets[part], coefficients)
        parts.append((logprobs, entropy, gradient @ matrix))
        d_weight += gradient[:, columns].t() @ part_states
    del matrix
    exact = [torch.cat(part) for part in zip(*parts, strict=True)]
    errors, failed, lowest_entropy = checked = peers.Checked({}, {}, {})
    for name, call in calls.items():
        set_gradients(hidden, weight)
        got = peers.attempt(name, call, failed)
        if got is None:
            continue
        assert hidden.grad is not None
        assert weight.grad is not None
        named = (("logprob", got.logprobs, exact[0]), ("entropy", got.entropy, exact[1]))
        errors[name] = {kind: peers.error(a.flatten()[rows], b) for kind, a, b in named if a is not None}
        errors[name]["d hidden"] = peers.error(hidden.grad.flatten(0, 1)[rows], exact[2], relative=True)
        if is_whole:
            errors[name]["d weight"] = peers.error(weight.grad[columns], d_weight, relative=True)
        if got.entropy is not None:
            lowest_entropy[name] = got.entropy.min().item()
    set_gradients(hidden, weight)
    return checked


if __name__ == "__main__":
    sys.exit(main("head", __doc__, configs))
