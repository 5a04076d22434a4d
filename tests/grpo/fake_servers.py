"""Stand-ins of vLLM's server: one that fails as real ones do, and one that samples from the weights it is sent."""

from __future__ import annotations

import contextlib
import copy
import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from safetensors.torch import load_file
from transformers import PreTrainedModel

from edge_grpo.rollout.transformers import TransformersEngine
from edge_grpo.types import Sampling

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


class ModelServer(FakeServer):
    """Samples with a copy of ``model``, whose weights it replaces when it is told to, as vLLM does.

    ``events`` holds, in order, ("weights",), ("version", it), and ("begin", version) and ("end", version) of each
    request for completions.
    """

    def __init__(self, model: PreTrainedModel, eos_token_ids: list[int], pad_token_id: int) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.engine = TransformersEngine(
            self.model, eos_token_ids=eos_token_ids, pad_token_id=pad_token_id, batch_size=64
        )
        self.events: list[tuple[str, ...]] = []
        self.sizes: Counter[int] = Counter()  # of requests, in completions
        self.one_at_a_time = threading.Lock()

    def answer(self, path: str, body: dict) -> dict:
        if path == "/collective_rpc":
            self.events.append(("weights",))
            self.model.load_state_dict(load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors"))
        elif path == "/update_weight_version":
            self.events.append(("version", body["new_version"]))
        elif path == "/inference/v1/generate":
            return self.completions(body["token_ids"], body["sampling_params"])
        return super().answer(path, body)

    def completions(self, prompt: list[int], params: dict) -> dict:
        version = self.version
        self.sizes[params["n"]] += 1
        self.events.append(("begin", version))
        sampling = Sampling(max_tokens=params["max_tokens"], temperature=params["temperature"])
        with self.one_at_a_time:
            # vLLM adds a completion's number to the seed.
            places = [params["seed"] + number for number in range(params["n"])]
            responses = self.engine.generate([prompt] * params["n"], sampling, seed=0, places=places)
        self.events.append(("end", version))
        choices = [
            {
                "index": index,
                "token_ids": list(response.token_ids),
                "logprobs": {"content": [{"logprob": value} for value in response.logprobs]},
                "finish_reason": response.finish_reason,
                "weight_versions": [{"version": version, "start": 0, "end": len(response.token_ids)}],
            }
            for index, response in enumerate(responses)
        ]
        return {"choices": choices}


@contextlib.contextmanager
def running(server: FakeServer) -> Iterator[FakeServer]:
    """The server answers until the block ends."""
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
