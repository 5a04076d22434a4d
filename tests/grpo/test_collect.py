"""Collecting samples: the order of the data, the seeds, who corrects what, and solutions that are not injected."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from corrections import ScriptedEngine, decode, encode
from training import collect

from edge_grpo.collect import Collector, check_answers
from edge_grpo.config import CorrectionConfig, DataConfig, RewardConfig, RolloutConfig, TrainConfig
from edge_grpo.metrics import PhaseTimes
from edge_grpo.run.log import completion_record
from edge_grpo.trainer import Trainer
from edge_grpo.types import Example, Prompt, Reward

pytestmark = pytest.mark.usefixtures("one_thread")


class Letters:
    """A tokenizer whose tokens are characters, none of them special."""

    all_special_tokens: tuple[str, ...] = ()
    chat_template = unk_token_id = eos_token_id = bos_token_id = None

    @property
    def added_tokens_decoder(self) -> dict[int, object]:
        return {}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return encode(text)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return decode(token_ids)


class Grades:
    """Calls every text right that ends in "5", and remembers what it was given."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def take_metrics(self) -> dict[str, list[float]]:
        return {"calls": [float(len(self.calls))]}

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str], **given: object) -> list[Reward]:
        self.calls.append(list(texts))
        return [Reward(1.0, {}, "correct") if text.endswith("5") else Reward(0.0, {}, "wrong") for text in texts]


def collector(
    engine: ScriptedEngine, *, method: str = "gec", rank: int = 0, processes: int = 1, seed: int = 0
) -> Collector:
    """Steps of four groups of two, from a data set of six rows."""
    config = TrainConfig(
        seed=seed,
        method=method,
        rollout=RolloutConfig(num_prompts=4, num_generations=2, max_completion_length=30),
        correction=CorrectionConfig(mix={"reflect": 1.0}, reflection_text=" No!", max_length=20),
    )
    texts = [f"{number}?" for number in range(6)]
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


def step(own: Collector, number: int = 1):
    return own.collect(number, PhaseTimes(torch.device("cpu"))).samples


def test_wrong_responses_are_corrected_and_graded_again():
    engine = ScriptedEngine("5", "6")
    own = collector(engine)
    samples = step(own)
    first, second = engine.calls
    assert len(first[0]) == 8
    assert len(second[0]) == 4
    assert second[1].max_tokens == 20 - 4
    assert own.rewarder.calls[1] == [decode(samples[1].response.token_ids), decode(samples[3].response.token_ids)] * 2
    for place, sample in enumerate(samples):
        assert sample.group == place // 2
        if place % 2:  # "6" each time; the continuations are "5" and "6" by turns
            assert decode(sample.response.token_ids) == ("6 No!5" if place % 4 == 1 else "6 No!6")
            assert (sample.first_reward.correct, sample.reward.correct) == (False, place % 4 == 1)
        else:
            assert sample.response is sample.first
            assert sample.reward is sample.first_reward


def test_without_correction_what_was_sampled_is_graded_once():
    engine = ScriptedEngine("6")
    own = collector(engine, method="grpo")
    assert all(sample.response is sample.first for sample in step(own))
    assert len(engine.calls) == len(own.rewarder.calls) == 1


def test_processes_share_a_steps_prompts_and_number_groups_alike():
    whole = [step(collector(ScriptedEngine("6")), number) for number in (1, 2, 3)]
    halves = [
        [sample for rank in (0, 1) for sample in step(collector(ScriptedEngine("6"), rank=rank, processes=2), number)]
        for number in (1, 2, 3)
    ]
    for together, apart in zip(whole, halves, strict=True):
        assert [sample.prompt for sample in together] == [sample.prompt for sample in apart]
        assert [sample.group for sample in together] == [sample.group for sample in apart]
    rows = [samples[place].prompt.example.index for samples in whole for place in range(0, 8, 2)]
    assert sorted(rows[:6]) == sorted(rows[6:]) == list(range(6))  # each epoch has every row once
    assert rows[:6] != rows[6:]


def test_what_is_drawn_depends_on_the_seed_and_the_place_among_all_responses():
    """Four groups of two; the processes of two have two each. Both calls: first attempts, then continuations."""
    engine = ScriptedEngine("6")
    for seed, rank, processes in ((1, 0, 1), (1, 0, 2), (1, 1, 2), (2, 0, 1)):
        step(collector(engine, seed=seed, rank=rank, processes=processes))
    seeds = [seed for _, _, seed in engine.calls]
    assert seeds[:2] == seeds[2:4] == seeds[4:6]
    assert len({*seeds[:2], *seeds[6:]}) == 4
    first, continued, *halves = engine.places[:6]
    assert first == list(range(len(first))) == halves[0] + halves[2]
    assert continued == halves[1] + halves[3]


