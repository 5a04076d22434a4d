"""What both vLLM engines share, without vLLM: how prompts become requests, and which outputs are accepted."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from edge_grpo.config import CorrectionConfig, DataConfig, ModelConfig, RolloutConfig, TrainConfig
from edge_grpo.policy.adapters import merged_weights
from edge_grpo.rollout import build_engine
from edge_grpo.rollout.wire import (
    engine_arguments,
    export,
    host_weights,
    max_length_of,
    requests_of,
    response_of,
    save_weights,
    verify,
)
from edge_grpo.types import RolloutError, Sampling

EOS = (1, 7)
A, B = [5, 6], [9, 9, 9]


def requests(prompts, sampling=Sampling(max_tokens=4), *, seed=0, max_length=64, max_n=8, **more):  # noqa: B008
    return requests_of(prompts, sampling, seed=seed, eos_token_ids=EOS, max_length=max_length, max_n=max_n, **more)


def test_a_group_is_one_request():
    found = requests([A, A, A, B, A])
    assert [(request.first, request.n, list(request.prompt)) for request in found] == [(0, 3, A), (3, 1, B), (4, 1, A)]
    for request in found:
        assert request.sampling_params["n"] == request.n
        assert request.sampling_params["stop_token_ids"] == [1, 7]


def test_large_groups_are_cut_and_greedy_ones_taken_apart():
    assert [request.n for request in requests([A] * 5, max_n=2)] == [2, 2, 1]
    assert [request.n for request in requests([A] * 3, Sampling(max_tokens=4, temperature=0.0))] == [1, 1, 1]
    assert requests([]) == []


def seeds_of(found):
    """The seed of each completion: vLLM adds its number to its request's."""
    return [one.sampling_params["seed"] + number for one in found for number in range(one.n)]


def test_a_completions_seed_depends_on_its_place_alone():
    """Two groups of equal prompts side by side, cut into other requests by their size, by processes, or by gaps."""
    whole = seeds_of(requests([A] * 8 + [B] * 4))
    assert whole == seeds_of(requests([A] * 8 + [B] * 4, max_n=3))
    assert whole[4:] == seeds_of(requests([A] * 4 + [B] * 4, places=range(4, 12)))
    gaps = requests([A] * 4, places=[0, 1, 5, 7])
    assert [one.n for one in gaps] == [2, 1, 1]
    assert seeds_of(gaps) == [whole[place] for place in (0, 1, 5, 7)]


def test_seeds_differ_between_requests_and_leave_room_for_a_group():
    seeds = [request.sampling_params["seed"] for request in requests([A, B] * 50)]
    assert len(set(seeds)) == 100
    assert max(seeds) + 64 < 2**63
    assert seeds == [request.sampling_params["seed"] for request in requests([A, B] * 50)]
    assert set(seeds).isdisjoint(request.sampling_params["seed"] for request in requests([A, B] * 50, seed=1))


def test_what_does_not_fit_is_refused():
    assert requests([[5] * 60])
    with pytest.raises(ValueError, match=r"prompts\[1\] has 61 tokens and may get 4, but the engine holds 64"):
        requests([A, [5] * 61])
    with pytest.raises(ValueError, match=r"prompts\[0\]"):
        requests([[]])


def response(ids, logprobs, reason, sampling=Sampling(max_tokens=3)):  # noqa: B008
    return response_of(ids, logprobs, reason, sampling=sampling, eos_token_ids=EOS)


def test_whole_outputs_become_responses():
    stopped = response([4, 7], [-1.0, -2.0], "stop")
    assert (stopped.token_ids, stopped.logprobs, stopped.finish_reason) == ((4, 7), (-1.0, -2.0), "stop")
    assert all(map(math.isnan, stopped.entropy))
    assert not stopped.is_recorded  # so the trainer scores it
    assert response([4, 5, 6], [-1.0] * 3, "length").finish_reason == "length"


