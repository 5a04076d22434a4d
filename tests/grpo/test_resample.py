"""``rollout.resample``: groups whose rewards are all equal make room for other prompts, the same in a resumed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from corrections import ScriptedEngine, cut, decode, encode, sampled
from test_collect import Grades, Letters
from training import records

from edge_grpo.batching import Sample
from edge_grpo.collect import Collected, Collector, collapsed_groups
from edge_grpo.config import CorrectionConfig, RolloutConfig, TrainConfig, to_dict
from edge_grpo.metrics import PhaseTimes, resample_metrics
from edge_grpo.trainer import train
from edge_grpo.types import Example, Prompt, Response, Reward, Sampling

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*use_reentrant.*")]

NUM_ROWS = 12
BOTH = ("5", "6")  # one right, one wrong


class ByPrompt(ScriptedEngine):
    """Answers the n-th response of a prompt with its n-th text; those in ``answers`` differ from ``BOTH``."""

    def __init__(self, answers: Mapping[int, Sequence[str]], continuation: str = "5") -> None:
        super().__init__()
        self.answers, self.continuation = answers, continuation

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int, places: Sequence[int] | None = None
    ) -> list[Response]:
        self.calls.append(([tuple(ids) for ids in prompts], sampling, seed))
        texts = []
        for place, ids in enumerate(prompts):
            row, _, begun = decode(ids).partition("?")
            texts.append(self.continuation if begun else self.answers.get(int(row), BOTH)[place % 2])
        return [cut(sampled(text), sampling.max_tokens) for text in texts]


def collector(engine: ScriptedEngine, *, rounds: int, rank: int = 0, processes: int = 1, **settings: object):
    """Steps of four groups of two, of twelve rows."""
    config = TrainConfig(
        **{"method": "grpo", **settings},
        rollout=RolloutConfig(num_prompts=4, num_generations=2, max_completion_length=30, resample=rounds),
        correction=CorrectionConfig(mix={"reflect": 1.0}, reflection_text=" No!", max_length=20),
    )
    texts = [f"{number}?" for number in range(NUM_ROWS)]
    return Collector(
        config,
        [Prompt(Example(n, text, "5"), text, tuple(encode(text))) for n, text in enumerate(texts)],
        engine=engine,
        rewarder=Grades(),
        tokenizer=Letters(),
        eos_token_ids=[0, 1],
        rank=rank,
        processes=processes,
    )


def collect(own: Collector, step: int = 1) -> Collected:
    return own.collect(step, PhaseTimes(torch.device("cpu")))


def rows(samples: Sequence[Sample]) -> list[int]:
    return [sample.prompt.example.index for sample in samples]


def test_collapsed_groups_make_room_for_other_prompts():
    base = rows(collect(collector(ByPrompt({}), rounds=0)).samples)[::2]
    equal = {base[1]: ("5", "5"), base[2]: ("6", "6")}  # all right, all wrong
    engine = ByPrompt(equal)
    found = collect(collector(engine, rounds=3))
    kept = rows(found.samples)[::2]
    assert [sample.group for sample in found.samples] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert (kept[0], kept[3]) == (base[0], base[3])  # these keep their prompts and their places
    assert not {kept[1], kept[2]} & set(base)
    assert kept[1] != kept[2]
    assert rows(found.dropped) == [base[1], base[1], base[2], base[2]]
    assert found.rounds == 1
    assert [len(prompts) for prompts, _, _ in engine.calls] == [8, 4]  # no more than is missing
    assert len({seed for _, _, seed in engine.calls}) == 2
    assert collapsed_groups(found.samples) == []


def test_rounds_are_limited_and_the_last_group_stays():
    engine = ByPrompt(dict.fromkeys(range(NUM_ROWS), ("6", "6")))
    found = collect(collector(engine, rounds=2))
    assert found.rounds == 2
    assert len(found.samples) == 8
    assert len(found.dropped) == 16
    seen = [*rows(found.dropped), *rows(found.samples)]
    assert sorted(seen[::2]) == list(range(NUM_ROWS))  # three rounds of four: no row twice while there are others
    assert collapsed_groups(found.samples) == [0, 1, 2, 3]
    more = collect(collector(engine, rounds=5))  # more than there are rows
    assert (more.rounds, len(more.dropped)) == (5, 40)


def test_without_resampling_nothing_is_dropped():
    engine = ByPrompt(dict.fromkeys(range(NUM_ROWS), ("6", "6")))
    found = collect(collector(engine, rounds=0))
    assert (found.rounds, found.dropped, len(engine.calls)) == (0, (), 1)
    assert rows(found.samples) == rows(collect(collector(ByPrompt({}), rounds=9)).samples)


def test_what_counts_are_the_rewards_after_correction():
    """An all-wrong group that correction repairs stays; one whose every response it makes right is dropped."""
    base = rows(collect(collector(ByPrompt({}), rounds=0)).samples)[::2]
    wrong = {base[0]: ("6", "6")}
    one = CorrectionConfig(mix={"reflect": 1.0}, reflection_text=" No!", max_length=20, scope="one")
    engine = ByPrompt(wrong)
    own = collector(engine, rounds=1, method="gec")
    own.corrector.config = one
    repaired = collect(own)
    assert (repaired.rounds, rows(repaired.samples)[::2]) == (0, base)
    assert [sample.response.correction for sample in repaired.samples].count("reflect") == 1

    everything = collect(collector(ByPrompt(wrong), rounds=1, method="gec"))  # all groups become right
    assert everything.rounds == 1
    assert rows(everything.dropped)[::2] == base
    assert {sample.response.correction for sample in everything.dropped} == {None, "reflect"}


def test_skipped_responses_do_not_make_rewards_differ():
    def sample(group: int, total: float, *, skipped: bool = False) -> Sample:
        reward = Reward(total, {}, "wrong", skipped=skipped)
        return Sample(Prompt(Example(0, "?"), "?", (1,)), group, sampled("6"), reward, sampled("6"), reward)

    samples = [sample(0, 1.0), sample(0, 0.0, skipped=True), sample(1, 1.0), sample(1, 0.5), sample(2, 0, skipped=True)]
    assert collapsed_groups(samples) == [0, 2]


def test_steps_do_not_depend_on_the_steps_before_them_or_on_other_processes():
    equal = dict.fromkeys(range(0, NUM_ROWS, 2), ("6", "6"))
    one_by_one = collector(ByPrompt(equal), rounds=2)
    in_order = [rows(collect(one_by_one, step).samples) for step in (1, 2, 3, 4)]
    resumed = collector(ByPrompt(equal), rounds=2)
    assert [rows(collect(resumed, step).samples) for step in (3, 4)] == in_order[2:]
    shared = [
        [
            row
            for rank in (0, 1)
            for row in rows(collect(collector(ByPrompt(equal), rounds=2, rank=rank, processes=2), step).samples)
        ]
        for step in (1, 2, 3, 4)
    ]
    assert shared == in_order
    other = collector(ByPrompt(equal), rounds=2, seed=1)
    assert rows(collect(other).samples) != in_order[0]


def test_metrics_count_rounds_groups_and_everything_sampled():
    base = rows(collect(collector(ByPrompt({}), rounds=0)).samples)[::2]
    found = collect(collector(ByPrompt({base[1]: ("6", "6"), base[2]: ("6", "6")}), rounds=3))
    assert resample_metrics(found.samples, found.dropped, [0, found.rounds]) == {
        "resample/rounds": 1.0,
        "resample/dropped": 2.0,
        "resample/accuracy": 4 / 12,
    }


def test_a_resumed_run_makes_the_same_next_step(config):
    """On the shipped model, whose easy sums are often all right: level 1, groups of two."""
    rollout = replace(config.rollout, num_generations=2, resample=2)
    config = replace(config, method="gec", rollout=rollout, steps=2, save_every=1)
    output = config.output + "-{}"
    train(replace(config, output=output.format("whole")))
    train(replace(config, output=output.format("parts"), steps=1))
    train(replace(config, output=output.format("parts")), resume=True)
    whole, parts = (records(Path(output.format(name))) for name in ("whole", "parts"))
    assert any(record["resample/dropped"] for record in whole)
    for left, right in zip(whole, parts, strict=True):
        for key, value in left.items():
            if not key.startswith(("time/", "throughput/", "memory/")):
                assert right[key] == value, key
        assert left["tokens/generated"] > left["length/mean"] * 4


TWO_PROCESSES = """
import json, sys
import torch, yaml
from edge_grpo.config import from_dict
from edge_grpo.metrics import PhaseTimes
from edge_grpo.trainer import Trainer

