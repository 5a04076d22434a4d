"""EDGE-GRPO's training loop: a step, and around the steps evaluation, logging, checkpoints and resuming.

``train`` is the entry point. The work of a step is in ``collect``, ``learner`` and ``credit``. Every process works on
whole groups, so that advantages need no communication.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs, gather_object

from edge_grpo.batching import Sample
from edge_grpo.collect import (
    Collector,
    check_answers,
    find_rejected_solutions,
    load_prompts,
    sampling_of,
)
from edge_grpo.config import TrainConfig, flatten, to_dict
from edge_grpo.config.seeds import derive_seed
from edge_grpo.credit import Outcome, assign_advantages, measure_kl, outcomes
from edge_grpo.data.doubts import doubts
from edge_grpo.evaluation.evaluate import Evaluation, evaluate
from edge_grpo.grading.rewards import Rewarder
from edge_grpo.learning.distribution import check_distribution, check_launch
from edge_grpo.learning.gathered import gathered
from edge_grpo.learning.learner import Learner
from edge_grpo.metrics import PhaseTimes, peak_bytes
from edge_grpo.policy.loading import eos_token_ids, load_model
from edge_grpo.policy.sharding import whole_parameters
from edge_grpo.policy.together import patience, together
from edge_grpo.rollout import build_engine
from edge_grpo.rollout.ahead import Rollouts
from edge_grpo.rollout.collected import Collected, to_plain
from edge_grpo.run import checkpoint, identity
from edge_grpo.run.files import write_text
from edge_grpo.run.folder import claim, discard
from edge_grpo.run.log import RunLog
from edge_grpo.run.plan import KEPT_CHECKPOINTS, Plan
from edge_grpo.run.stop import Stopped, StopRequests
from edge_grpo.run.trackers import check_trackers, start_trackers
from edge_grpo.run.watch import CorrectionWatch, RewardWatch
from edge_grpo.types import Prompt

_QUICK = 30.0  # seconds of a step
_LOGGED_COMPLETIONS = 8  # of each step


@dataclass(frozen=True)
class Summary:
    """How a run ended: held-out accuracy before and after (None without held-out data), and what it took."""

    output: Path
    before: Evaluation | None
    after: Evaluation | None
    steps: int
    seconds: float


def train(
    config: TrainConfig, *, resume: bool = False, overwrite: bool = False, accept_changes: bool = False
) -> Summary:
    """Train as ``config`` says and return how it went; the run's folder holds everything else.

    With ``resume`` the run continues after its newest checkpoint, with the same next step as if it had not stopped.
    It is refused if data, model or reward functions have changed since, unless with ``accept_changes``.
    With ``overwrite`` it replaces a run in the same folder, once everything has loaded. Raises ``FileExistsError`` when
    another process uses the folder, or when it holds a run and neither is asked for; ``FileNotFoundError`` when there
    is nothing to resume, ``ValueError`` when the configuration contradicts it; and ``Stopped``, a KeyboardInterrupt,
    after Ctrl-C or SIGTERM, once the step has ended and a checkpoint is saved. A second signal stops at once.
    """
    started = time.perf_counter()
    with claim(Path(config.output), resume=resume, overwrite=overwrite):
        trainer = Trainer(config)
        try:
            before, after = trainer.run(resume=resume, accept_changes=accept_changes)
        finally:
            trainer.close()
    return Summary(Path(config.output), before, after, config.steps, time.perf_counter() - started)


def plan(config: TrainConfig) -> Plan:
    """Load everything, make a step or two, and return what the run would take. Nothing is written."""
    trainer = Trainer(config)
    try:
        return trainer.plan()
    finally:
        trainer.close()


class Trainer:
    """One process's part of a run. All processes call the same methods in the same order."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.output = Path(config.output)
        self.checkpoints = self.output / "checkpoints"
        check_trackers(config.trackers)
        check_launch()
        self.accelerator = accelerator = Accelerator(
            mixed_precision="bf16" if config.model.precision == "mixed" else "no",
            log_with=list(config.trackers) or None,
            project_dir=config.output,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=patience(config.rollout)),
                # A pass uses each weight once. A cache would hold the 16-bit copies of all of them to its end.
                AutocastKwargs(cache_enabled=False),
            ],
        )
        check_distribution(config, accelerator)
        torch.manual_seed(config.seed)

        # Where parameters are split, the first process reads them for all.
        empty = config.model.sharding == "fsdp2" and not accelerator.is_main_process
        model, self.tokenizer = together(lambda: load_model(config.model, empty=empty))
        self.rewarder = Rewarder(config.reward)
        quiet = not accelerator.is_main_process
        load = partial(
            load_prompts,
            data=config.data,
            tokenizer=self.tokenizer,
            rewarder=self.rewarder,
            seed=config.seed,
            quiet=quiet,
        )
        prompts = check_answers(config, load(config.data.train, config.data.columns), quiet=quiet)
        rejected = find_rejected_solutions(config, prompts, self.rewarder, quiet=quiet)
        self.eval_prompts: list[Prompt] = []
        if config.eval.data is not None:
            columns = {name: column for name, column in config.data.columns.items() if name != "solution"}
            self.eval_prompts = load(config.eval.data, columns, limit=config.eval.size)
        for doubt in doubts(config, prompts, self.eval_prompts, self.tokenizer):
            self._say(doubt)

        self.learner = Learner(config, model, accelerator, pad_token_id=self.tokenizer.pad_token_id)
        self.engine = build_engine(config, self.learner.unwrapped, self.tokenizer)
        self.collector = Collector(
            config,
            prompts,
            engine=self.engine,
            rewarder=self.rewarder,
            tokenizer=self.tokenizer,
            eos_token_ids=eos_token_ids(model, self.tokenizer),
            rejected=rejected,
            rank=accelerator.process_index,
            processes=accelerator.num_processes,
        )
        self.rollouts = Rollouts(self._collect, ahead=bool(config.rollout.ahead), last=config.steps)

    def run(self, *, resume: bool, accept_changes: bool = False) -> tuple[Evaluation | None, Evaluation | None]:
        """Make all steps; return the evaluations before and after. Unless it resumes, an earlier run is replaced."""
        config, accelerator = self.config, self.accelerator
        own = self._identity()
        record = self._resume(own, accept_changes=accept_changes) if resume else None
        first = record.step if record else 0
        if config.trackers:
            start_trackers(accelerator, flatten(to_dict(config)))
        if accelerator.is_main_process:
            if not resume:
                discard(self.output)
            write_text(self.output / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
            identity.record(self.output, own, after_step=first)
        accelerator.wait_for_everyone()

        before = after = None
        quiet = not accelerator.is_main_process
        with (
            StopRequests(quiet=quiet) as stop,
            RunLog(accelerator, self.output, steps=config.steps, resume_step=first) as log,
        ):
            if self.eval_prompts and first == 0:
                before = after = self.evaluate()
                log.step(0, _evaluation_metrics(before))
            elif record and not record.evaluated and self._is_evaluated(first):
                after = self.evaluate()
                log.step(first, _evaluation_metrics(after))
            try:
                last_evaluation, received = self._make_steps(first, log, stop)
            except FloatingPointError as error:
                raise FloatingPointError(f"{error}; {checkpoint.what_is_left(self.checkpoints)}") from error
        if config.trackers:
            accelerator.end_training()
        if received:
            raise Stopped(received)
        return before, last_evaluation or after

    def _make_steps(self, first: int, log: RunLog, stop: StopRequests) -> tuple[Evaluation | None, int]:
        """Make the steps after ``first`` and save the final model; return the last evaluation, and a signal to stop.

        At a signal, a checkpoint takes the place of evaluation and final model: these can outlast the time that a
        preempted run is given, and a resumed run makes up for them. Raises FloatingPointError for a policy that is not
        finite, and leaves it unsaved.
        """
        config = self.config
        after: Evaluation | None = None
        samples: list[Sample] = []
        watches: list[RewardWatch | CorrectionWatch] = [RewardWatch(config.reward.weights)]
        if config.use_gec:
            watches.append(CorrectionWatch(config.correction))
        for step in range(first + 1, config.steps + 1):
            samples, metrics = self.step(step)
            received = stop.agreed(self.accelerator)
            if self._is_evaluated(step) and not received:
                after = self.evaluate()
                metrics |= _evaluation_metrics(after)
            log.completions(step, samples[:_LOGGED_COMPLETIONS], self._decode)
            log.step(step, metrics)
            for watch in watches:
                for sentence in watch.see(step, samples):
                    self._say(sentence)
            if received or (config.save_every and (step % config.save_every == 0 or step == config.steps)):
                self._save(step, samples, evaluated=not received)
            if received:
                return after, received
        self.learner.check_finite(samples)
        checkpoint.save_model(self.accelerator, self.output / "final", self.learner.model, self.tokenizer)
        return after, 0

    def _is_evaluated(self, step: int) -> bool:
        every = self.config.eval.every
        return bool(self.eval_prompts) and (step == self.config.steps or (every > 0 and step % every == 0))

    def step(self, step: int) -> tuple[list[Sample], dict[str, float]]:
        """Make one step (1-based): collect, learn. Returns all processes' samples and the step's metrics."""
        started = time.perf_counter()
        timed = PhaseTimes(self.accelerator.device)
        with self._sampling():
            collected = self.rollouts.take(step)
        samples = collected.samples
        self.engine.sleep()
        with timed("score"):
            self.learner.score(samples)
        self._assign_advantages(samples)
        with timed("update"):
            update_metrics = self.learner.update(samples, step)
        if self.config.rollout.ahead:
            with timed("wait"):
                self.rollouts.wait()
        with timed("update"):
            self.engine.update_weights(self.learner.model)
        total = time.perf_counter() - started

        everyone, metrics = gathered(collected, self.config, self.learner.loss, self.collector.corrector)
        metrics |= {f"time/{phase}": seconds for phase, seconds in {**collected.seconds, **timed.seconds}.items()}
        metrics |= update_metrics | {
            "time/total": total,
            "throughput/tokens_per_s": metrics["tokens/generated"] / total,
            "memory/peak_bytes": float(peak_bytes()),
        }
        return everyone, metrics

    def _collect(self, step: int) -> Collected:
        """Return this process's samples of a step, timed: ahead, without waiting for what the learner has queued."""
        timed = PhaseTimes(torch.device("cpu") if self.config.rollout.ahead else self.accelerator.device)
        with self.engine.phase():
            collected = self.collector.collect(step, timed)
        return replace(collected, seconds=timed.seconds)

    def _assign_advantages(self, samples: Sequence[Sample]) -> None:
        loss, kl_coef = self.learner.loss, self.config.reward.kl_coef
        if kl_coef:
            measure_kl(samples, self.config.reward.kl_penalty)
        others: list[Outcome] = []
        if loss.eda.scale_rewards == "batch" or loss.eda.mean_over == "batch":
            rank = self.accelerator.process_index
            shares = gather_object([outcomes(samples, loss, kl_coef)])
            others = [outcome for process, share in enumerate(shares) if process != rank for outcome in share]
        assign_advantages(samples, loss, entropy_driven=self.config.use_eda, kl_coef=kl_coef, others=others)

    def plan(self) -> Plan:
        """Make a step, and another one if that was quick, since the first also pays for what is made once."""
        _, metrics = self.step(1)
        if metrics["time/total"] < _QUICK:
            _, metrics = self.step(2)
        parameters = list(self.learner.model.parameters())
        device = self.accelerator.device
        return Plan(
            config=self.config,
            prompt_lengths=[len(prompt.token_ids) for prompt in self.collector.prompts],
            num_held_out=len(self.eval_prompts),
            parameters=sum(value.numel() for value in parameters),
            weight_bytes=sum(value.numel() * value.element_size() for value in parameters),
            trained_bytes=sum(value.numel() * value.element_size() for value in parameters if value.requires_grad),
            generated_tokens=int(metrics["tokens/generated"]),
            truncated=metrics["length/truncated"],
            peak_bytes=int(metrics["memory/peak_bytes"]),
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU",
            processes=self.accelerator.num_processes,
            step_seconds=metrics["time/total"],
        )

    def evaluate(self) -> Evaluation:
        """Return held-out accuracy with the run's evaluation settings; every process takes a share of the prompts."""
        config, accelerator = self.config, self.accelerator
        sampling = replace(sampling_of(config), temperature=config.eval_temperature)
        places = range(accelerator.process_index, len(self.eval_prompts), accelerator.num_processes)
        share_of = partial(
            evaluate,
            self.engine,
            [self.eval_prompts[place] for place in places],
            self.rewarder.grader,
            self.tokenizer,
            generations=config.eval.generations,
            sampling=sampling,
            seed=derive_seed(config.seed, "eval"),
            places=places,
            style=config.reward.answer,
            reasoning=config.reward.reasoning,
        )
        with self._sampling():
            share = together(share_of, within=self.engine.phase())
        return Evaluation.merge(gather_object([share]))

    def _sampling(self) -> AbstractContextManager[None]:
        """Within it the engine samples: that of transformers with the policy's own parameters, which must be whole."""
        if self.config.rollout.engine == "transformers":
            return whole_parameters(self.learner.policy)
        return nullcontext()

    def close(self) -> None:
        try:
            self.engine.close()
            self.rollouts.close()
        finally:
            self.rewarder.close()
            # accelerate would hold the next run in this process to this one's precision.
            AcceleratorState._reset_state()

    def _identity(self) -> identity.Identity:
        accelerator = self.accelerator
        return identity.identify(
            self.config,
            self.learner.model,
            self.tokenizer,
            self.collector.prompts,
            self.eval_prompts,
            device=accelerator.device,
            processes=accelerator.num_processes,
        )

    def _resume(self, own: identity.Identity, *, accept_changes: bool) -> checkpoint.Record:
        checkpoint.check_same_run(self.output, self.config)
        for sentence in identity.compare(self.output, own, accept=accept_changes):
            self._say(sentence)
        learner = self.learner
        record = checkpoint.load_latest(self.accelerator, self.checkpoints, learner.model, learner.optimizer)
        self.engine.update_weights(learner.model)
        if rollouts := checkpoint.load_rollouts(self.checkpoints, record):
            self.rollouts.pending = self.collector.from_plain(rollouts)
            if self.rollouts.pending is None:
                self._say(f"the samples of step {record.step + 1} that were saved are of other prompts: sampled again")
        return record

    def _save(self, step: int, samples: Sequence[Sample], *, evaluated: bool) -> None:
        learner, pending = self.learner, self.rollouts.pending
        learner.check_finite(samples)
        checkpoint.save(
            self.accelerator,
            self.checkpoints,
            step,
            learner.model,
            learner.optimizer,
            keep=KEPT_CHECKPOINTS,
            evaluated=evaluated,
            rollout=None if pending is None else to_plain(pending, self.collector.prompts),
            split=self.config.model.sharding != "none",
        )

    def _say(self, sentence: str) -> None:
        if self.accelerator.is_main_process:
            print(sentence, file=sys.stderr)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))


def _evaluation_metrics(evaluation: Evaluation) -> dict[str, float]:
    return {"eval/accuracy": evaluation.accuracy, "eval/stderr": evaluation.stderr}
