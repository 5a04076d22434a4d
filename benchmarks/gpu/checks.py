"""The check of each of our backends against float64, on every op it has; nothing is timed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import accuracy, head, logits, peers
from benchmarks.gpu import head_ways
from benchmarks.gpu.device import Device, with_backend
from benchmarks.gpu.inputs import Sizes, make_batch, make_head
from benchmarks.harness import OURS, WrongError, name_of
from benchmarks.peers import PLAIN, Answer, Batch
from edge_kernels import linear_token_stats, token_entropy, token_stats, use_backend


def check(sizes: Sizes, device: Device, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the largest errors of each backend and dtype; raises WrongError if plain PyTorch's are smaller."""
    largest: dict[str, dict[str, float]] = {}
    checks = (_check_logits, _check_head, _check_statistics, _check_linear_statistics)
    for dtype, name, work, errors in itertools.chain.from_iterable(c(sizes, device, names) for c in checks):
        kept = largest.setdefault(f"{name}, {dtype}, {work}", {})
        for kind, error in errors.items():
            kept[kind] = max(kept.get(kind, 0.0), error)
    return largest


Errors = Iterator[tuple[str, str, str, dict[str, float]]]  # dtype, contender, work, errors by kind


def _judged(dtype: str, checked: peers.Checked, work: str, where: str) -> Errors:
    for name, reason in checked.failed.items():
        raise WrongError(f"{where}: {name} failed: {reason}")
    plain = checked.errors[PLAIN]
    if work not in (logits.LOSS, logits.FORWARD, head.WORK):
        # A quotient of entropies, a soft cap, sums of three gradients: smaller differences are chance.
        plain = {kind: max(error, 2e-5) for kind, error in plain.items()}
    peers.require_exact({**checked.errors, PLAIN: plain}, where)
    for name, found in checked.errors.items():
        lowest = checked.lowest_entropy.get(name, 0.0)
        if name.startswith(OURS) and not lowest >= 0:
            raise WrongError(f"{where}: an entropy of {lowest:.3g} by {name}")
        yield dtype, name, work, found


def _check_logits(sizes: Sizes, device: Device, names: Sequence[str]) -> Errors:
    for dtype, (rows, vocab), kind in itertools.product(sizes.dtypes, sizes.checked, accuracy.ROWS):
        if vocab == 1 and kind != "ordinary":
            continue
        batch = make_batch(rows, vocab, device)
        config = {"rows": rows, "vocab": vocab, "dtype": name_of(dtype)}
        pristine = accuracy.make_rows(kind, config, batch.targets.cpu()).to(device.kind)
        buffer = pristine.clone()
        shaped = buffer.view(*batch.targets.shape, vocab)
        refill = partial(buffer.copy_, pristine)
        for work in (logits.LOSS, logits.DRIVEN, logits.FORWARD):
            if vocab == 1 and work == logits.DRIVEN:
                continue  # an entropy of 0 relative to a mean of 0
            calls: dict[str, logits.Call] = {}
            for name, chosen in [(PLAIN, None), *((f"{OURS}, {name}", name) for name in names)]:
                of_statistics, of_loss = peers.LOGITS[PLAIN if chosen is None else OURS]()
                call: logits.Call = partial(logits.with_gradient, of_loss, shaped, batch, work == logits.DRIVEN)
                if work == logits.FORWARD:
                    call = partial(logits.without_gradient, of_statistics, shaped, batch)
                calls[name] = call if chosen is None else with_backend(chosen, call)
            with torch.device(device.kind):
                exact = logits.Exact.of(pristine, batch.targets.flatten())
                checked = logits.check(calls, refill, exact, batch, work)
            where = f"{work}, {name_of(dtype)}, {rows} x {vocab}, {kind} rows"
            yield from _judged(name_of(dtype), checked, work, where)


def _check_head(sizes: Sizes, device: Device, names: Sequence[str]) -> Errors:
    for dtype, (rows, vocab, hidden) in itertools.product(sizes.dtypes, sizes.checked_head):
        batch = make_batch(rows, vocab, device)
        states, weight = make_head(rows, vocab, hidden, dtype, batch, device)
        calls: dict[str, Callable[[], Answer]] = {
            PLAIN: partial(head.with_gradient, peers.plain_head, states, weight, batch)
        }
        problem = head_ways.problem_of(rows, vocab, hidden, dtype, device.kind)
        call = partial(_loss_and_gradients, states, weight, batch)
        calls |= head_ways.calls(names, problem, call)
        with torch.device(device.kind):
            checked = head.check(calls, states, weight, batch)
        yield from _judged(name_of(dtype), checked, head.WORK, f"{head.WORK}, {name_of(dtype)}, {rows} x {vocab}")


def _loss_and_gradients(hidden: Tensor, weight: Tensor, batch: Batch, loss: peers.HeadLoss) -> Answer:
    return head.with_gradient(loss, hidden, weight, batch)


