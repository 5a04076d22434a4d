"""Guided correction and entropy-driven advantages in TRL's trainer: the same gradient as our own trainer's, token ids
that are never encoded again, rewards computed once.
"""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from trl_runs import accuracy, brevity, history, problems

from edge_grpo.config import DataConfig, OptimConfig, RolloutConfig, TrainConfig
from edge_grpo.integrations.trl.guided import share_of
from edge_grpo.trainer import Trainer
from edge_grpo.types import Provenance
from edge_kernels import GRPOLossConfig

SEED = 1  # at which a step has reflections and other corrections


def our_rollout(tmp_path, injected):
    """A step of our own trainer, up to the update, and the gradient of it."""
    from training import gradient, rollout

    config = TrainConfig(
        output=str(tmp_path / "run"),
        steps=1,
        seed=SEED,
        save_every=0,
        data=DataConfig(train="arithmetic:1,2"),
        rollout=RolloutConfig(num_prompts=2, num_generations=4, max_completion_length=24),
        loss=GRPOLossConfig(injected=injected),
        optim=OptimConfig(micro_batch_size=8),
    )
    trainer = Trainer(config)
    samples = rollout(trainer)
    result = gradient(trainer.learner, samples)
    trainer.close()
    return samples, result


@pytest.mark.parametrize("injected", ["credit", "mask", "sft", "shaped"])
def test_the_gradient_is_that_of_our_own_trainer(make_trainer, tmp_path, injected):
    """The sampler is replaced by what our own trainer's sampled; everything else is computed here."""
    samples, expected = our_rollout(tmp_path, injected)
    kinds = [sample.response.correction for sample in samples]
    assert any(kinds), "choose another SEED"
    rows = [
        {
            "prompt": [{"role": "user", "content": sample.prompt.example.problem}],
            "answer": sample.prompt.example.answer,
            "solution": sample.prompt.example.solution,
        }
        for sample in samples
    ]
    trainer = make_trainer(
        dataset=Dataset.from_list(rows),
        reward_funcs=accuracy,
        injected=injected,
        seed=SEED,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
    )
    calls = []

    def sampler(prompt_ids, images, fields, num_generations):
        calls.append(prompt_ids)
        if len(calls) == 1:
            return [list(sample.first.token_ids) for sample in samples], None
        marks = [sample.response.provenance for sample in samples if sample.response.correction == "reflect"]
        reflected = [sample for sample in samples if sample.response.correction == "reflect"]
        starts = [mark.index(Provenance.CONTINUED) for mark in marks]
        for given, sample, start in zip(prompt_ids, reflected, starts, strict=True):
            assert given == [*sample.prompt.token_ids, *sample.response.token_ids[:start]]
        return [list(one.response.token_ids[start:]) for one, start in zip(reflected, starts, strict=True)], None

    trainer._generate_single_turn = sampler
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._generate_and_score_completions(rows)
    for row, sample in enumerate(samples):
        tokens = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        assert tuple(tokens.tolist()) == sample.response.token_ids
        assert batch["advantages"][row] == pytest.approx(sample.advantage, rel=1e-3, abs=1e-6)
    trainer._compute_loss(trainer.model, batch).backward()
    ours = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    assert float((ours - expected).norm()) <= 1e-4 * float(expected.norm())
    assert len(calls) == 1 + ("reflect" in kinds)


