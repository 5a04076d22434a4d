"""A mistyped name on a machine without network: said at once, from the cache alone."""

from __future__ import annotations

import socket

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from edge_grpo.config import ModelConfig
from edge_grpo.data.sources import load_examples
from edge_grpo.policy import hub
from edge_grpo.policy.loading import load_model, load_tokenizer


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Neither a connection nor the client's retries, each of which waits."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def refuse(*_, **__):
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(_http.time, "sleep", lambda _: pytest.fail("the client waits to try again"))
    hub.is_reachable.cache_clear()
    yield
    hub.is_reachable.cache_clear()


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_mistyped_model_is_said_at_once(load):
    with pytest.raises(ValueError, match=r"model\.path='no-one/nothing': the tokenizer could not be loaded .*spelling"):
        load(ModelConfig(path="no-one/nothing"))
    assert not constants.HF_HUB_OFFLINE


def test_mistyped_data_are_said_at_once():
    with pytest.raises(ValueError, match="no folder no-one/nothing, and loading it from the Hugging Face hub failed"):
        load_examples("no-one/nothing", {})


def test_a_proxy_is_trusted_and_a_connection_is_made_once(monkeypatch):
    assert not hub.is_reachable()
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    hub.is_reachable.cache_clear()
    assert hub.is_reachable()
    with hub.cached_if_unreachable():
        assert not constants.HF_HUB_OFFLINE
