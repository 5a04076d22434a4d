"""The client of a vLLM server against a fake server that fails as real ones do; test_vllm.py has a real one."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from edge_grpo.config import DataConfig, RolloutConfig, TrainConfig
from edge_grpo.rollout import build_engine
from edge_grpo.rollout import server as server_module
from edge_grpo.types import RolloutError, Sampling

PROMPTS = [[5, 6]] * 3 + [[7]]
SAMPLING = Sampling(max_tokens=2)
EOS = 1


class FakeServer(ThreadingHTTPServer):
    """Answers what a run asks. ``trouble[path]``, called with the attempt's number, may do something else first."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server_address[1]}"
        self.version = "default"
        self.trouble: dict[str, Callable[[int], int | None]] = {}
        self.seen: Counter[str] = Counter()
        self.bodies: dict[str, dict] = {}
        self.lock = threading.Lock()

    def answer(self, path: str, body: dict) -> dict:
        if path == "/v1/models":
            return {"data": [{"max_model_len": 4096}]}
        if path == "/update_weight_version":
            self.version = body["new_version"]
        if path == "/inference/v1/generate":
            one = {"logprobs": {"content": [{"logprob": -1.0}]}, "token_ids": [EOS], "finish_reason": "stop"}
            span = {"version": self.version, "start": 0, "end": 1}
            choices = [one | {"index": n, "weight_versions": [span]} for n in range(body["sampling_params"]["n"])]
            return {"choices": choices[::-1]}  # in whatever order they were done
        return {}


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        with self.server.lock:
            self.server.seen[self.path] += 1
            attempt = self.server.seen[self.path]
            self.server.bodies[self.path] = body
        status = self.server.trouble.get(self.path, lambda _: None)(attempt)
        if status == 0:  # the connection breaks without an answer
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        payload = json.dumps({"error": "as the test wants"} if status else self.server.answer(self.path, body)).encode()
        self.send_response(status or 200)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setattr(server_module, "_PAUSE", 0.01)
    monkeypatch.setattr(server_module, "_HEALTH_EVERY", 0.2)
    monkeypatch.setattr(server_module, "verify", lambda *_, **__: None)  # it has no weights
    fake = FakeServer()
    threading.Thread(target=fake.serve_forever, args=(0.02,), daemon=True).start()
    yield fake
    fake.shutdown()
    fake.server_close()


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


def test_the_last_request_may_fail_before_anybody_waits(engine, monkeypatch):
    """All requests are over, the last one with an error, when the engine comes to wait for them."""

    class AtOnce(threading.Thread):
        def start(self) -> None:
            self.run()

    failures = iter([RolloutError("the last one")])

    def ask(path: str, body: dict, *, stop: threading.Event) -> dict:
        if body["token_ids"] == [7]:
            raise next(failures)
        return {}

    monkeypatch.setattr(engine, "_ask", ask)
    own = SimpleNamespace(Thread=AtOnce, Event=threading.Event, Condition=threading.Condition)
    monkeypatch.setattr(server_module, "threading", own)
    with pytest.raises(RolloutError, match="the last one"):
        engine.generate([[5], [6], [7]], SAMPLING, seed=0)


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
    object.__setattr__(engine._rollout, "timeout", 60.0)
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
    object.__setattr__(engine._rollout, "timeout", 0.2)
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
