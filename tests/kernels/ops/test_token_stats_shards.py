"""What ``edge_kernels.parallel`` needs of every backend: statistics of some columns of a row that can be merged with
those of others, and a gradient of some columns from the whole row's statistics.
"""

from __future__ import annotations

import pytest
import torch
from backends import BACKENDS, WIDEST
from token_rows import make_rows
from torch import Tensor

from edge_kernels._checks import IGNORE_INDEX
from edge_kernels.backend import kernels
from edge_kernels.contract import HUGE, Kernels, KernelStats, StatsGradients, Transform
from edge_kernels.ops.linear_token_stats import head_kernels, linear_token_stats_op

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.parametrize("backend", BACKENDS, indirect=True)]

INF = float("inf")
# Linear with either sign of the slope, and with a soft cap: kernels keep different maxima for each.
TRANSFORMS = [
    Transform(1.0, None, 1.0, IGNORE_INDEX),
    Transform(0.7, None, 1.5, IGNORE_INDEX),
    Transform(1.3, None, -0.5, IGNORE_INDEX),
    Transform(0.6, 20.0, 1.0, IGNORE_INDEX),
]


def assert_maximum_is_known(stats: KernelStats, backend: Kernels, transform: Transform) -> None:
    """logsumexp is the maximum in nats and log total, whatever unit the backend has the maximum in."""
    fine, coarse = backend.units_per_nat(transform, torch.device("cpu"))
    maximum = stats.maximum.double()
    nats = torch.where(maximum.abs() > HUGE, maximum / coarse, maximum / fine)
    torch.testing.assert_close(nats + stats.total.double().log(), stats.logsumexp.double(), rtol=2e-7, atol=1e-5)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_the_maximum_has_a_known_unit(transform: Transform) -> None:
    logits, targets = make_rows(6, 37, WIDEST)
    logits[1] += 3e4
    logits[2] *= 1e3
    logits[3] *= 1e12  # in powers of two beyond HUGE, where units change
    logits[4] -= 3e4
    backend = kernels(logits)
    assert_maximum_is_known(backend.token_stats_forward(logits, targets, transform), backend, transform)
    hidden, weight = torch.randn(6, 8, dtype=WIDEST), torch.randn(37, 8, dtype=WIDEST)
    options = (WIDEST, 0)
    stats = KernelStats(*linear_token_stats_op(hidden, weight, None, targets, *options, transform.pack(), None))
    assert_maximum_is_known(stats, head_kernels(hidden, weight, None, *options, None), transform)


def test_the_total_tells_an_empty_row_from_a_broken_one() -> None:
    logits, targets = make_rows(5, 300, torch.float32)
    logits[0], logits[1, 7], logits[2, 299], logits[3, :299] = -INF, float("nan"), INF, -INF
    targets[3] = 299
    for given in (targets, None):
        stats = kernels(logits).token_stats_forward(logits, given, TRANSFORMS[0])
        assert stats.total[0] == 0
        assert stats.total[1:3].isnan().all()
        assert abs(float(stats.total[3]) - 1) < 1e-6
        assert stats.entropy[:3].isnan().all()
        gradients = StatsGradients(None if given is None else torch.ones(5), None, torch.ones(5) * 2)
        out = torch.zeros_like(logits)
        kernels(logits).token_stats_backward(logits, given, stats, gradients, TRANSFORMS[0], out=out)
        assert out[:3].isnan().any(-1).all()
        assert out[3:].isfinite().all()


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_some_columns_get_their_part_of_the_gradient(transform: Transform) -> None:
    logits, targets = make_rows(4, 41, WIDEST)
    backend = kernels(logits)
    stats = backend.token_stats_forward(logits, targets, transform)
    gradients = StatsGradients(*(torch.randn(3, 4, generator=torch.Generator().manual_seed(2)).to(stats.total.dtype)))
    whole: Tensor = torch.empty_like(logits)
    backend.token_stats_backward(logits, targets, stats, gradients, transform, out=whole)
    for columns in (slice(0, 1), slice(1, 24), slice(24, 41)):
        shard = logits[:, columns].contiguous()
        own = targets - columns.start
        own = own.masked_fill((own < 0) | (own >= shard.shape[1]), -1)
        out = torch.full_like(shard, float("nan"))
        backend.token_stats_backward(shard, own, stats, gradients, transform, out=out)
        torch.testing.assert_close(out, whole[:, columns], rtol=0, atol=1e-6)