def test_every_response_is_judged_once_and_corrected_ones_again(make_trainer):
    """Also what a reward function logs is that of the response which is trained on."""
    judged = []

    def watching(completions, completion_ids, answer, log_extra, **_):
        judged.append([tuple(ids) for ids in completion_ids])
        log_extra("ids", [list(ids) for ids in completion_ids])
        return accuracy(completions, answer)

    trainer = make_trainer(reward_funcs=[watching, brevity], max_steps=1, accuracy_reward="watching")
    batches = []
    score = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda rows: batches.append(score(rows)) or batches[-1]
    trainer.train()
    first, again = judged
    assert len(first) == 8
    (batch,) = batches
    final = [
        tuple(ids[mask.bool()].tolist())
        for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    changed = [place for place in range(8) if final[place] != first[place]]
    assert changed
    assert again == [final[place] for place in changed]
    assert list(map(tuple, trainer._logs["extra"]["ids"])) == final
    (entry,) = history(trainer)
    assert sum(entry[f"correction/{kind}"] for kind in ("reflect", "answer", "solution")) == len(changed)
    assert entry["accuracy/after"] >= entry["accuracy/before"]
    assert len(trainer._logs["advantages"]) == 8


def test_what_was_sampled_keeps_its_ids(make_trainer):
    """Every corrected response begins with the sampled tokens, up to a solution or the end of sequence."""
    trainer = make_trainer(correction={"mix": {"reflect": 1, "answer": 1}}, max_steps=1)
    seen = []
    sample = trainer._generate_single_turn
    trainer._generate_single_turn = lambda *a: seen.append(sample(*a)) or seen[-1]
    score = trainer._generate_and_score_completions
    batches = []
    trainer._generate_and_score_completions = lambda rows: batches.append(score(rows)) or batches[-1]
    trainer.train()
    eos = trainer.eos_token_ids
    for row, ids in enumerate(seen[0][0]):
        kept = ids[:-1] if ids[-1] in eos else ids
        assert batches[0]["completion_ids"][row, : len(kept)].tolist() == kept


def test_control_tokens_in_solutions_are_text(make_trainer):
    """An injected solution holds one end of sequence, its own."""
    rows = [{**row, "solution": f"<|eos|><|user|> {row['solution']}"} for row in problems()]
    trainer = make_trainer(
        dataset=Dataset.from_list(rows),
        correction={"mix": {"solution": 1}},
        injected="shaped",
        max_completion_length=64,
        max_steps=1,
    )
    batches = []
    score = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda given: batches.append(score(given)) or batches[-1]
    trainer.train()
    (batch,) = batches
    injected = batch["completion_ids"][(batch["injected_mask"] & batch["completion_mask"].bool()).any(1)]
    assert len(injected)
    assert ((injected == trainer.processing_class.eos_token_id).sum(1) == 1).all()


def test_the_graders_verdict_decides_where_it_is_asked_for(make_trainer):
    """The reward function says that all is right; the grader knows better."""
    trainer = make_trainer(
        reward_funcs=[lambda completions, **_: [1.0] * len(completions), brevity],
        accuracy_reward="edge_grpo:grader",
        max_steps=1,
    )
    trainer.train()
    trainer._guide.rewarder.close()
    (entry,) = history(trainer)
    assert entry["accuracy/before"] < 1
    assert sum(entry[f"correction/{kind}"] for kind in ("reflect", "answer", "solution")) > 0
    nothing = make_trainer(reward_funcs=lambda completions, **_: [1.0] * len(completions), max_steps=1)
    nothing.train()
    (entry,) = history(nothing)
    assert entry["accuracy/before"] == 1
    assert entry["tokens/injected_share"] == 0


def test_a_response_that_the_accuracy_reward_does_not_judge_stays_as_it_is(make_trainer):
    trainer = make_trainer(reward_funcs=[lambda completions, **_: [None] * len(completions), brevity], max_steps=1)
    trainer.train()
    (entry,) = history(trainer)
    assert entry["tokens/injected_share"] == 0


def test_corrected_batches_are_used_again_under_trls_own_loss(make_trainer):
    """Two passes over each rollout, with TRL's loss and its mask for tokens of others."""
    trainer = make_trainer(fused_loss=False, injected="mask", num_iterations=2, max_steps=2)
    trainer.train()
    first, second = history(trainer)
    assert first["correction/reflect"] + first["correction/answer"] + first["correction/solution"] > 0
    assert "correction/reflect" not in second
    assert second["grad_norm"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accuracy_reward": "acuracy"}, "did you mean accuracy"),
        ({"correction": {"mix": {"solution": 1}}, "solution_column": "proof"}, "nothing can be corrected"),
        ({"accuracy_reward": "edge_grpo:grader", "answer_column": "anwser"}, "did you mean answer"),
        ({"fused_loss": False, "injected": "sft"}, "injected='sft' is an option of the fused loss"),
        ({"max_completion_length": None}, "needs max_completion_length"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_step(make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**options)


@pytest.mark.parametrize("count", [1, 4, 5, 6])
def test_shares_are_equal_and_make_up_the_whole(count):
    """Fewer items than processes, as many, and a remainder of one and of two, on three processes and one."""
    items = list(range(count))
    for ranks in (1, 3):
        shares = [share_of(items, rank, ranks) for rank in range(ranks)]
        assert len({len(share) for share in shares}) == 1
        assert [item for share in shares for item in share][:count] == items


def test_a_resumed_run_makes_the_same_step(make_trainer, tmp_path):
    """The draws of a correction depend on the step, not on what was drawn before."""
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(**options)
    whole.train()
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "trl" / "checkpoint-1"))
    (_, expected), (*_, found) = history(whole), history(resumed)
    assert expected["correction/reflect"] + expected["correction/answer"] + expected["correction/solution"] > 0
    assert found.pop("num_tokens") <= expected.pop("num_tokens")  # TRL does not save it
    assert found == expected
