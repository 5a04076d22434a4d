"""The client of a vLLM server against a fake server that fails as real ones do; test_vllm.py has a real one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fake_servers import EOS, FakeServer, running

from edge_grpo.config import DataConfig, RolloutConfig, TrainConfig
from edge_grpo.rollout import build_engine, connection, spread
from edge_grpo.rollout import server as server_module
from edge_grpo.types import RolloutError, Sampling

PROMPTS = [[5, 6]] * 3 + [[7]]
SAMPLING = Sampling(max_tokens=2)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_PAUSE", 0.01)
    monkeypatch.setattr(spread, "_HEALTH_EVERY", 0.2)
    monkeypatch.setattr(server_module, "probe", lambda *_, **__: None)  # it has no weights
    monkeypatch.setattr(server_module, "compare", lambda *_: None)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with running(FakeServer()) as fake:
        yield fake


@pytest.fixture
def config(server: FakeServer, tmp_path: Path) -> TrainConfig:
    rollout = RolloutConfig(engine="vllm-server", server=server.address, server_folder=str(tmp_path), timeout=5.0)
    return TrainConfig(data=DataConfig(max_prompt_length=64), rollout=rollout)


@pytest.fixture
def engine(config, tiny_model, tiny_tokenizer):
    return build_engine(config, tiny_model, tiny_tokenizer)


def test_a_push_is_reload_reset_version(engine, server, tmp_path):
    assert server.bodies["/collective_rpc"]["method"] == "reload_weights"
    folder = Path(server.bodies["/collective_rpc"]["kwargs"]["weights_path"])
    assert folder.parent == tmp_path
    assert not folder.exists()  # the server has read it
    assert server.seen["/reset_prefix_cache"] == 1
    assert server.version.startswith("edge-grpo-")


def test_completions_keep_their_places(engine):
    responses = engine.generate(PROMPTS, SAMPLING, seed=0)
    assert [(r.token_ids, r.logprobs, r.finish_reason) for r in responses] == [((EOS,), (-1.0,), "stop")] * 4


@pytest.mark.parametrize("status", [500, 503, 429, 0])  # the server's fault, busy, and a broken connection
def test_requests_are_tried_three_times(engine, server, status):
    server.trouble["/inference/v1/generate"] = lambda attempt: status if attempt <= 2 else None
    assert len(engine.generate([[5]], SAMPLING, seed=0)) == 1
    assert server.seen["/inference/v1/generate"] == 3


@pytest.mark.parametrize("status", [500, 0])
def test_then_the_step_fails_and_says_what_to_do(engine, server, status, tmp_path):
    (tmp_path / "server.log").write_text("".join(f"line {number}\n" for number in range(1, 101)))
    server.trouble["/inference/v1/generate"] = lambda attempt: status
    with pytest.raises(RolloutError) as caught:
        engine.generate([[5]], SAMPLING, seed=0)
    message = str(caught.value)
    assert "failed 3 times to answer /inference/v1/generate" in message
    assert "edge-grpo serve" in message
    assert "--resume" in message
    assert "line 81" in message  # the last twenty
    assert message.endswith("line 100")
    assert "line 80" not in message
    assert server.seen["/inference/v1/generate"] == 3


def test_one_lost_request_of_many_fails_the_whole_call(engine, server):
    server.trouble["/inference/v1/generate"] = lambda attempt: 500 if attempt > 3 else None
    with pytest.raises(RolloutError, match="failed 3 times"):
        engine.generate([[token] for token in range(5, 15)], SAMPLING, seed=0)


def test_a_mistake_of_ours_is_not_repeated(engine, server):
    server.trouble["/inference/v1/generate"] = lambda attempt: 400
    with pytest.raises(RolloutError, match=r"refused /inference/v1/generate with HTTP 400.*as the test wants"):
        engine.generate([[5]], SAMPLING, seed=0)
    assert server.seen["/inference/v1/generate"] == 1


def test_a_server_without_the_routes_is_told_apart(config, server, tiny_model, tiny_tokenizer):
    server.trouble["/collective_rpc"] = lambda attempt: 404
    with pytest.raises(RolloutError, match="started by `edge-grpo serve`, in development mode"):
        build_engine(config, tiny_model, tiny_tokenizer)


def test_a_restarted_server_is_noticed(engine, server):
    engine.generate(PROMPTS, SAMPLING, seed=0)
    server.version = "default"
    with pytest.raises(RolloutError, match="weights of version default instead of edge-grpo-"):
        engine.generate(PROMPTS, SAMPLING, seed=0)


def test_a_silent_server_is_given_up_by_its_health(engine, server):
    """Connections stay open and nothing comes, as from a machine that vanished: the request is not waited for."""
    engine.servers[0].timeout = 60.0
    given_up = threading.Event()
    answered = []
    server.trouble["/inference/v1/generate"] = lambda attempt: answered.append(given_up.wait(60))  # type: ignore[func-returns-value]
    server.trouble["/health"] = lambda attempt: 503
    with pytest.raises(RolloutError, match="failed 3 health checks in a row"):
        engine.generate([[5]], SAMPLING, seed=0)
    assert answered == []
    assert server.seen["/inference/v1/generate"] == 1
    given_up.set()


def test_a_slow_server_in_good_health_is_waited_for(engine, server):
    server.trouble["/inference/v1/generate"] = lambda attempt: time.sleep(1.5)  # type: ignore[func-returns-value]
    assert len(engine.generate([[5]], SAMPLING, seed=0)) == 1
    assert server.seen["/health"] > 3


def test_an_answer_that_takes_too_long_counts_as_a_failure(config, server, tiny_model, tiny_tokenizer):
    engine = build_engine(config, tiny_model, tiny_tokenizer)
    engine.servers[0].timeout = 0.2
    server.trouble["/inference/v1/generate"] = lambda attempt: time.sleep(0.5) if attempt == 1 else None  # type: ignore[func-returns-value]
    assert len(engine.generate([[5]], SAMPLING, seed=0)) == 1
    assert server.seen["/inference/v1/generate"] == 2


def test_a_server_that_never_comes_up(config, server, tiny_model, tiny_tokenizer):
    server.trouble["/health"] = lambda attempt: 503
    object.__setattr__(config.rollout, "timeout", 0.3)
    with pytest.raises(RolloutError, match=r"did not come up within 0\.3 s"):
        build_engine(config, tiny_model, tiny_tokenizer)


def test_a_server_that_comes_up_late(config, server, tiny_model, tiny_tokenizer, capsys):
    server.trouble["/health"] = lambda attempt: 503 if attempt < 3 else None
    build_engine(config, tiny_model, tiny_tokenizer)
    assert f"waiting for the vLLM server at http://{server.address}" in capsys.readouterr().err


def test_sequences_longer_than_the_server_holds(config, server, tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(server, "answer", lambda *_: {"data": [{"max_model_len": 64}]})
    with pytest.raises(ValueError, match="start it with --max-model-len 576"):
        build_engine(config, tiny_model, tiny_tokenizer)


def test_a_policy_on_the_cpu_needs_a_folder(tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match=r"rollout\.server_folder is null"):
        build_engine(TrainConfig(rollout=RolloutConfig(engine="vllm-server")), tiny_model, tiny_tokenizer)


# ---- Several servers ------------------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[list[FakeServer]]:
    with running(FakeServer()) as first, running(FakeServer()) as second:
        yield [first, second]


def ask_both(pair: list[FakeServer], status_of_second: int | None = None) -> None:
    """Let a server answer no completion before both have been asked for one: a fast one would answer all."""
    asked = [threading.Event(), threading.Event()]

    def meet(number: int, status: int | None) -> int | None:
        asked[number].set()
        assert asked[1 - number].wait(60)
        return status

    for number, status in enumerate((None, status_of_second)):
        pair[number].trouble["/inference/v1/generate"] = lambda attempt, at=(number, status): meet(*at)


@pytest.fixture
def by_pair(pair, tmp_path) -> TrainConfig:
    addresses = tuple(fake.address for fake in pair)
    rollout = RolloutConfig(engine="vllm-server", server=addresses, server_folder=str(tmp_path), timeout=5.0)
    return TrainConfig(data=DataConfig(max_prompt_length=64), rollout=rollout)


def test_each_server_gets_the_weights_once_and_all_sample(by_pair, pair, tiny_model, tiny_tokenizer, tmp_path):
    engine = build_engine(by_pair, tiny_model, tiny_tokenizer)
    first, second = pair
    assert first.bodies["/collective_rpc"] == second.bodies["/collective_rpc"]  # one folder
    assert first.version == second.version != "default"
    assert not list(tmp_path.glob("weights-*"))
    ask_both(pair)
    assert len(engine.generate([[token] for token in range(5, 25)], SAMPLING, seed=0)) == 20
    seen = [fake.seen["/inference/v1/generate"] for fake in pair]
    assert sum(seen) == 20
    assert min(seen) > 0
    before = first.version
    engine.update_weights(tiny_model)
    assert first.version == second.version != before


def test_a_server_that_was_restarted_is_named(by_pair, pair, tiny_model, tiny_tokenizer):
    engine = build_engine(by_pair, tiny_model, tiny_tokenizer)
    pair[1].version = "default"
    ask_both(pair)
    with pytest.raises(RolloutError, match=f"at http://{pair[1].address} sampled with weights of version default"):
        engine.generate([[5], [6]], SAMPLING, seed=0)


def test_a_server_that_dies_is_named_with_its_own_log(by_pair, pair, tiny_model, tiny_tokenizer, tmp_path):
    engine = build_engine(by_pair, tiny_model, tiny_tokenizer)
    for number in (0, 1):
        (tmp_path / f"server-{number}.log").write_text(f"the end of {number}\n")
    pair[1].trouble["/collective_rpc"] = lambda attempt: 0
    ask_both(pair, status_of_second=0)
    for use in (lambda: engine.generate([[5], [6]], SAMPLING, seed=0), lambda: engine.update_weights(tiny_model)):
        with pytest.raises(RolloutError) as caught:
            use()
        message = str(caught.value)
        assert message.startswith(f"the vLLM server at http://{pair[1].address} failed 3 times to answer")
        assert "edge-grpo serve" in message
        assert message.endswith("the end of 1")


def test_a_server_that_is_missing_at_the_start_is_named(by_pair, pair, tiny_model, tiny_tokenizer, capsys):
    pair[1].trouble["/health"] = lambda attempt: 503
    config = replace(by_pair, rollout=replace(by_pair.rollout, timeout=0.3))
    with pytest.raises(RolloutError, match=rf"at http://{pair[1].address} did not come up within 0\.3 s"):
        build_engine(config, tiny_model, tiny_tokenizer)
    said = capsys.readouterr().err
    assert pair[1].address in said
    assert pair[0].address not in said


def test_a_server_that_samples_from_other_weights_is_named(by_pair, pair, tiny_model, tiny_tokenizer, monkeypatch):
    asked = []

    def probe(engine, model, *, seed):
        engine.generate([[5]], SAMPLING, seed=seed)
        asked.append([fake.seen["/inference/v1/generate"] for fake in pair])
        return len(asked)

    def compare(number, model):
        if number == 2:
            raise RolloutError("vLLM's logprobs differ")

    monkeypatch.setattr(server_module, "probe", probe)
    monkeypatch.setattr(server_module, "compare", compare)
    with pytest.raises(RolloutError, match=f"the server at http://{pair[1].address}: vLLM's logprobs differ"):
        build_engine(by_pair, tiny_model, tiny_tokenizer)
    assert asked == [[1, 0], [1, 1]]


def test_closing_ends_what_another_thread_generates(engine, server):
    release = threading.Event()
    begun = threading.Event()

    def wait(attempt: int) -> None:
        begun.set()
        release.wait(60)

    server.trouble["/inference/v1/generate"] = wait
    raised: list[Exception] = []

    def generate() -> None:
        try:
            engine.generate([[5]], SAMPLING, seed=0)
        except RolloutError as error:
            raised.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    begun.wait(60)
    engine.close()
    thread.join(60)
    release.set()
    assert "closed while it sampled" in str(raised[0])
    with pytest.raises(RolloutError, match="engine is closed"):
        engine.generate([[5]], SAMPLING, seed=0)
