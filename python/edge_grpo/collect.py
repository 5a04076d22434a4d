"""From prompts to samples: generate groups of responses, grade them, correct the wrong ones, grade those again.

What is corrected and how is ``correction``; nothing here learns. Every process collects whole groups of its own.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from edge_grpo.batching import Sample
from edge_grpo.config import DataConfig, TrainConfig
from edge_grpo.config.seeds import derive_seed
from edge_grpo.correction import CorrectionPlan, Corrector
from edge_grpo.data.check import rejected_solutions, unboxable_answers
from edge_grpo.data.prompts import render_prompts
from edge_grpo.data.sources import load_examples
from edge_grpo.grading.rewards import Rewarder
from edge_grpo.policy.encoding import TextEncoder
from edge_grpo.published import Rewriter
from edge_grpo.rollout.collected import Collected, from_plain
from edge_grpo.types import Prompt, Response, Reward, RolloutEngine, Sampling, TrainerState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Timed = Callable[[str], AbstractContextManager[None]]  # adds what the block takes to a phase's seconds


class Collector:
    """Collects the samples of each step for process ``rank`` of ``processes``."""

    def __init__(
        self,
        config: TrainConfig,
        prompts: Sequence[Prompt],
        *,
        engine: RolloutEngine,
        rewarder: Rewarder,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Sequence[int],
        rejected: frozenset[int] = frozenset(),
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        """``rejected`` are the rows whose solution is not to be injected (``find_rejected_solutions``)."""
        self.seed, self.rank, self.processes = config.seed, rank, processes
        self.num_prompts, self.num_generations = config.rollout.num_prompts, config.rollout.num_generations
        self.max_resamples = config.rollout.resample
        self.prompts, self.engine, self.rewarder, self.tokenizer = prompts, engine, rewarder, tokenizer
        self.sampling, self.num_steps = sampling_of(config), config.steps
        self.corrector: Corrector | None = None
        self.rewriter: Rewriter | None = None
        if config.use_gec:
            encoder = TextEncoder(tokenizer)
            self.corrector = Corrector(
                config.correction_config,
                encode=encoder,
                encode_data=encoder,
                decode=lambda token_ids: str(tokenizer.decode(list(token_ids), skip_special_tokens=False)),
                eos_token_ids=eos_token_ids,
                max_tokens=self.sampling.max_tokens,
                rejected_solutions=rejected,
                reasoning=config.reward.reasoning,
            )
            if config.published.drop_eos or config.published.reencode:
                self.rewriter = Rewriter(config, encode=encoder, decode=self._text, eos_token_ids=eos_token_ids)

    def collect(self, step: int, timed: Timed) -> Collected:
        """Return the samples of a step (1-based): all processes' are the same for the same seed and weights.

        Whatever the number of processes: what is drawn for a response depends on its place among all responses.

        With ``rollout.resample``, a group whose rewards are all equal after correction is replaced by one of another
        prompt, at most so many times; the last one stays even so. A step has the same number of groups in any case.
        Which prompts those are depends on the seed, the step and the group's number alone: nothing has to be saved for
        a resumed run, and processes need not wait for each other.
        """
        collected = self._collect(step, 0, {group: self.prompts[row] for group, row in self._rows(step).items()}, timed)
        for number in range(1, self.max_resamples + 1):
            collapsed = collapsed_groups(collected.samples)
            if not collapsed:
                break
            again = self._collect(step, number, self._other_prompts(step, number, collapsed), timed)
            collected = collected.replaced_by(again)
        return replace(collected, logged=self.rewarder.take_metrics())

    def _collect(self, step: int, number: int, prompt_of: Mapping[int, Prompt], timed: Timed) -> Collected:
        """Sample, grade and correct one group of each prompt; ``number`` 0 is the step's first sampling."""
        size = self.num_generations
        prompts = [prompt for prompt in prompt_of.values() for _ in range(size)]
        groups = [group for group in prompt_of for _ in range(size)]
        places = [group * size + member for group in prompt_of for member in range(size)]  # unique over all processes
        again = (number,) if number else ()
        with timed("rollout"):
            first = self.engine.generate(
                [prompt.token_ids for prompt in prompts],
                self.sampling,
                seed=derive_seed(self.seed, "rollout", step, *again),
                places=places,
            )
        with timed("reward"):
            first_rewards = self._judge(step, prompts, first)
        responses, rewards = list(first), list(first_rewards)
        plan: CorrectionPlan | None = None
        if self.corrector is not None:
            with timed("correction"):
                seed = derive_seed(self.seed, "correction", step, *again)
                plan = self.corrector.plan(prompts, first, first_rewards, groups, seed=seed, keys=places)
                seed = derive_seed(seed, "continuation")
                responses = carry_out(plan, self.engine, self.sampling, seed=seed, places=places)
                if self.rewriter is not None:
                    responses = self.rewriter(prompts, responses)
            with timed("reward"):
                changed = [index for index, response in enumerate(responses) if response is not first[index]]
                judged = self._judge(
                    step, [prompts[index] for index in changed], [responses[index] for index in changed]
                )
                for index, reward in zip(changed, judged, strict=True):
                    rewards[index] = reward
        samples = [Sample(*row) for row in zip(prompts, groups, first, first_rewards, responses, rewards, strict=True)]
        if plan is None:
            return Collected(samples)
        return Collected(samples, plan.fallbacks.total(), plan.num_truncated)

    def from_plain(self, trees: Sequence[Mapping[str, Any]]) -> Collected | None:
        """Return this process's part of what a checkpoint holds; see ``rollout.collected``."""
        return from_plain(trees, self.prompts, groups=self._groups, rank=self.rank, processes=self.processes)

    @property
    def _groups(self) -> range:
        """The numbers of this process's groups, in each step."""
        per_process = self.num_prompts // self.processes
        return range(self.rank * per_process, (self.rank + 1) * per_process)

    def _rows(self, step: int) -> dict[int, int]:
        """Return the row of each of this process's groups of a step; each epoch has its own order of the data."""
        return dict(zip(self._groups, self._rows_of(step, self._groups), strict=True))

    def _rows_of(self, step: int, groups: Iterable[int]) -> list[int]:
        places = [divmod((step - 1) * self.num_prompts + group, len(self.prompts)) for group in groups]
        orders = {epoch: self._order("order", epoch) for epoch in {epoch for epoch, _ in places}}
        return [orders[epoch][offset] for epoch, offset in places]

    def _other_prompts(self, step: int, number: int, groups: Iterable[int]) -> dict[int, Prompt]:
        """Return new prompts for some groups: rows that no process has in this step, each once while there are any."""
        taken = set(self._rows_of(step, range(self.num_prompts)))
        order = self._order("resample", step)
        others = [row for row in order if row not in taken] or order
        first = (number - 1) * self.num_prompts
        return {group: self.prompts[others[(first + group) % len(others)]] for group in groups}

    def _order(self, name: str, number: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, name, number))
        return torch.randperm(len(self.prompts), generator=generator).tolist()

    def _judge(self, step: int, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Reward]:
        seen, rows = (step - 1) * self.num_prompts, len(self.prompts)
        state = TrainerState(step - 1, self.num_steps, seen / rows, math.ceil(self.num_steps * self.num_prompts / rows))
        ids = [response.token_ids for response in responses]
        return self.rewarder(prompts, self._texts(responses), completion_ids=ids, state=state)

    def _texts(self, responses: Sequence[Response]) -> list[str]:
        return [self._text(one.token_ids) for one in responses]

    def _text(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))


