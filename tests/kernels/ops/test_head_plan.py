"""What a GPU's head is predicted to cost, and which way it therefore goes: arithmetic, nothing is run."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_kernels.ops import head_plan
from edge_kernels.ops.head_plan import COLUMNS, FUSED, MEMORY_BUDGET, RATES, TILES, Plan, Problem, choose, every_plan

H100 = RATES["sm_90"]
LARGE = Problem(
    rows=16_384,
    hidden=3_584,
    vocab=151_936,
    itemsize=2,
    weight_itemsize=2,
    advantages_known=True,
    wants_weight=True,
    sums_in_place=True,
    fuses=True,
    takes_statistics=True,
)


def plans(problem: Problem, memory_budget: int = MEMORY_BUDGET) -> dict[str, Plan]:
    return {plan.way: plan for plan in every_plan(problem, memory_budget, H100)}


def test_on_paper_on_an_h100() -> None:
    """Three products take 67 ms at 798 Tflop/s; memory moves 3.0 TB/s."""
    assert (H100.products, H100.memory) == (798e12, 3.0e12)
    three = 6 * LARGE.rows * LARGE.hidden * LARGE.vocab / H100.products
    assert three == pytest.approx(67e-3, abs=0.5e-3)
    assert 110e-3 <= plans(LARGE)[FUSED].seconds <= 130e-3
    for height in (2_048, 3_328):  # 8 and 5 tiles
        budget = 4 * LARGE.vocab * LARGE.hidden + height * (2 * LARGE.vocab + 4 * LARGE.hidden) + 2**22
        plan = plans(LARGE, budget)[TILES]
        assert plan.height == height
        assert 77e-3 <= plan.seconds <= 85e-3
    chosen = choose(LARGE, MEMORY_BUDGET, H100)
    assert chosen.way == TILES
    assert 77e-3 <= chosen.seconds <= 85e-3
    assert chosen.extra_bytes <= MEMORY_BUDGET


def test_sums_of_the_weights_gradient_set_the_height() -> None:
    """They pass 8 bytes a weight for each tile: at 4 F / B = 1,064 rows as long as one of the tile's three products."""
    balance = 4 * H100.products / H100.memory
    assert balance == 1064
    for hidden, vocab in ((1_536, 151_936), (3_584, 151_936), (4_096, 32_064)):
        tile = plans(LARGE._replace(rows=1_024, hidden=hidden, vocab=vocab), 2**40)[TILES]
        sums = 8 * vocab * hidden / H100.memory
        product = 2 * 1_024 * vocab * hidden / H100.products
        assert sums / product == pytest.approx(balance / 1_024)
        # A tile costs its products, a read and a write of its logits, and where there are several those sums.
        assert tile.seconds == pytest.approx(3 * product + 4 * 1_024 * vocab / H100.memory)


def test_one_tile_has_no_sums() -> None:
    one = plans(LARGE, 2**40)[TILES]
    assert one.height == LARGE.rows
    assert one.extra_bytes < 2**20 * 5_000  # 4.98 GB of logits, hidden states, numbers of tokens
    assert one.seconds == pytest.approx(67.1e-3 + 3.3e-3, abs=2e-4)


def test_with_too_little_memory_for_the_sums_the_weights_gradient_takes_a_pass_of_its_own() -> None:
    small = choose(LARGE, 2**30, H100)
    assert small.way == COLUMNS
    assert 4 / 3 * 67e-3 < small.seconds < plans(LARGE)[FUSED].seconds
    # A fifth product where the statistics come first: the fused kernels' four are as fast.
    assert choose(LARGE._replace(advantages_known=False), 2**30, H100).way == FUSED
    assert choose(LARGE._replace(advantages_known=False), MEMORY_BUDGET, H100).way == TILES


def test_a_budget_that_is_too_small_says_what_is_needed() -> None:
    wording = r"memory_budget must be at least [\d,]+ bytes for N = 16,384 rows, .* got 1,000; raise it, or split"
    with pytest.raises(ValueError, match=wording) as error:
        choose(LARGE, 1_000, H100)
    least = int(str(error.value).split("at least ")[1].split(" bytes")[0].replace(",", ""))
    assert choose(LARGE, least, H100).extra_bytes <= least
    with pytest.raises(ValueError, match="at least"):
        choose(LARGE, least - 1, H100)


SIZES = st.builds(
    Problem,
    rows=st.integers(0, 10**6),
    hidden=st.integers(1, 2**14),
    vocab=st.integers(1, 300_000),
    itemsize=st.sampled_from([2, 4]),
    weight_itemsize=st.sampled_from([2, 4]),
    advantages_known=st.booleans(),
    wants_weight=st.booleans(),
    sums_in_place=st.booleans(),
    fuses=st.booleans(),
    takes_statistics=st.booleans(),
)


@given(SIZES, st.lists(st.integers(10**4, 10**11), min_size=2, max_size=8), st.sampled_from(sorted(RATES)))
def test_more_memory_is_never_slower(problem: Problem, budgets: list[int], architecture: str) -> None:
    previous = math.inf
    for budget in sorted(budgets):
        try:
            plan = choose(problem, budget, RATES[architecture])
        except ValueError:
            assert previous == math.inf  # what a smaller budget allows, a larger one does
            continue
        assert plan.extra_bytes <= budget
        assert plan.seconds <= previous * (1 + 1e-12)
        previous = plan.seconds


@given(SIZES, st.integers(10**4, 10**11))
def test_tiles_are_equal_and_whole_blocks(problem: Problem, budget: int) -> None:
    for plan in every_plan(problem, budget, H100):
        if plan.way == FUSED:
            continue
        assert plan.height >= 1
        if problem.rows > plan.height >= head_plan.ROWS_OF_BLOCK:
            assert plan.height % head_plan.ROWS_OF_BLOCK == 0
        if problem.rows > plan.height:
            tiles = -(-problem.rows // plan.height)
            rest = problem.rows - (tiles - 1) * plan.height
            assert plan.height - rest < head_plan.ROWS_OF_BLOCK * tiles


def test_more_products_take_longer() -> None:
    for way, plan in plans(LARGE).items():
        twice = plans(LARGE._replace(rows=2 * LARGE.rows), 2 * MEMORY_BUDGET)[way]
        assert 1.8 * plan.seconds < twice.seconds < 2.1 * plan.seconds
        assert plans(LARGE._replace(advantages_known=False))[way].seconds >= plan.seconds


def test_the_fused_kernels_buffer_is_the_one_that_they_allocate() -> None:
    tuning = pytest.importorskip("edge_kernels.backends.triton.tuning", reason="needs Triton")
    assert head_plan.FUSED_BUFFER_BYTES == tuning.TILE_BYTES


def test_ways_have_names_and_a_cpu_needs_no_plan() -> None:
    hidden, weight = torch.ones(3, 2), torch.ones(5, 2)
    assert head_plan.plan_of(hidden, weight, torch.float32, 0, advantages_known=True) is None
    with head_plan.use_way(TILES):
        plan = head_plan.plan_of(hidden, weight, torch.float32, 0, advantages_known=True)
        assert plan is not None
        assert (plan.way, plan.height) == (TILES, 3)
    assert head_plan.selects_rows(hidden)
    wording = "way must be one of 'fused', 'tiles', 'columns', or None; got 'rows'"
    with pytest.raises(ValueError, match=wording), head_plan.use_way("rows"):
        pass
    with head_plan.use_way(FUSED), pytest.raises(ValueError, match="there is no way 'fused' for this head"):
        head_plan.plan_of(hidden, weight, torch.float32, 0, advantages_known=True)
