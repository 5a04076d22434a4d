"""Fixtures shared by the tests: a tokenizer and random models of a few kilobytes, made on the fly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from cuda_on_cpu import harness
from filelock import FileLock
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from edge_grpo.grading.answers import Grader

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]

_SIZES = {
    "vocab_size": len(SPECIAL_TOKENS) + 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.3,  # far from uniform logits, so that a wrong position or mask shows
}

# No test asserts a time: by default one that takes a while on a busy machine has failed.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several processes, files with slow tests start first, so that none waits long for another at the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def grader() -> Iterator[Grader]:
    """A grader whose processes start when a test first needs them."""
    grader = Grader()
    yield grader
    grader.close()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level tokenizer with a chat template; every byte is a token, <|pad|> is 0, <|end|> is 1."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL_TOKENS[2:],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """Return a function from an architecture's name ("Llama", "Qwen2", ...) to a fresh random causal model of it."""

    def make(architecture: str = "Llama", *, seed: int = 0, **overrides: object) -> PreTrainedModel:
        config = getattr(transformers, f"{architecture}Config")(**{**_SIZES, **overrides})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return getattr(transformers, f"{architecture}ForCausalLM")(config).eval()

    return make


@pytest.fixture
def tiny_model(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """A fresh random Llama with the vocabulary of ``tiny_tokenizer``."""
    return make_model()


@pytest.fixture(scope="session")
def cuda_program(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Callable[[harness.Build], Path]:
    """Return a function from a build of the CUDA kernels for the CPU to its program, compiled once a session."""
    folder = tmp_path_factory.getbasetemp()
    if hasattr(pytestconfig, "workerinput"):  # one of pytest-xdist's processes: their folders lie in a common one
        folder = folder.parent

    def compile_once(build: harness.Build) -> Path:
        program = folder / f"cuda_on_cpu_{build.name}" / "runner"
        with FileLock(f"{program.parent}.lock"):
            if not program.exists():
                program.parent.mkdir(exist_ok=True)
                harness.compile_program(program.parent, build)
        return program

    return compile_once