def sampling_of(config: TrainConfig) -> Sampling:
    """Return how a run samples its first attempts."""
    rollout = config.rollout
    return Sampling(max_tokens=rollout.max_completion_length, temperature=rollout.temperature)


def collapsed_groups(samples: Sequence[Sample]) -> list[int]:
    """Return the groups whose rewards are all equal, skipped responses left out: they have no advantage."""
    rewards: dict[int, set[float]] = {sample.group: set() for sample in samples}
    for sample in samples:
        if not sample.reward.skipped:
            rewards[sample.group].add(sample.reward.total)
    return [group for group, values in rewards.items() if len(values) < 2]


def carry_out(
    plan: CorrectionPlan,
    engine: RolloutEngine,
    sampling: Sampling,
    *,
    seed: int,
    places: Sequence[int] | None = None,
) -> list[Response]:
    """Return the corrected responses of a plan; the engine generates all continuations, if any, in one call.

    ``places`` are those of the responses among all processes', by default their places in the plan.
    """
    if not plan.continuations:
        return Corrector.apply(plan, [])
    wanted = [continuation.token_ids for continuation in plan.continuations]
    own = [one.position if places is None else places[one.position] for one in plan.continuations]
    sampling = replace(sampling, max_tokens=plan.max_tokens)
    return Corrector.apply(plan, engine.generate(wanted, sampling, seed=seed, places=own))


