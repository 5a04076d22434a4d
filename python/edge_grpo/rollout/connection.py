"""HTTP to one vLLM server: requests and their repetition, its health, and the error that says what to do about it."""

from __future__ import annotations

import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from edge_grpo.types import RolloutError

_ATTEMPTS = 3  # of a request that fails for want of a connection or by the server's fault
_PAUSE = 1.0  # seconds before the second attempt, twice as long before the third
_HEALTH_TIMEOUT = 5.0  # seconds
_LOG_LINES = 20


class UnavailableError(Exception):
    """The server was not reached, did not answer in time, or failed; another attempt may succeed."""


class Connection:
    """The server at ``address``, HOST:PORT, whose log is at ``log``; a request may take ``timeout`` seconds.

    Any number of threads may use it.
    """

    def __init__(self, address: str, *, timeout: float, log: Path) -> None:
        self.url = f"http://{address}"
        self.timeout = timeout
        self._log = log

    def ask(self, path: str, body: Any = None, *, stop: threading.Event | None = None) -> Any:
        """Return the answer to a request, attempted up to three times; GET without a body, else POST.

        ``stop`` ends the attempts. Raises RolloutError.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._ask_once(path, body, self.timeout)
            except UnavailableError as error:
                if attempt == _ATTEMPTS:
                    raise self.failure(f"failed {attempt} times to answer {path} ({error})") from error
                if (stop or threading.Event()).wait(_PAUSE * 2 ** (attempt - 1)):
                    raise self.failure(f"was abandoned before it answered {path}") from error
        raise AssertionError("unreachable")

    def is_healthy(self) -> bool:
        """Return whether the server answers now that it is well."""
        try:
            self._ask_once("/health", None, _HEALTH_TIMEOUT)
        except (UnavailableError, RolloutError):
            return False
        return True

    def failure(self, what: str, remedy: str | None = None) -> RolloutError:
        """Return the error to raise: what happened, what to do, and the last lines of the server's log."""
        remedy = remedy or (
            "Nothing of this step was trained on. Start the server again (edge-grpo serve, with the run's "
            "configuration), then continue the run with --resume"
        )
        lines = _last_lines(self._log)
        log = f"the last lines of {self._log}:\n{lines}" if lines else f"there is no log at {self._log}"
        return RolloutError(f"the vLLM server at {self.url} {what}. {remedy}; {log}")

    def _ask_once(self, path: str, body: Any, timeout: float) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with _OPENER.open(request, timeout=timeout) as answer:
                text = answer.read()
            return json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            with error:
                reason = f"HTTP {error.code}: {error.read(2000).decode(errors='replace').strip()}"
            if error.code >= 500 or error.code == 429:
                raise UnavailableError(reason) from error
            remedy = "; was it started by `edge-grpo serve`, in development mode?" if error.code in (403, 404) else ""
            raise RolloutError(f"the vLLM server at {self.url} refused {path} with {reason}{remedy}") from error
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
            raise UnavailableError(reason_of(error)) from error


# Ignores the environment's proxies: the server is in the local network.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def reason_of(error: Exception) -> str:
    """Return an error in one line: its kind and its text."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return f"{type(cause).__name__}: {cause}" if isinstance(cause, Exception) else str(cause)


def _last_lines(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 100 * 1024))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(f"  {line}" for line in text.splitlines()[-_LOG_LINES:])
