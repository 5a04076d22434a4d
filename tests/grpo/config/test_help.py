"""The help about the keys: complete, beside the fields, and laid out for a terminal."""

from __future__ import annotations

import dataclasses

import pytest

from edge_grpo.config import TrainConfig, describe, flatten, keys_help, to_dict
from edge_grpo.config import help as help_module
from edge_kernels.config import GRPOLossConfig


def test_every_key_has_help_and_a_default_that_loads() -> None:
    entries = list(describe())
    assert len({entry.key for entry in entries}) == len(entries)
    assert [entry.key for entry in entries if len(entry.help) < 7] == []
    described = {entry.key: list(d) if isinstance(d := entry.default, tuple) else d for entry in entries}
    assert described == flatten(to_dict(TrainConfig()))


def test_help_stands_once_beside_its_field() -> None:
    by_key = {entry.key: entry for entry in describe()}
    assert by_key["rollout.num_generations"].help == "responses per prompt: the group size G"
    assert by_key["reward.weights"].help.startswith("by name: accuracy (answer right)")  # from the line above
    assert by_key["correction.superseded"].help.startswith("tokens of the wrong attempt that")  # from two lines above
    assert by_key["correction.superseded"].help.endswith("so that they have no loss")
    assert by_key["rollout.engine"].choices == ["transformers", "vllm", "vllm-server"]
    assert by_key["loss.delta"].choices == []
    # edge_kernels documents its fields in docstrings: one paragraph may speak for several.
    assert by_key["loss.epsilon_low"].help == by_key["loss.epsilon_high"].help
    assert by_key["loss.sft_weight"].help == "see injected, which uses it"
    fields = {field.name for field in dataclasses.fields(GRPOLossConfig)} - {"eda"}
    assert fields <= set(help_module._notes(GRPOLossConfig))


def test_few_keys_are_shown_unless_all_are_asked_for() -> None:
    few, everything = keys_help(100, every=False), keys_help(100, every=True)
    assert 20 <= len(help_module.COMMON) <= 30
    for entry in describe():
        assert f"\n  {entry.key}=" in everything
        assert entry.help in " ".join(everything.split())
        assert (f"\n  {entry.key}=" in few) == (entry.key in help_module.COMMON)
    assert few.startswith("the most used configuration keys (--help all shows every key)")
    assert "\n  reward.weights={accuracy: 1.0}  " in few


@pytest.mark.parametrize("width", [60, 80, 120])
def test_lines_fit_the_width(width: int) -> None:
    for every in (False, True):
        too_long = [line for line in keys_help(width, every=every).splitlines() if len(line) > width]
        assert [line for line in too_long if "=" not in line] == []  # only a key with its default may be longer