def load_prompts(
    spec: str,
    columns: Mapping[str, str],
    *,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    rewarder: Rewarder,
    seed: int,
    limit: int | None = None,
    quiet: bool = False,
) -> list[Prompt]:
    """Return the prompts of a data set without those that are too long, whose number is printed unless ``quiet``.

    Raises ValueError for rows that ``rewarder`` cannot grade, before any step is made.
    """
    examples = load_examples(spec, columns, seed=seed, limit=limit, style=rewarder.config.answer)
    prompts, too_long = render_prompts(examples, tokenizer, data)
    if too_long and not quiet:
        print(f"{spec}: left out {too_long} prompts of more than {data.max_prompt_length} tokens", file=sys.stderr)
    rewarder.check(prompts)
    return prompts


def check_answers(config: TrainConfig, prompts: list[Prompt], *, quiet: bool = False) -> list[Prompt]:
    """Return the prompts to train on: without those whose answer no model will give, if ``data.unboxable`` is "drop".

    Raises ValueError for such answers if it is "refuse", and when none is left. Where answers earn nothing and are not
    injected, all prompts are returned.
    """
    if config.data.unboxable == "keep" or not (config.reward.weights.get("accuracy") or config.use_gec):
        return prompts
    found = unboxable_answers([prompt.example for prompt in prompts], config)
    if not found:
        return prompts
    position, detail = next(iter(found.items()))
    count = f"{config.data.train}: {len(found)} of {len(prompts)} answers are none that a model could give"
    if config.data.unboxable == "refuse" or len(found) == len(prompts):
        raise ValueError(
            f"{count} (row {prompts[position].example.index}: {detail}); edge-grpo check lists them; name the "
            "column of the final answer with data.columns.answer, repair the rows, leave them out with "
            "data.unboxable=drop, or keep them with data.unboxable=keep"
        )
    if not quiet:
        print(f"{count}: left out", file=sys.stderr)
    return [prompt for position, prompt in enumerate(prompts) if position not in found]


def find_rejected_solutions(
    config: TrainConfig, prompts: Sequence[Prompt], rewarder: Rewarder, *, quiet: bool = False
) -> frozenset[int]:
    """Return the rows whose reference solution their own grader rejects, where one might be injected."""
    correction = config.correction_config
    if not (config.use_gec and (correction.solution or correction.hint)):
        return frozenset()
    examples = [prompt.example for prompt in prompts]
    rejected = rejected_solutions(examples, rewarder.grader, config.reward.answer)
    rows = frozenset(examples[position].index for position in rejected)
    if rows and not quiet:
        print(
            f"{config.data.train}: {len(rows)} of {len(examples)} reference solutions are not injected: "
            "their own grader rejects them; edge-grpo check lists them",
            file=sys.stderr,
        )
    return rows
