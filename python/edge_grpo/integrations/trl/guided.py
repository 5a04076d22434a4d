"""Guided error correction of a generation batch whose groups may lie on several processes.

Every process sees all attempts and makes the same plan. What has to be computed, continuations and rewards of corrected
responses, is dealt out in equal shares, so that all processes make the same calls with the same number of rows: TRL's
generation and its gathering of rewards are collective, and a vLLM server's answers are sliced by rank.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar, get_args

from accelerate.utils import gather_object
from torch import Tensor
from trl.chat_template_utils import parse_response
from trl.data_utils import is_conversational

from edge_grpo.config.checks import did_you_mean
from edge_grpo.config.seeds import derive_seed
from edge_grpo.correction import CorrectionPlan, Corrector
from edge_grpo.grading.rewards import Rewarder
from edge_grpo.integrations.trl.config import GRADER, ConfiguredTrainer
from edge_grpo.policy.encoding import TextEncoder
from edge_grpo.types import Correction, Example, Outcome, Prompt, Provenance, Response, Reward

T = TypeVar("T")
Rows = list[dict[str, Any]]
ComputeRewards = Callable[[Rows, list[Any], list[Any], list[list[int]]], Tensor]  # TRL's: gathers over processes


class Attempts(NamedTuple):
    """One process's responses, one entry each, as TRL's ``_generate`` returns them."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    completions: list[Any]  # texts or messages
    logprobs: list[list[float | None]] | None


@dataclass(frozen=True)
class Guided:
    """One process's responses after correction, and what TRL would compute again."""

    attempts: Attempts
    injected: list[list[bool]]  # per token
    rewards: Tensor  # (processes * B, functions): of the responses as they are now


