"""The model that ships in the package: it loads, its tokenizer loses nothing, and it is sometimes right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import edge_grpo
from edge_grpo.config import CorrectionConfig, DataConfig, ModelConfig, RolloutConfig, TrainConfig
from edge_grpo.data.arithmetic import LEVELS, generate
from edge_grpo.data.prompts import render_prompts
from edge_grpo.data.sources import load_examples
from edge_grpo.evaluation.evaluate import Evaluation, evaluate
from edge_grpo.grading.answers import Grader
from edge_grpo.policy.loading import eos_token_ids, load_model
from edge_grpo.rollout import build_engine
from edge_grpo.types import Sampling

FOLDER = Path(edge_grpo.__path__[0]) / "tiny"
MAX_BYTES = 3_000_000  # what a wheel may carry for the sake of a demo


@pytest.fixture(scope="module")
def loaded() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_model(ModelConfig())


@pytest.fixture(scope="module")
def tokenizer(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    return loaded[1]


def test_the_folder_is_small_and_loads_with_plain_transformers() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= MAX_BYTES
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert "license: apache-2.0" in (FOLDER / "README.md").read_text(encoding="utf-8")


@given(text=st.text())
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_task_text_round_trips_in_few_tokens_with_one_token_per_digit(tokenizer: PreTrainedTokenizerBase) -> None:
    correction = CorrectionConfig()
    texts = [correction.reflection_text, correction.answer_text.format(answer=-42), "0123456789"]
    for example in generate(LEVELS, "test", 0, 50):
        texts += [example.problem, example.solution or ""]
    for text in texts:
        pieces = [tokenizer.decode(token) for token in tokenizer.encode(text, add_special_tokens=False)]
        assert "".join(pieces) == text
        assert not any(any(map(str.isdigit, piece)) for piece in pieces if len(piece) > 1)
    assert len(tokenizer.encode(correction.reflection_text, add_special_tokens=False)) == 7
    assert tokenizer.unk_token is None


def test_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    user = {"role": "user", "content": "What is 3 + 4?"}
    turn = [user, {"role": "assistant", "content": "7"}]
    prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|bos|><|user|>What is 3 + 4?<|assistant|>"
    assert tokenizer.apply_chat_template(turn, tokenize=False) == f"{prompt}7<|eos|>"
    specials = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert len(specials) == 3
    # A prompt is the same whether rendered and encoded in one go or in two, and takes each role mark as one token.
    ids = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer.encode(prompt, add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens([ids[0], ids[1], ids[-1]]) == ["<|bos|>", "<|user|>", "<|assistant|>"]


def test_sometimes_right(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase], grader: Grader) -> None:
    model, tokenizer = loaded
    prompts, _ = render_prompts(load_examples("arithmetic@test", {}, seed=0, limit=200), tokenizer, DataConfig())
    config = TrainConfig(rollout=RolloutConfig(batch_size=200, max_completion_length=64))
    engine = build_engine(config, model, tokenizer)

    def measure(temperature: float, generations: int) -> Evaluation:
        sampling = Sampling(max_tokens=64, temperature=temperature)
        return evaluate(engine, prompts, grader, tokenizer, generations=generations, sampling=sampling, seed=0)

    # Neither hopeless nor done; and several samples together find much that greedy does not: what there is to learn.
    greedy, sampled = measure(0.0, 1), measure(1.0, 4)
    assert 0.1 <= greedy.accuracy <= 0.4
    assert 0.1 <= sampled.accuracy <= 0.4
    assert sampled.truncated < 0.05
    assert sampled.pass_at_k[4] > 1.5 * greedy.accuracy
    # The model card's figures are of another draw of 500 problems.
    card = re.search(
        r"^\| all \| (\d+) % \| (\d+) % \|", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert card is not None
    assert int(card[1]) / 100 == pytest.approx(greedy.accuracy, abs=0.1)
    assert int(card[2]) / 100 == pytest.approx(sampled.accuracy, abs=0.1)
    engine.close()

    responses = engine.generate([prompts[4].token_ids] * 64, Sampling(max_tokens=64), seed=0)
    assert len({response.token_ids for response in responses}) > 8
    entropy = torch.cat([torch.tensor(response.entropy) for response in responses]).mean()
    assert 0.05 < entropy < 2
    assert all(response.token_ids[-1] in eos_token_ids(model, tokenizer) for response in responses[:8])