torch.set_num_threads(1)
trainer = Trainer(from_dict(yaml.safe_load(open(sys.argv[1]))))
sampled = trainer.collector.collect(1, PhaseTimes(torch.device("cpu")))  # what this process needs, before all meet
samples, metrics = trainer.step(1)
with open(f"{sys.argv[1]}.{trainer.accelerator.process_index}", "w") as file:
    json.dump([sampled.rounds, [sample.group for sample in samples], metrics], file)
trainer.close()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_need_not_replace_equally_often(config, tmp_path):
    """Over gloo: one process may be done while the other samples again, and both meet in the metrics and the update."""
    rollout = replace(config.rollout, num_generations=2, resample=3)
    file, script = tmp_path / "config.yaml", tmp_path / "two.py"
    file.write_text(yaml.safe_dump(to_dict(replace(config, method="grpo", rollout=rollout))))
    script.write_text(TWO_PROCESSES)
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), str(file)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = [json.loads(Path(f"{file}.{rank}").read_text()) for rank in (0, 1)]
    rounds = [own for own, _, _ in found]
    assert len(set(rounds)) == 2, "choose another seed"
    for _, groups, metrics in found:
        assert groups == [0, 0, 1, 1]
        assert metrics["resample/rounds"] == max(rounds)
        assert metrics["resample/dropped"] == sum(rounds)  # one group a process