Op = Callable[..., tuple[Tensor, ...]]  # of leaves, to outputs with a gradient


def _check_statistics(sizes: Sizes, device: Device, names: Sequence[str]) -> Errors:
    """The statistics with gradients of all of them, and with rows that are ignored or broken."""
    for dtype, (rows, vocab), kind in itertools.product(sizes.dtypes, sizes.checked, accuracy.ROWS):
        if vocab == 1 and kind != "ordinary":
            continue
        targets = peers.make_batch(1, rows, vocab).targets[0]
        config = {"rows": rows, "vocab": vocab, "dtype": name_of(dtype)}
        values = accuracy.make_rows(kind, config, targets).to(device.kind)
        targets = targets.to(device.kind)
        targets[1::3] = -100
        ops: dict[str, Op] = {
            "token_stats with gradients": lambda x, y=targets: tuple(token_stats(x, y, temperature=0.7)),
            "token_stats with a soft cap": lambda x, y=targets: tuple(token_stats(x, y, softcap=30.0)),
            "token_entropy": lambda x: (token_entropy(x),),
        }
        for work, op in ops.items():
            where = f"{work}, {name_of(dtype)}, {rows} x {vocab}, {kind} rows"
            yield from _judged(name_of(dtype), _against_reference(op, (values,), names), work, where)
        if kind == "ordinary" and rows >= 4:
            _check_broken(values, names, f"{name_of(dtype)}, {rows} x {vocab}")


def _check_linear_statistics(sizes: Sizes, device: Device, names: Sequence[str]) -> Errors:
    for dtype, (rows, vocab, hidden) in itertools.product(sizes.dtypes, sizes.checked_head):
        batch = make_batch(rows, vocab, device)
        states, weight = make_head(rows, vocab, hidden, dtype, batch, device)
        bias = torch.linspace(-1, 1, vocab, dtype=dtype, device=device.kind)
        leaves = states.detach().flatten(0, 1), weight.detach(), bias
        targets = batch.targets.flatten()
        op: Op = partial(_linear_statistics, targets)
        where = f"linear_token_stats, {name_of(dtype)}, {rows} x {vocab}"
        yield from _judged(name_of(dtype), _against_reference(op, leaves, names), "linear_token_stats", where)


def _linear_statistics(targets: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return tuple(linear_token_stats(hidden, weight, targets, bias))


def _against_reference(op: Op, leaves: tuple[Tensor, ...], names: Sequence[str]) -> peers.Checked:
    """Return the errors of our backends and, as plain PyTorch's, of the reference in the leaves' dtype."""

    def outputs_and_gradients(values: tuple[Tensor, ...]) -> dict[str, Tensor]:
        inputs = [value.detach().requires_grad_() for value in values]
        outputs = op(*inputs)
        # Weights between 0.5 and 1.5, different for each output, so that mixed-up gradients are noticed.
        total = torch.zeros((), dtype=torch.float64, device=inputs[0].device)
        for i, out in enumerate(outputs):
            weight = torch.arange(out.numel(), device=out.device) * (i + 1) % 7 / 7 + 0.5
            total = total + (out.double().flatten() * weight).sum()
        gradients = torch.autograd.grad(total, inputs)
        named = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
        return named | {f"gradient {i}": gradient for i, gradient in enumerate(gradients)}

    with use_backend("reference"):
        exact = outputs_and_gradients(tuple(leaf.double() for leaf in leaves))
    errors, failed, _ = checked = peers.Checked({}, {}, {})
    for name, backend in [(PLAIN, "reference"), *((f"{OURS}, {name}", name) for name in names)]:
        with use_backend(backend):
            got = peers.attempt(name, lambda: outputs_and_gradients(leaves), failed)
        if got is not None:
            errors[name] = {}
            for kind, value in exact.items():
                # A nearly one-hot row has a gradient of about 0, and one of equal logits an entropy's of 0.
                scale = value.abs().max().clamp(min=1e-4).item() if kind.startswith("gradient") else 1.0
                errors[name][kind] = peers.error(got[kind].double() / scale, value / scale)
    return checked


def _check_broken(values: Tensor, names: Sequence[str], where: str) -> None:
    """Raise WrongError unless a NaN, a +inf and a row of -inf make their rows NaN, and no others."""
    broken = values.clone()
    broken[0, 0], broken[2, -1], broken[3] = math.nan, math.inf, -math.inf
    expected = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    expected[[0, 2, 3]] = True
    for name in names:
        with use_backend(name):
            found = token_entropy(broken).isnan()
        if not torch.equal(found, expected):
            raise WrongError(
                f"token_entropy, {where}: NaN in rows {found.nonzero().flatten().tolist()[:8]}, not 0, 2, 3"
            )
