"""Engines of vLLM in trainer processes, one for each or shared: a stand-in everywhere, and vLLM where it is installed.

The processes are real ones over gloo; what they do is in colocated.py. vLLM in one process: rollout/test_vllm.py.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from forked import run_program
from training import records
from transformers import LlamaConfig

from edge_grpo.rollout.vllm import check_heads

pytestmark = pytest.mark.slow


def check(output: Path) -> list[list[str]]:
    """Three steps, the last after resuming, each sampled with the weights before it; and nobody waits for who fails.

    Returns what the stand-in was told in each process.
    """
    made = records(output)
    assert [record["step"] for record in made] == [0, 1, 2, 3]
    for record in made[1:]:
        assert record["ratio/sampler_max"] == pytest.approx(1, abs=1e-2)
        assert record["drift/logprob_max"] < 1e-3
        assert record["grad/norm"] > 0  # so that the next step samples with other weights
    both = written(output)
    first, second = (one["said"] for one in both)
    assert "nats on average" in first[0]
    assert "nats on average" in second[0]
    assert second[1] == "ValueError: no room for the second tensor"
    assert first[1] == f"RolloutError: process 1 of this run failed: {second[1]}"
    assert first[2:4] == second[2:4] == [None, None]
    assert "the engine holds" in first[4]
    assert second[4] == f"RolloutError: process 0 of this run failed: {first[4]}"
    assert (first[5], second[5]) == (1, 2)
    assert first[6] == second[6] == [0, 1]
    return [one["events"] for one in both]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand-ins")
    run_program("colocated.py", folder, "stand-in")
    return folder


@pytest.mark.parametrize("layout", ["none-2-1", "fsdp2-2-1", "none-2-2", "fsdp2-2-2"])
def test_training(stand_ins: Path, layout: str) -> None:
    """With whole and with split parameters: an engine that left a tensor ungathered would hang the other process."""
    push = ["load", "reset cache"]
    both = check(stand_ins / layout)
    for told in both:
        assert told[:4] == ["start external_launcher", *push, "generate"]  # which is compared with the policy
        # Corrections may have nothing to continue in one process.
        training = [event for event in trained(told)[4:] if event != "generate"]
        step = ["sleep 2", "wake weights", "load", "wake kv_cache", "reset cache"]
        assert training == step * 2
        assert told[told.index("shutdown") + 1] == "end engine's groups"
        assert "end process group" not in told
    if layout.endswith("-2"):  # they share one engine
        assert trained(both[0]) == trained(both[1])


def trained(told: list[str]) -> list[str]:
    """What the first run's engine was told."""
    return told[: told.index("shutdown")]


def test_training_does_not_depend_on_who_shares_an_engine(stand_ins: Path) -> None:
    alone, shared = (records(stand_ins / layout)[1:] for layout in ("none-2-1", "none-2-2"))
    timing = ("time/", "throughput/", "memory/")
    for one, other in zip(alone, shared, strict=True):
        for name in one:
            if not name.startswith(timing):
                assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name


def sampled(output: Path) -> dict[tuple[int, int], tuple[list[int], list[float]]]:
    """What all processes of a layout sampled, by seed and place."""
    shares = [share["sampled"] for share in written(output)]
    return {(seed, place): (ids, logprobs) for share in shares for seed, place, ids, logprobs in share}


def written(output: Path) -> list[dict[str, Any]]:
    """By each process."""
    return [json.loads(file.read_text()) for file in sorted(output.parent.glob(f"{output.name}.[0-9]"))]


def check_sampled(output: Path, alone: Path) -> None:
    """The same responses as in one process, before the weights change and after it."""
    own, expected = sampled(output), sampled(alone)
    assert own.keys() == expected.keys() == {(seed, place) for seed in (1, 3) for place in range(8)} | {(2, 7), (4, 7)}
    for key, (ids, logprobs) in expected.items():
        assert own[key][0] == ids, key
        assert own[key][1] == pytest.approx(logprobs, abs=1e-3), key
    assert any(expected[1, place][0] != expected[3, place][0] for place in range(8))


@pytest.mark.parametrize("layout", ["none-2-1", "none-2-2", "fsdp2-2-2", "none-4-2"])
def test_responses_are_those_of_one_process(stand_ins: Path, layout: str) -> None:
    check_sampled(stand_ins / layout, stand_ins / "none-1-1")


def test_heads_that_cannot_be_split_are_refused() -> None:
    """As vLLM splits them: key-value heads of which there are fewer than devices are held by several."""
    for number, pairs, size in ((4, 2, 2), (4, 2, 4), (4, 4, 1), (12, 2, 6), (9, 3, 3)):
        check_heads(heads(number, pairs), size)
    for number, pairs, size in ((9, 3, 2), (4, 4, 3), (12, 3, 2)):
        with pytest.raises(ValueError, match=f"must divide.*; got {size} for {number} and {pairs} heads"):
            check_heads(heads(number, pairs), size)


def heads(number: int, pairs: int) -> LlamaConfig:
    return LlamaConfig(num_attention_heads=number, num_key_value_heads=pairs, hidden_size=2 * number)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What vLLM samples in one process."""
    folder = tmp_path_factory.mktemp("alone")
    run_program("colocated.py", folder, "none-1-1")
    return folder / "none-1-1"


@pytest.mark.vllm
@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; `make vllm` installs it for the CPU"
)
@pytest.mark.parametrize("layout", ["none-2-1", "fsdp2-2-2"])
def test_real_vllm(tmp_path: Path, alone: Path, layout: str) -> None:
    run_program("colocated.py", tmp_path, layout)
    check(tmp_path / layout)
    check_sampled(tmp_path / layout, alone)
    [whole] = written(alone)
    for share in written(tmp_path / layout):  # but for norms
        assert share["held"] == pytest.approx(whole["held"] / int(layout[-1]), rel=0.01)
