"""What the published code does otherwise than the paper: each switch alone, by hand or against plain autograd."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from corrections import CORRECT, EOS, INJECTED, OTHER_EOS, SAMPLED, corrector, decode, encode, prompt, sampled, wrong
from training import flat_gradient, rollout

from edge_grpo.batching import Sample
from edge_grpo.config import AdvantageConfig, OptimConfig, PublishedConfig, TrainConfig
from edge_grpo.config.correction import CorrectionConfig
from edge_grpo.credit import assign_advantages
from edge_grpo.learning.entropy import add_padding, entropy_mask, loss_by_entropy
from edge_grpo.learning.totals import LossTotals, Normalizers
from edge_grpo.published import Rewriter
from edge_grpo.trainer import Trainer
from edge_grpo.types import Prompt
from edge_kernels import EDAConfig, GRPOLossConfig

pytestmark = pytest.mark.usefixtures("one_thread")

PUBLISHED_EDA = AdvantageConfig(clip=math.inf, mean_over="batch")


def sample_of(text: str, *, reward: bool = True, group: int = 0, entropy: float = 1.0) -> Sample:
    response = sampled(text, None)
    verdict = CORRECT if reward else wrong()
    tokens = torch.full((len(text),), entropy)
    return Sample(prompt(), group, response, verdict, response, verdict, entropy=tokens)


# ---- Responses as text -----------------------------------------------------------------------------------------------


def rewrite(response, *, encoder=encode, of: Prompt | None = None, limit: int | None = None, **switches: bool):
    config = TrainConfig(published=PublishedConfig(**switches), correction=CorrectionConfig(max_prompt_length=limit))
    rewriter = Rewriter(config, encode=encoder, decode=decode, eos_token_ids=(EOS, OTHER_EOS))
    (written,) = rewriter([of or prompt()], [response])
    return written


@pytest.mark.parametrize("eos", [EOS, OTHER_EOS])
def test_the_end_of_sequence_is_dropped_and_the_records_stay(eos):
    response = sampled("5", eos)
    written = rewrite(response, drop_eos=True)
    assert written.token_ids == (ord("5"),)
    assert (written.logprobs, written.entropy, written.provenance) == ((-0.5,), (1.0,), (SAMPLED,))
    assert written.finish_reason == "stop"  # so that it is not taken for one that the limit cut off


def test_what_nothing_changes_is_the_same_object():
    cut_off, whole = sampled("5", None), sampled("5")
    assert rewrite(cut_off, drop_eos=True) is cut_off
    assert rewrite(whole, reencode=True) is whole
    assert rewrite(whole, drop_eos=True, limit=4) is whole  # the prompt has five tokens
    assert rewrite(whole, drop_eos=True, limit=5) is not whole


def merging(text: str) -> list[int]:
    """An encoder with one token, 1000, for "ab"; each other character is its own number."""
    return encode(text.replace("ab", chr(1000)))


def test_encoding_again_merges_what_was_sampled_apart():
    """x a b y <eos> becomes x ab y <eos>: the new token has no record, the others keep theirs."""
    written = rewrite(sampled("xaby"), encoder=merging, reencode=True)
    assert written.token_ids == (ord("x"), 1000, ord("y"), EOS)
    assert written.logprobs[0] == -0.5
    assert math.isnan(written.logprobs[1])
    assert written.logprobs[2:] == pytest.approx((-0.8, -0.9))  # of the fourth and the fifth token
    assert [math.isnan(value) for value in written.entropy] == [False, True, False, False]
    assert not written.is_recorded  # so that it is scored
    both = rewrite(sampled("xaby"), encoder=merging, reencode=True, drop_eos=True)
    assert both.token_ids == (ord("x"), 1000, ord("y"))


def test_a_merge_over_the_prompts_end_loses_a_token():
    """As in the published code: the prompt ...a has as many tokens as ...ab, and those are cut off."""
    of = replace(prompt(), text="2a", token_ids=tuple(encode("2a")))
    assert rewrite(sampled("bc"), encoder=merging, of=of, reencode=True).token_ids == (ord("c"), EOS)


def test_a_new_token_has_the_author_of_what_it_replaces():
    response = sampled("xab", None)
    injected = replace(response, provenance=(SAMPLED, INJECTED, INJECTED))
    assert rewrite(injected, encoder=merging, reencode=True).provenance == (SAMPLED, INJECTED)


def test_long_prompts_are_not_corrected():
    """The prompt has five tokens."""
    for limit, kept in ((4, True), (5, False), (None, False)):
        responses = [sampled("4")]
        (written,) = corrector("solution", max_prompt_length=limit)([prompt()], responses, [wrong()], seed=0)
        assert (written is responses[0]) == kept


def test_a_step_trains_on_responses_without_end(config):
    """Right ones included; the published mixture, so that all kinds of correction are among them."""
    for published in (PublishedConfig(), PublishedConfig(drop_eos=True, reencode=True)):
        trainer = Trainer(replace(config, seed=3, published=published))
        samples = rollout(trainer)
        eos = trainer.collector.tokenizer.eos_token_id
        trainer.close()
        ends = [sample.response.token_ids[-1] == eos for sample in samples if not sample.is_truncated]
        assert any(sample.response.correction is None for sample in samples)
        assert ends
        assert not any(ends) if published.drop_eos else all(ends)
        assert all(sample.first.token_ids[-1] == eos for sample in samples if sample.first.finish_reason == "stop")


# ---- Entropy ---------------------------------------------------------------------------------------------------------


def test_which_positions_are_averaged():
    """Prompt of five tokens, so position 4 predicts the first of the response; one response is two tokens shorter."""
    samples = [sample_of("abc"), sample_of("d")]
    add_padding(samples)
    assert [sample.padding for sample in samples] == [0, 2]
    mask = entropy_mask(samples, GRPOLossConfig(), torch.zeros(2, 7))
    assert mask.tolist() == [[False] * 4 + [True] * 3] * 2
    injected = replace(samples[0].response, provenance=(SAMPLED, INJECTED, SAMPLED))
    samples[0].response = injected
    mask = entropy_mask(samples, GRPOLossConfig(injected="mask"), torch.zeros(2, 7))
    assert mask[0].tolist() == [False] * 4 + [True, False, True]


def test_a_measured_mean_takes_the_place_of_the_tokens():
    """P = 3 and 1, so P_hat = 1.5 and 0.5; from the tokens alone both would be 1."""
    samples = [sample_of("ab"), sample_of("c", reward=False)]
    samples[0].padding, samples[0].mean_entropy = 1, 3.0
    assign_advantages(samples, GRPOLossConfig(), entropy_driven=True)
    assert [sample.weight for sample in samples] == pytest.approx([1 / 1.5, 2.0])
    assert [sample.mean_entropy for sample in samples] == [3.0, 1.0]


@pytest.mark.parametrize(
    ("loss_type", "weights"),
    [
        ("bnpo", (3 / 10, 1 / 10)),  # 3 and 1 of 10 tokens
        ("dapo", (3 / 10, 1 / 10)),
        ("grpo", (1 / 4, 1 / 4)),  # each of 4 responses
        ("dr_grpo", (3 / (4 * 8), 1 / (4 * 8))),  # of 4 responses times a limit of 8
    ],
)
def test_the_slope_by_hand(loss_type, weights):
    """w A / P: advantages 2 and -1.5 (P_hat contained), entropies 0.5 and 3."""
    samples = [sample_of("abc"), sample_of("d")]
    for sample, advantage, mean in zip(samples, (2.0, -1.5), (0.5, 3.0), strict=True):
        sample.advantage, sample.mean_entropy = advantage, mean
    loss = GRPOLossConfig(loss_type=loss_type, max_completion_length=8)
    slopes = loss_by_entropy(samples, [3, 1], loss, Normalizers(10, 4, None))
    assert slopes.tolist() == pytest.approx([weights[0] * 2 / 0.5, -weights[1] * 1.5 / 3])
    assert loss_by_entropy(samples, [3, 0], loss, Normalizers(10, 4, None))[1] == 0  # all of it is masked


def test_a_bounded_ratio_has_no_slope():
    """As of torch.clamp, which the bound is: entropies 0.1, 1 and 1.9 of mean 1, bounded to [1/1.5, 1.5]."""
    samples = [sample_of("a", entropy=0.1), sample_of("b", reward=False), sample_of("c", reward=False, entropy=1.9)]
    loss = GRPOLossConfig(eda=EDAConfig(1 / 1.5, 1.5))
    assign_advantages(samples, loss, entropy_driven=True)
    assert [sample.weight for sample in samples] == pytest.approx([1.5, 1.0, 1 / 1.5])
    slopes = loss_by_entropy(samples, [1, 1, 1], loss, Normalizers(3, 3, None))
    assert slopes.tolist() == pytest.approx([0, samples[1].advantage / 3, 0])


def padded_logits(model, samples: list[Sample], pad: int) -> list[torch.Tensor]:
    """The logits that predict each response and the padding up to the longest one; padding is read as text is."""
    longest = max(len(sample.response.token_ids) for sample in samples)
    rows = []
    for sample in samples:
        ids = [*sample.prompt.token_ids, *sample.response.token_ids]
        more = longest - len(sample.response.token_ids)
        logits = model(input_ids=torch.tensor([ids + [pad] * more])).logits[0, :-1]
        rows.append(logits[len(sample.prompt.token_ids) - 1 :])
    return rows


def entropies(logits: torch.Tensor) -> torch.Tensor:
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def published_run(config: TrainConfig, loss_type: str, **switches: bool) -> TrainConfig:
    loss = GRPOLossConfig(loss_type=loss_type, max_completion_length=24 if loss_type == "dr_grpo" else None)
    return replace(config, seed=3, loss=loss, eda=PUBLISHED_EDA, published=PublishedConfig(**switches))


def by_autograd(trainer: Trainer, samples: list[Sample], *, padding: bool) -> tuple[float, torch.Tensor, list[float]]:
    """The published loss written down: its value, its gradient, and the mean entropies in it."""
    logits = padded_logits(trainer.learner.model, samples, trainer.tokenizer.pad_token_id)
    lengths = [len(sample.response.token_ids) for sample in samples]
    means = [entropies(row)[: None if padding else n].mean() for row, n in zip(logits, lengths, strict=True)]
    overall = torch.stack(means).mean().detach()
    rewards = torch.tensor([sample.reward.total for sample in samples]).view(2, 4)
    plain = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    assert plain.count_nonzero() >= 4, "choose another seed"
    loss = torch.zeros(())
    for row, sample, n, mean, advantage in zip(logits, samples, lengths, means, plain, strict=True):
        taken = row[:n].log_softmax(-1).gather(1, torch.tensor(sample.response.token_ids)[:, None])[:, 0]
        own = ((taken - taken.detach()).exp() * advantage / mean * overall).sum()
        scale = {"bnpo": sum(lengths), "grpo": len(samples) * n, "dr_grpo": len(samples) * 24}
        loss = loss - own / scale[trainer.config.loss.loss_type]
    trainer.learner.policy.zero_grad()
    loss.backward()
    return float(loss.detach()), flat_gradient(trainer.learner), [float(mean.detach()) for mean in means]


# Each normalizer once; padding with the one where its number of tokens must not enter the loss.
@pytest.mark.parametrize(("loss_type", "padding"), [("bnpo", True), ("grpo", False), ("dr_grpo", False)])
def test_the_gradient_is_that_of_the_published_loss(config, loss_type, padding):
    """Whatever the micro-batches: 8 sequences at once, and in parts of 3 that need less padding of their own."""
    trainer = Trainer(published_run(config, loss_type, padding_entropy=padding, entropy_gradient=True))
    samples = rollout(trainer)
    assert len({len(sample.response.token_ids) for sample in samples}) > 1
    value, plain, means = by_autograd(trainer, samples, padding=padding)
    assert [sample.mean_entropy for sample in samples] == pytest.approx(means, rel=1e-4)
    for size in (8, 3):
        trainer.learner.optim = replace(config.optim, micro_batch_size=size)
        trainer.learner.policy.zero_grad()
        trainer.learner.model.train()
        totals = LossTotals()
        trainer.learner.accumulate_gradient(samples, totals)
        assert totals.loss == pytest.approx(value, rel=1e-4)
        ours = flat_gradient(trainer.learner)
        torch.testing.assert_close(ours, plain, rtol=0, atol=float(1e-4 * plain.abs().max()))
    trainer.learner.learns_entropy = False
    trainer.learner.policy.zero_grad()
    trainer.learner.accumulate_gradient(samples, LossTotals())
    assert (flat_gradient(trainer.learner) - plain).abs().max() > 0.1 * plain.abs().max()  # the term is no trifle
    trainer.close()


def test_without_entropy_driven_advantages_nothing_of_it_happens(config):
    switched = published_run(replace(config, method="gec"), "bnpo", padding_entropy=True, entropy_gradient=True)
    trainer = Trainer(switched)
    assert not trainer.learner.averages_padding
    assert not trainer.learner.learns_entropy
    trainer.close()


# ---- Settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("loss.loss_type", {"loss": GRPOLossConfig(loss_type="cispo", epsilon_high=5.0)}),
        ("loss.injected", {"loss": GRPOLossConfig(injected="shaped")}),
        ("loss.top_entropy_quantile", {"loss": GRPOLossConfig(top_entropy_quantile=0.5)}),
        ("loss.off_policy_mask_threshold", {"loss": GRPOLossConfig(off_policy_mask_threshold=1.0)}),
        ("loss.sampler_ratio_cap", {"loss": GRPOLossConfig(sampler_ratio_cap=2.0)}),
        ("optim.epochs", {"optim": OptimConfig(epochs=2)}),
        ("optim.minibatches", {"optim": OptimConfig(minibatches=2)}),
        ("eda.preserve_scale", {"eda": AdvantageConfig(preserve_scale=True)}),
    ],
)
def test_what_the_entropy_gradient_cannot_go_with(key, change):
    published = PublishedConfig(entropy_gradient=True)
    with pytest.raises(
        ValueError, match=rf"^published\.entropy_gradient and {key} = .* cannot be combined; .* set {key}"
    ):
        TrainConfig(published=published, **change)
    TrainConfig(published=published, method="gec", **change)  # without these advantages it has no meaning