class Guide:
    """Corrects the responses of each generation batch. All processes call ``correct``."""

    def __init__(self, trainer: ConfiguredTrainer) -> None:
        """Raises ValueError for what correction cannot work with."""
        args, settings, tokenizer = trainer.args, trainer.settings, trainer._tokenizer
        self.trainer, self.tokenizer = trainer, tokenizer
        for name, value in (
            ("tools", trainer.tools),
            ("environment_factory", trainer.environment_factories),
            ("rollout_func", trainer.rollout_func),
            ("a processor of images", trainer._is_vlm),
        ):
            if value:
                raise ValueError(f"gec=True corrects single turns of text; got {name}; set gec=False")
        if trainer.max_completion_length is None:
            raise ValueError("gec=True needs max_completion_length; got None; set it to the limit of a first attempt")
        self.judge: int | None = None  # the reward function's number; None is our grader
        if args.accuracy_reward != GRADER:
            name = trainer.reward_func_names[0] if args.accuracy_reward is None else args.accuracy_reward
            if name not in trainer.reward_func_names:
                choices = [*trainer.reward_func_names, GRADER]
                raise ValueError(
                    f"accuracy_reward must be one of {', '.join(choices)}; got {name!r}{did_you_mean(name, choices)}"
                )
            self.judge = trainer.reward_func_names.index(name)
        self.rewarder = Rewarder(replace(settings.reward, weights={"format": 1.0})) if self.judge is None else None
        self._check_columns()
        encoder = TextEncoder(tokenizer)
        self.corrector = Corrector(
            settings.correction,
            encode=encoder,
            encode_data=encoder,
            decode=lambda token_ids: str(tokenizer.decode(list(token_ids), skip_special_tokens=False)),
            eos_token_ids=trainer.eos_token_ids,
            max_tokens=trainer.max_completion_length,
            reasoning=settings.reward.reasoning,
        )

    def correct(self, rows: Rows, prompts: list[Any], attempts: Attempts, rewards: ComputeRewards) -> Guided:
        """Return the responses with incorrect ones corrected.

        ``rows`` and ``prompts`` are this process's, with one entry per response. ``rewards`` is called once with all
        responses and, if any was corrected on any process, once with corrected ones.
        """
        trainer, size = self.trainer, len(rows)
        before = rewards(rows, prompts, attempts.completions, attempts.completion_ids)
        logged = self._take_extra_columns()
        offset = trainer.accelerator.process_index * size
        shared = gather_object(list(map(self._judged, rows, attempts.prompt_ids, self._responses(attempts))))
        outcomes = self._outcomes(before, shared)
        plan = self._plan(shared, outcomes, self._totals(before).tolist())
        more = [self._response(*one) for one in self._continue(plan)]
        responses = self.corrector.apply(plan, more)
        changed = [place for place, one in enumerate(responses) if one is not shared[place][1]]
        own = range(offset, offset + size)
        completions = list(attempts.completions)
        for place in own:
            if responses[place] is not shared[place][1]:
                row = place - offset
                completions[row] = self._completion(prompts[row], attempts.prompt_ids[row], responses[place].token_ids)
        after = before.clone()
        if changed:
            entries = {
                place: (rows[place - offset], prompts[place - offset], completions[place - offset])
                for place in changed
                if place in own
            }
            share, again = self._judge_again(changed, entries, responses, rewards)
            after[changed] = again
            self._merge_extra_columns(logged, share, own)
        trainer._pending_extra_logs.update(logged)
        final = list(outcomes)
        again_judged = self._outcomes(after[changed], [(shared[place][0], responses[place]) for place in changed])
        for place, outcome in zip(changed, again_judged, strict=True):
            final[place] = outcome
        self._log(plan, responses, {"before": (outcomes, before), "after": (final, after)})
        result = [responses[place] for place in own]
        sampled = None
        if attempts.logprobs is not None:
            sampled = [[None if math.isnan(value) else value for value in one.logprobs] for one in result]
        return Guided(
            Attempts(attempts.prompt_ids, [list(one.token_ids) for one in result], completions, sampled),
            [[mark == Provenance.INJECTED for mark in one.provenance] for one in result],
            after,
        )

    # ---- Judging ---------------------------------------------------------------------------------------------------

    def _judged(self, row: dict[str, Any], prompt_ids: list[int], response: Response) -> tuple[Prompt, Response]:
        """What the plan needs to know of a response."""
        args = self.trainer.args
        answer, solution = (row.get(name) for name in (args.answer_column, args.solution_column))
        example = Example(
            0,
            "",
            None if answer is None else str(answer),
            None if solution is None else str(solution),
        )
        text = str(self.tokenizer.decode(prompt_ids, skip_special_tokens=False))
        return Prompt(example, text, tuple(prompt_ids)), response

    def _outcomes(self, rewards: Tensor, judged: Sequence[tuple[Prompt, Response]]) -> list[Outcome | None]:
        """The verdict on responses with these rewards, on every process; None where the reward does not apply."""
        if self.judge is not None:
            values = rewards[:, self.judge].tolist()
            threshold = self.trainer.args.accuracy_threshold
            return [None if math.isnan(v) else "correct" if v >= threshold else "wrong" for v in values]
        if not judged:
            return []
        assert self.rewarder is not None
        accelerator = self.trainer.accelerator
        share = share_of(judged, accelerator.process_index, accelerator.num_processes)
        texts = [str(self.tokenizer.decode(list(one.token_ids), skip_special_tokens=True)) for _, one in share]
        graded = self.rewarder([prompt for prompt, _ in share], texts)
        verdicts: list[Outcome | None] = gather_object([reward.outcome for reward in graded])
        return verdicts[: len(judged)]

    def _judge_again(
        self,
        changed: Sequence[int],
        entries: dict[int, tuple[dict[str, Any], Any, Any]],
        responses: Sequence[Response],
        rewards: ComputeRewards,
    ) -> tuple[list[int], Tensor]:
        """This process's share of the corrected responses, and the rewards of all of them, (len(changed), functions).

        ``entries`` has row, prompt and completion of this process's responses; another may have to judge them.
        """
        accelerator = self.trainer.accelerator
        everything = {place: entry for part in gather_object([entries]) for place, entry in part.items()}
        share = share_of(changed, accelerator.process_index, accelerator.num_processes)
        rows, prompts, completions = (list(column) for column in zip(*map(everything.get, share), strict=True))
        again = rewards(rows, prompts, completions, [list(responses[place].token_ids) for place in share])
        return share, again[: len(changed)]

    # ---- Planning and generating -----------------------------------------------------------------------------------

    def _plan(
        self, shared: Sequence[tuple[Prompt, Response]], outcomes: Sequence[Outcome | None], totals: Sequence[float]
    ) -> CorrectionPlan:
        """The same plan on every process: the draws depend on the step and on a response's place in the whole batch."""
        trainer = self.trainer
        micro_step = trainer._step % trainer.args.gradient_accumulation_steps  # a later batch of one optimizer step
        first = micro_step * trainer.accelerator.num_processes * trainer.args.per_device_train_batch_size
        places = range(first, first + len(shared))
        return self.corrector.plan(
            [prompt for prompt, _ in shared],
            [response for _, response in shared],
            [
                Reward(total, {}, outcome or "unparseable", skipped=outcome is None)
                for total, outcome in zip(totals, outcomes, strict=True)
            ],
            [place // trainer.num_generations for place in places],
            seed=derive_seed(trainer.args.seed, "correction", trainer.state.global_step + 1),
            keys=places,
        )

    def _continue(self, plan: CorrectionPlan) -> list[tuple[list[int], list[float | None] | None]]:
        """Tokens and log-probabilities of every continuation, from TRL's own sampler; each process samples a share."""
        wanted = [list(continuation.token_ids) for continuation in plan.continuations]
        if not wanted:
            return []
        accelerator = self.trainer.accelerator
        share = share_of(wanted, accelerator.process_index, accelerator.num_processes)
        with self._length_limit(plan.max_tokens):
            token_ids, logprobs = self.trainer._generate_single_turn(share, None, {}, 1)
        pairs = [(list(ids), None if logprobs is None else logprobs[row]) for row, ids in enumerate(token_ids)]
        gathered: list[tuple[list[int], list[float | None] | None]] = gather_object(pairs)
        return gathered[: len(wanted)]

    @contextmanager
    def _length_limit(self, max_tokens: int) -> Iterator[None]:
        """TRL's limit on generated tokens is a constant of its trainer; set it for a while."""
        trainer = self.trainer
        if trainer.use_vllm:
            engine = trainer.vllm_generation
            before, engine.max_completion_length = engine.max_completion_length, max_tokens
            try:
                yield
            finally:
                engine.max_completion_length = before
            return
        config, options = trainer.generation_config, trainer.generation_kwargs
        before, kept = config.max_new_tokens, dict(options)
        config.max_new_tokens = options["max_new_tokens"] = max_tokens
        try:
            yield
        finally:
            config.max_new_tokens = before
            options.update(kept)

    # ---- TRL's forms and ours --------------------------------------------------------------------------------------

    def _responses(self, attempts: Attempts) -> list[Response]:
        if attempts.logprobs is None:
            return [self._response(ids, None) for ids in attempts.completion_ids]
        return [self._response(*one) for one in zip(attempts.completion_ids, attempts.logprobs, strict=True)]

    def _response(self, token_ids: Sequence[int], logprobs: Sequence[float | None] | None) -> Response:
        unknown = (math.nan,) * len(token_ids)
        ended = bool(token_ids) and token_ids[-1] in self.trainer.eos_token_ids
        return Response(
            tuple(token_ids),
            unknown if logprobs is None else tuple(math.nan if value is None else value for value in logprobs),
            unknown,
            (Provenance.SAMPLED,) * len(token_ids),
            "stop" if ended else "length",
        )

    def _completion(self, prompt: Any, prompt_ids: list[int], token_ids: Sequence[int]) -> Any:
        """The completion as TRL gives it to reward functions."""
        ids = list(token_ids)
        if not is_conversational({"prompt": prompt}):
            return self.tokenizer.decode(ids, skip_special_tokens=True)
        if any(getattr(self.tokenizer, name, None) is not None for name in ("response_template", "response_schema")):
            return [parse_response(self.tokenizer, ids, prefix=prompt_ids, tools=[])]
        return [{"role": "assistant", "content": self.tokenizer.decode(ids, skip_special_tokens=True)}]

    def _take_extra_columns(self) -> dict[str, list[Any]]:
        """What reward functions have logged for the completions table since the last call."""
        taken = dict(self.trainer._pending_extra_logs)
        self.trainer._pending_extra_logs.clear()
        return taken

    def _merge_extra_columns(self, logged: dict[str, list[Any]], share: Sequence[int], own: range) -> None:
        """Put what was logged about corrected responses, on whichever process, in the place of the first attempts'."""
        for places, columns in gather_object([(list(share), self._take_extra_columns())]):
            for name, values in columns.items():
                column = logged.setdefault(name, [None] * len(own))
                if len(values) == len(places) and len(column) == len(own):
                    for place, value in zip(places, values, strict=True):
                        if place in own:
                            column[place - own.start] = value

    def _log(
        self,
        plan: CorrectionPlan,
        responses: Sequence[Response],
        judged: dict[str, tuple[Sequence[Outcome | None], Tensor]],
    ) -> None:
        """Add to TRL's metrics, under the names of our own trainer."""
        metrics, size = self.trainer._metrics["train"], self.trainer.num_generations
        kinds = Counter(one.correction for one in responses)
        values = {f"correction/{kind}": float(kinds[kind]) for kind in get_args(Correction)}
        values["correction/fallbacks"] = float(plan.fallbacks.total())
        values["correction/truncated"] = float(plan.num_truncated)
        for when, (outcomes, rewards) in judged.items():
            known = [outcome for outcome in outcomes if outcome is not None]
            values[f"accuracy/{when}"] = known.count("correct") / len(known) if known else math.nan
            totals = self._totals(rewards).view(-1, size)
            values[f"collapsed/{when}"] = (totals == totals[:, :1]).all(dim=1).float().mean().item()
        marks = [mark for one in responses for mark in one.provenance]
        values["tokens/injected_share"] = marks.count(Provenance.INJECTED) / max(len(marks), 1)
        for name, value in values.items():
            metrics[name].append(value)

    def _totals(self, rewards: Tensor) -> Tensor:
        """The weighted sum of each response's rewards, (processes * B,)."""
        return (rewards * self.trainer.reward_weights.to(rewards.device)).nansum(dim=1)

    def _check_columns(self) -> None:
        """Raise ValueError where the dataset has nothing to correct with."""
        args, correction = self.trainer.args, self.trainer.settings.correction
        columns = getattr(self.trainer.train_dataset, "column_names", None)
        if columns is None:
            return
        if self.judge is None and args.answer_column not in columns:
            raise ValueError(
                f"accuracy_reward={GRADER!r} compares with answer_column={args.answer_column!r}, which train_dataset "
                f"lacks; it has {', '.join(columns)}{did_you_mean(args.answer_column, columns)}"
            )
        usable = {
            "reflect": correction.reflect,
            "answer": correction.answer * (args.answer_column in columns),
            "solution": (correction.solution + correction.hint) * (args.solution_column in columns),
        }
        if not any(usable.values()):
            raise ValueError(
                f"nothing can be corrected: correction.mix is {correction.mix}, and train_dataset has neither "
                f"answer_column={args.answer_column!r} nor solution_column={args.solution_column!r} for it; it has "
                f"{', '.join(columns)}; name its columns, or add reflect to the mix"
            )


def share_of(items: Sequence[T], rank: int, ranks: int) -> list[T]:
    """Return the share of process ``rank``: as many items as every other, begun again from the first to fill up.

    The shares in order of rank, cut to ``len(items)``, are the items.
    """
    size = math.ceil(len(items) / ranks)
    return [items[(rank * size + number) % len(items)] for number in range(size)]
