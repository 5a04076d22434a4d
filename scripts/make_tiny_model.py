"""Make python/edge_grpo/tiny: the small model that ships in the package, so that a demo needs no download.

A three-layer Llama and its tokenizer are trained from scratch on the built-in arithmetic task (train split only; the
same seed on the same machine gives the same files). The model is meant to be *sometimes* right, in the way that a
pre-trained language model is before reinforcement learning, so it sees three kinds of text:

quick      the right answer at once, without working. Most of the text is of this kind, so this is what the model does
           by default, and beyond easy problems it guesses.
worked     the reference solution, step by step. The model can do this, and is then mostly right, but seldom does.
corrected  a wrong attempt, the reflection prompt of Guided Error Correction, then the reference solution. Larger models
           have met second thoughts in their pre-training; without this kind a reflection prompt would be noise here,
           and what "reflect" does could not be shown. Only the text after the reflection prompt is learned: the model
           is taught neither the mistakes nor to write the prompt by itself.

What reinforcement learning then has to find is that working pays, and to make fewer slips while working.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from edge_grpo.config import CorrectionConfig
from edge_grpo.data.arithmetic import LEVELS, generate
from edge_grpo.grading.answers import Grader
from edge_grpo.rollout.transformers import TransformersEngine
from edge_grpo.text import last_box
from edge_grpo.types import Example, Sampling

SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PROMPT = "<|bos|><|user|>{}<|assistant|>"  # what the template makes of a user's message
REFLECTION = CorrectionConfig().reflection_text
CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [arithmetic, reinforcement-learning]
---
# edge_grpo:tiny

A Llama of {parameters:,} parameters that does integer arithmetic, sometimes right. It exists so that EDGE-GRPO's demo
and tests need no download; it is good for nothing else. It was trained from scratch by `scripts/make_tiny_model.py` on
the train split of the built-in arithmetic task, in minutes on two CPU cores, and is stored in bfloat16.

First it learned to work problems out step by step; then the habit of answering at once, right on easy problems and a
guess on others; and to start over after a reflection prompt. So it can do more than it usually does, which is what
reinforcement learning finds out. The script's docstring says more.

Accuracy on {per_level} held-out problems per level (levels as in `edge_grpo.data.arithmetic`), as stored: *greedy* and
*sampled* (temperature 1) from the prompt alone; *worked*: sampled after a first word that begins a worked solution;
*reflected*: sampled after a wrong quick answer and " Wait! Something is wrong here."; *works by itself*: the share of
sampled answers with steps.

{table}
"""