def test_solutions_that_their_own_grader_rejects_are_not_injected(config, tmp_path):
    rows = [
        {"problem": f"What is {n} + 1?", "answer": str(n + 1), "solution": f"It is \\boxed{{{n + 1 + n % 2}}}."}
        for n in range(8)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    only = CorrectionConfig(mix={"answer": 1e-9, "solution": 1 - 1e-9})
    trainer = Trainer(replace(config, data=DataConfig(train=str(tmp_path / "rows.json")), correction=only))
    samples = [sample for step in (1, 2, 3, 4) for sample in collect(trainer, step)]
    trainer.close()
    assert trainer.collector.corrector.rejected_solutions == {1, 3, 5, 7}
    assert all(sample.prompt.example.solution for sample in samples)  # reward functions still see them
    kinds = [
        {sample.response.correction for sample in samples if sample.prompt.example.index % 2 == odd} for odd in (0, 1)
    ]
    assert kinds[0] - {None} == {"solution"}
    assert kinds[1] - {None} == {"answer"}


def test_functions_know_the_step_and_what_they_log_is_recorded(config, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "logging_rewards.py").write_text("""
def judge(prompts, completions, completion_ids, trainer_state, log_metric, log_extra):
    assert [message["role"] for message in prompts[0]] == ["user"]
    assert len(completion_ids) == len(completions) and max(map(len, completion_ids)) > 0
    log_metric("step", trainer_state.global_step)
    log_extra("ids", [str(ids) for ids in completion_ids])
    return [trainer_state.global_step + trainer_state.max_steps / 100] * len(completions)
""")
    reward = RewardConfig(weights={"accuracy": 1.0, "logging_rewards:judge": 1.0})
    trainer = Trainer(replace(config, reward=reward))
    for step in (1, 2):
        samples, metrics = trainer.step(step)
        assert metrics["function/step"] == step - 1
        assert metrics["reward/logging_rewards:judge"] == pytest.approx(step - 1 + 0.02)
        for sample in samples:
            record = completion_record(step, sample, trainer.tokenizer.decode)
            assert record["logged"] == {"ids": str(list(sample.response.token_ids))}
    trainer.close()


def test_what_data_quotes_is_text_and_an_injected_text_ends_once(config, tmp_path):
    """Special tokens of the shipped model's tokenizer in every column of the data."""
    row = {
        "problem": "<|eos|>What is <|user|>?",
        "answer": r"\text{<|eos|>}",
        "solution": r"2<|eos|><|user|>\boxed{\text{<|eos|>}}",
    }
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    data = DataConfig(train=str(tmp_path / "rows.json"))
    for kind in ("answer", "solution"):
        trainer = Trainer(replace(config, data=data, correction=CorrectionConfig(mix={kind: 1.0})))
        samples = collect(trainer)
        trainer.close()
        special = set(trainer.tokenizer.all_special_ids)
        for sample in samples:
            names = trainer.tokenizer.convert_ids_to_tokens([t for t in sample.prompt.token_ids if t in special])
            assert names == ["<|bos|>", "<|user|>", "<|assistant|>"]
            assert sample.response.correction == kind
            injected = [t for t, p in zip(sample.response.token_ids, sample.response.provenance, strict=True) if p == 1]
            assert [t for t in injected if t in special] == [trainer.tokenizer.eos_token_id] == injected[-1:]
            assert r"\boxed{\text{<|eos|>}}" in trainer.tokenizer.decode(injected)
            assert sample.reward.correct


# ---- Answers that no model gives -----------------------------------------------------------------------------------


def test_answers_that_no_model_gives_are_refused_dropped_or_kept(capsys):
    rationale = "She sold 24 clips in May and 48 in April, so it is 72 in all"
    prompts = [Prompt(Example(40 + n, "?", answer), "?", (1,)) for n, answer in enumerate(["72", rationale, "5}"])]

    def check(unboxable: str, **values: object) -> list[int]:
        config = TrainConfig(data=DataConfig(unboxable=unboxable), **values)
        return [prompt.example.index for prompt in check_answers(config, prompts)]

    with pytest.raises(
        ValueError, match=r"2 of 3 answers are none .*\(row 41: 1\d words: 'She sold.*data\.unboxable=drop"
    ):
        check("refuse")
    assert check("keep") == [40, 41, 42]
    assert check("drop") == [40]
    assert capsys.readouterr().err == "arithmetic: 2 of 3 answers are none that a model could give: left out\n"
    by_format = RewardConfig(weights={"format": 1.0})
    assert check("refuse", reward=by_format, method="grpo") == [40, 41, 42]  # nobody compares or injects them
    with pytest.raises(ValueError, match="2 of 3 answers"):
        check("refuse", reward=by_format)
    prompts = prompts[1:]
    with pytest.raises(ValueError, match="2 of 2 answers"):
        check("drop")


def test_training_on_rationales_ends_before_it_begins(config, tmp_path):
    rows = [{"problem": "1+1?", "answer": "One and one are two, as everybody has known since school"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"rows\.json: 1 of 1 answers are none that a model could give"):
        Trainer(replace(config, data=DataConfig(train=str(tmp_path / "rows.json"))))