@pytest.mark.parametrize(
    ("ids", "logprobs", "reason"),
    [
        ([4, 5], [-1.0, -1.0], "length"),  # cut short of what was asked for
        ([4, 5], [-1.0, -1.0], "stop"),  # no end
        ([4, 7, 5], [-1.0] * 3, "length"),  # goes on after its end
        ([4, 5], [-1.0, -1.0], "abort"),
        ([4, 5], [-1.0, -1.0], None),
        ([4, 5, 6], [-1.0, -1.0], "length"),  # a token without logprob
        ([], [], "stop"),
    ],
)
def test_half_generated_outputs_are_refused(ids, logprobs, reason):
    with pytest.raises(RolloutError, match="vLLM returned"):
        response(ids, logprobs, reason)


def test_nan_logprobs_are_a_diverged_policy():
    with pytest.raises(FloatingPointError, match="not finite"):
        response([4, 7], [-1.0, math.nan], "stop")


def config(**rollout) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(max_prompt_length=100),
        rollout=RolloutConfig(max_completion_length=50, batch_size=4, **rollout),
        correction=CorrectionConfig(max_length=25),
    )


def test_the_engine_holds_the_longest_sequence(make_model):
    assert max_length_of(config(), make_model()) == 175
    assert max_length_of(TrainConfig(method="grpo"), make_model()) == 512 + 256
    assert max_length_of(config(), make_model(max_position_embeddings=160)) == 160


def test_engine_arguments(make_model, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    arguments = engine_arguments(config(vllm={"block_size": 32}), make_model())
    assert arguments["dtype"] == "float32"
    assert arguments["logprobs_mode"] == "processed_logprobs"
    assert arguments["block_size"] == 32
    # 2 (key and value) x 2 layers x 2 heads x 8 wide, 4 bytes: 256 bytes a token; 4 sequences of 6 blocks, one more.
    assert arguments["kv_cache_memory_bytes"] == (4 * 6 + 1) * 32 * 256
    # Two devices hold a head each. In process two trainers bring their sequences, a server takes no more.
    for engine, sequences in (("vllm", 8), ("vllm-server", 4)):
        shared = engine_arguments(config(engine=engine, vllm={"tensor_parallel_size": 2}), make_model())
        assert (shared["tensor_parallel_size"], shared["max_num_seqs"]) == (2, sequences)
        assert shared["kv_cache_memory_bytes"] == (sequences * 2 + 1) * 128 * 128
    mixed = TrainConfig(model=ModelConfig(precision="mixed"))
    assert engine_arguments(mixed, make_model())["dtype"] == "bfloat16"
    given = engine_arguments(config(vllm={"dtype": "bfloat16", "enforce_eager": False}), make_model())
    assert (given["dtype"], given["enforce_eager"]) == ("bfloat16", False)


def test_exported_models_have_an_output_layer_of_their_own(make_model, tiny_tokenizer, tmp_path):
    model = make_model(tie_word_embeddings=True)
    export(model, tiny_tokenizer, tmp_path)
    save_weights(host_weights(model, keep=True), tmp_path)
    assert model.config.tie_word_embeddings
    alone = type(model).from_pretrained(tmp_path)
    assert not alone.config.tie_word_embeddings
    ids = torch.arange(5, 20)[None]
    torch.testing.assert_close(alone(input_ids=ids).logits, model(input_ids=ids).logits)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == dict(merged_weights(model)).keys() >= {"lm_head.weight", "model.embed_tokens.weight"}


def test_verify_tells_other_weights_from_the_engines(make_model, tiny_tokenizer):
    model = make_model()
    engine = build_engine(TrainConfig(), model, tiny_tokenizer)  # which has the logprobs that vLLM must have
    verify(engine, model, seed=0)
    with pytest.raises(RolloutError, match="nats on average"):
        verify(engine, make_model(seed=1), seed=0)