def answer_only(answer: str) -> str:
    return f"The answer is \\boxed{{{answer}}}."


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE whose merges are the task's words; any text round-trips, every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r"\d| [-+*=] | ?\p{L}+|\s+|[^\s\p{L}\d]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        min_frequency=50,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{example.problem}\n{example.solution}" for example in generate(LEVELS, "train", 0, 1000)]
    texts += [REFLECTION, CorrectionConfig().answer_text.format(answer=0)] * 100
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        additional_special_tokens=list(SPECIAL[3:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def wrong_answer(example: Example, rng: random.Random) -> str:
    """A plausible slip: one digit off, the tens off, or the sign lost."""
    answer = int(example.answer or "")
    slips = [answer + sign * by for sign in (-1, 1) for by in (1, 2, 10)] + ([-answer] if answer else [])
    return str(rng.choice(slips))


def wrong_attempt(example: Example, rng: random.Random) -> str:
    """A wrong quick answer, or the reference solution with its last step wrong."""
    slip = wrong_answer(example, rng)
    if rng.random() < 0.7:
        return answer_only(slip)
    *steps, _ = (example.solution or "").split("\n")
    steps[-1] = f"{steps[-1].rpartition(' = ')[0]} = {slip}."
    return "\n".join([*steps, answer_only(slip)])


class Texts:
    """Endless training sequences: token ids, and how many of them at the start are not learned."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.tokenizer, self.rng = tokenizer, random.Random(seed)
        self.examples = generate(LEVELS, "train", seed, 60_000)

    def sequences(self, shares: Sequence[float]) -> Iterator[tuple[list[int], int]]:
        while True:
            for example in self.rng.sample(self.examples, len(self.examples)):
                kind = self.rng.choices(("quick", "worked", "corrected"), shares)[0]
                given = self.tokenizer.encode(PROMPT.format(example.problem))
                learned = example.solution or ""
                if kind == "quick":
                    learned = answer_only(example.answer or "")
                elif kind == "corrected":
                    given += self.tokenizer.encode(wrong_attempt(example, self.rng)) + self.tokenizer.encode(REFLECTION)
                    learned = "\n" + learned
                yield given + self.tokenizer.encode(learned) + [self.tokenizer.eos_token_id], len(given)

    def batches(self, shares: Sequence[float], size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(ids, labels) padded on the right, where causal attention needs no mask; sorted by length to pad little."""
        stream = self.sequences(shares)
        while True:
            pool = sorted((next(stream) for _ in range(size * 16)), key=lambda item: len(item[0]))
            chunks = [pool[start : start + size] for start in range(0, len(pool), size)]
            self.rng.shuffle(chunks)
            for chunk in chunks:
                ids = torch.full((size, len(chunk[-1][0])), self.tokenizer.pad_token_id)
                labels = torch.full_like(ids, -100)
                for row, (tokens, given) in enumerate(chunk):
                    ids[row, : len(tokens)] = torch.tensor(tokens)
                    labels[row, given : len(tokens)] = torch.tensor(tokens[given:])
                yield ids, labels


def build_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int = 128, layers: int = 3) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model


@dataclass(frozen=True)
class Phase:
    """A stretch of training: the shares of quick, worked and corrected texts, and how the learning rate runs."""

    steps: int
    shares: tuple[float, float, float]
    learning_rate: float  # of Muon; AdamW has a fifth of it
    decay_to: float  # what is left of it at the end, linearly


PHASES = (
    Phase(steps=1000, shares=(0.0, 0.85, 0.15), learning_rate=5e-3, decay_to=0.1),
    Phase(steps=350, shares=(0.5, 0.3, 0.2), learning_rate=2.5e-3, decay_to=0.0),
)


def train(model: LlamaForCausalLM, texts: Texts, phase: Phase, batch_size: int) -> None:
    """Muon for the matrices, which learns here from a third of the text that AdamW needs; AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(
            matrices, lr=phase.learning_rate, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=phase.learning_rate / 5, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, (step + 1) / 10) * (1 - (1 - phase.decay_to) * step / phase.steps)
        )
        for optimizer in optimizers
    ]
    start = time.monotonic()
    for step, (ids, labels) in zip(range(phase.steps), texts.batches(phase.shares, batch_size), strict=False):
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        if step % 50 == 0 or step + 1 == phase.steps:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - start:5.0f} s", flush=True)


Rows = dict[str, list[float]]


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, grader: Grader, per_level: int) -> Rows:
    """Held-out accuracy by level, a row for each way of asking:

    greedy, sampled   the prompt alone, at temperature 0 and 1
    worked            made to work by a first word, sampled
    reflected         after a wrong quick answer and the reflection prompt, sampled
    works by itself   not an accuracy: the share of sampled answers with steps
    """
    engine = TransformersEngine(
        model.eval(), eos_token_ids=[tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id, batch_size=100
    )
    rows: Rows = {}
    for level in LEVELS:
        examples, rng = generate([level], "test", 1, per_level), random.Random(level)

        def ask(temperature: float, endings: Sequence[str], examples: Sequence[Example] = examples) -> list[str]:
            prompts = [
                tokenizer.encode(PROMPT.format(example.problem)) + tokenizer.encode(ending)
                for example, ending in zip(examples, endings, strict=True)
            ]
            responses = engine.generate(prompts, Sampling(96, temperature), seed=0)
            return [str(tokenizer.decode(list(response.token_ids), skip_special_tokens=True)) for response in responses]

        wrong = [answer_only(wrong_answer(example, rng)) + REFLECTION for example in examples]
        answers = {
            "greedy": ask(0.0, [""] * per_level),
            "sampled": ask(1.0, [""] * per_level),
            "worked": ask(1.0, ["First"] * per_level),
            "reflected": ask(1.0, wrong),
        }
        for name, texts in answers.items():
            outcomes = grader([((e.answer or "",), last_box(t)) for e, t in zip(examples, texts, strict=True)])
            rows.setdefault(name, []).append(outcomes.count("correct") / per_level)
        works = sum("First" in text for text in answers["sampled"]) / per_level
        rows.setdefault("works by itself", []).append(works)
    return rows


def model_card(rows: Rows, parameters: int, per_level: int) -> str:
    """README.md of the folder."""
    lines = ["| level | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for index, name in enumerate([*map(str, LEVELS), "all"]):
        values = [row[index] if index < len(row) else sum(row) / len(row) for row in rows.values()]
        lines.append("| " + " | ".join([name, *(f"{100 * value:.0f} %" for value in values)]) + " |")
    return CARD.format(parameters=parameters, per_level=per_level, table="\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    folder = Path(__file__).parents[1] / "python" / "edge_grpo" / "tiny"
    steps = [phase.steps for phase in PHASES]
    parser.add_argument("--output", type=Path, default=folder, help="folder to write to (default: the package's)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the texts (default: 0)")
    parser.add_argument("--steps", type=int, nargs=len(PHASES), default=steps, help=f"of each phase (default: {steps})")
    parser.add_argument("--problems", type=int, default=100, help="held out for each level's accuracy (default: 100)")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    # The same bits without it, in less time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    for phase, num_steps in zip(PHASES, args.steps, strict=True):
        train(model, Texts(tokenizer, args.seed), replace(phase, steps=num_steps), batch_size=64)
    model.bfloat16()
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    grader = Grader()
    rows = measure(model.float(), tokenizer, grader, args.problems)
    grader.close()
    card = model_card(rows, model.num_parameters(), args.problems)
    (args.output / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
