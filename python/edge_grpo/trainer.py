"""EDGE-GRPO's training loop: rollout, reward, guided correction, scoring, entropy-driven advantages, update.

``train`` is the entry point; ``Trainer`` holds what a step needs and has one method per phase, in the order they run.
Every process of a distributed run works on whole groups, so that advantages need no communication.
"""

from __future__ import annotations

import contextlib
import copy
import math
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, gather_object
from torch import Tensor

from edge_grpo.batching import Batch, Sample, micro_batches, minibatches, pad, unpad
from edge_grpo.config import TrainConfig, flatten, to_dict
from edge_grpo.config.seeds import derive_seed
from edge_grpo.correction import Corrector
from edge_grpo.data.check import rejected_solutions
from edge_grpo.data.sources import load_examples, render_prompts
from edge_grpo.evaluation.evaluate import Evaluation, evaluate
from edge_grpo.grading.rewards import Rewarder
from edge_grpo.metrics import drift_metrics, sampler_metrics, step_metrics
from edge_grpo.policy.model import LMHead, PolicyModel, eos_token_ids, lm_head, load_model
from edge_grpo.rollout import build_engine
from edge_grpo.run import checkpoint
from edge_grpo.run.log import RunLog
from edge_grpo.types import Prompt, Provenance, Response, Sampling
from edge_kernels import (
    GRPOLossOutput,
    entropy_driven_advantages,
    entropy_weights,
    group_advantages,
    linear_edge_grpo_loss,
    linear_token_stats,
)

# What a resumed run may change: none of it touches the steps that were already made.
_MAY_CHANGE_ON_RESUME = {
    "steps",
    "output",
    "save_every",
    "keep_checkpoints",
    "eval_every",
    "log_completions",
    "trackers",
    "reward.function_timeout",
    "reward.on_error",
    "reward.workers",
    "rollout.server",
    "rollout.server_folder",
    "rollout.timeout",
}
_IGNORE_INDEX = -100


@dataclass(frozen=True)
class Summary:
    """How a run ended: held-out accuracy before and after (None without held-out data), and what it took."""

    output: Path
    before: Evaluation | None
    after: Evaluation | None
    steps: int
    seconds: float


def train(config: TrainConfig, *, resume: bool = False) -> Summary:
    """Train as ``config`` says and return how it went; the run's folder holds everything else.

    With ``resume`` the run continues after its newest checkpoint, with the same next step as if it had not stopped.
    Raises ``FileNotFoundError`` when there is nothing to resume, ``ValueError`` when the configuration contradicts it.
    """
    started = time.perf_counter()
    trainer = Trainer(config)
    try:
        before, after = trainer.run(resume=resume)
    finally:
        trainer.close()
    return Summary(Path(config.output), before, after, config.steps, time.perf_counter() - started)


class Trainer:
    """One process's part of a run. All processes call the same methods in the same order."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.output = Path(config.output)
        self.accelerator = Accelerator(
            mixed_precision="bf16" if config.model.precision == "mixed" else "no",
            log_with=list(config.trackers) or None,
            project_dir=config.output,
        )
        self._check_distribution()
        torch.manual_seed(config.seed)

        model, self.tokenizer = load_model(config.model)
        self.eos_token_ids = eos_token_ids(model, self.tokenizer)
        head = lm_head(model)
        self.loss_config = replace(
            config.loss,
            temperature=config.rollout.temperature,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            sampler_ratio_cap=config.sampler_ratio_cap,
        )
        self.rewarder = Rewarder(config.reward)
        self.prompts = self._load_prompts(config.data.train, config.data.columns)
        self.rejected_solutions = self._rejected_solutions()
        self.eval_prompts: list[Prompt] = []
        if config.data.eval is not None:
            columns = {name: column for name, column in config.data.columns.items() if name != "solution"}
            self.eval_prompts = self._load_prompts(config.data.eval, columns, limit=config.data.eval_size)

        self.reference: PolicyModel | None = None
        if config.loss.beta:
            frozen = copy.deepcopy(model).requires_grad_(False).eval()
            self.reference = PolicyModel(frozen).to(self.accelerator.device)
        policy = PolicyModel(model)
        optimizer = torch.optim.AdamW(
            policy.parameters(), lr=config.optim.learning_rate, weight_decay=config.optim.weight_decay
        )
        self.policy, self.optimizer = self.accelerator.prepare(policy, optimizer)
        # The scheduler counts this run's optimizer steps; accelerate's wrapper would advance it once per process.
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._learning_rate_factor)
        self.accelerator.register_for_checkpointing(self.scheduler)

        self.model = model
        self.engine = build_engine(config, model, self.tokenizer)
        self.sampling = Sampling(
            max_tokens=config.rollout.max_completion_length,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
        )
        self.corrector: Corrector | None = None
        if config.use_gec:
            self.corrector = Corrector(
                config.correction_config,
                engine=self.engine,
                encode=self._encode_text,
                decode=self._decode_all,
                eos_token_ids=self.eos_token_ids,
                sampling=self.sampling,
                rejected_solutions=self.rejected_solutions,
                reasoning=config.reward.reasoning,
            )
        self._seconds: dict[str, float] = {}

    # ------------------------------------------------------------------ the loop

    def run(self, *, resume: bool) -> tuple[Evaluation | None, Evaluation | None]:
        """Make all steps; return the evaluations before and after."""
        config, accelerator = self.config, self.accelerator
        first = self._resume() if resume else 0
        if accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
        accelerator.wait_for_everyone()
        if config.trackers:
            accelerator.init_trackers("edge-grpo", config=flatten(to_dict(config)))

        before = after = None
        with RunLog(accelerator, self.output, steps=config.steps, resume_step=first) as log:
            if self.eval_prompts and first == 0:
                before = after = self.evaluate()
                log.step(0, _evaluation_metrics(before))
            for step in range(first + 1, config.steps + 1):
                samples, metrics = self.step(step)
                last = step == config.steps
                if self.eval_prompts and (last or (config.eval_every and step % config.eval_every == 0)):
                    after = self.evaluate()
                    metrics |= _evaluation_metrics(after)
                log.completions(step, samples[: config.log_completions], self._decode_all)
                log.step(step, metrics)
                if config.save_every and (step % config.save_every == 0 or last):
                    checkpoint.save(accelerator, self.output / "checkpoints", step, keep=config.keep_checkpoints)
        checkpoint.save_model(accelerator, self.output / "final", self.model, self.tokenizer)
        if config.trackers:
            accelerator.end_training()
        return before, after

    def step(self, step: int) -> tuple[list[Sample], dict[str, float]]:
        """Make one step (1-based): sample, correct, learn. Returns all processes' samples and the step's metrics."""
        started = time.perf_counter()
        self._seconds = {}
        samples = self.sample(step)
        self.engine.sleep()
        with self._timed("score"):
            self.score(samples)
        self.assign_advantages(samples)
        with self._timed("update"):
            update_metrics = self.update(samples, step)
            self.engine.update_weights(self.model)
        total = time.perf_counter() - started

        everyone: list[Sample] = gather_object(samples)
        generated = sum(
            len(sample.first.token_ids) + sum(mark == Provenance.CONTINUED for mark in sample.response.provenance)
            for sample in everyone
        )
        metrics = step_metrics(everyone) | update_metrics
        if self.loss_config.sampler_ratio_cap is not None:
            metrics |= sampler_metrics(everyone, self.loss_config)
        metrics |= {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        if self.corrector is not None:  # what lack of room turned into a shorter kind or none, and what it cut
            counts = gather_object([(self.corrector.fallbacks.total(), self.corrector.num_truncated)])
            metrics["correction/fallbacks"] = float(sum(fallbacks for fallbacks, _ in counts))
            metrics["correction/truncated"] = float(sum(truncated for _, truncated in counts))
            metrics["correction/rejected_solutions"] = float(len(self.rejected_solutions))  # of the data
        metrics |= {
            "time/total": total,
            "throughput/tokens_per_s": generated / total,
            "memory/peak_bytes": float(_peak_bytes()),
        }
        return everyone, metrics

    # ------------------------------------------------------------------ the phases, in order

    def sample(self, step: int) -> list[Sample]:
        """Generate this process's groups, grade them, correct what is wrong, and grade what was corrected."""
        config, rank = self.config, self.accelerator.process_index
        size = config.rollout.num_generations
        prompts = [prompt for prompt in self._prompts_of(step) for _ in range(size)]
        with self._timed("rollout"):
            first = self.engine.generate(
                [prompt.token_ids for prompt in prompts],
                self.sampling,
                seed=derive_seed(config.seed, "rollout", step, rank),
            )
        with self._timed("reward"):
            first_rewards = self.rewarder(prompts, [self._decode(response.token_ids) for response in first])
        responses, rewards = list(first), list(first_rewards)
        if self.corrector is not None:
            with self._timed("correction"):
                responses = self.corrector(
                    prompts,
                    first,
                    first_rewards,
                    seed=derive_seed(config.seed, "correction", step),
                    offset=rank * len(prompts),
                    group_size=size,
                )
            with self._timed("reward"):
                changed = [index for index, response in enumerate(responses) if response is not first[index]]
                graded = self.rewarder(
                    [prompts[index] for index in changed],
                    [self._decode(responses[index].token_ids) for index in changed],
                )
                for index, reward in zip(changed, graded, strict=True):
                    rewards[index] = reward
        offset = rank * (len(prompts) // size)  # group numbers are unique over all processes
        return [
            Sample(prompts[i], offset + i // size, first[i], first_rewards[i], responses[i], rewards[i])
            for i in range(len(prompts))
        ]

    @torch.no_grad()
    def score(self, samples: Sequence[Sample]) -> None:
        """Fill logprobs and entropy: from the sampler's record, or from a forward pass over what has no record.

        Correcting for a mismatch between sampler and trainer needs the trainer's own logprobs, so then everything is
        scored. Reference logprobs, when the loss has a KL term, are always scored.
        """
        score_all = self.loss_config.sampler_ratio_cap is not None
        unscored = []
        for sample in samples:
            if score_all or not sample.response.is_recorded:
                unscored.append(sample)
            else:
                sample.logprobs = torch.tensor(sample.response.logprobs)
                sample.entropy = torch.tensor(sample.response.entropy)
        self.model.eval()
        for chunk in micro_batches(unscored, self.config.optim.micro_batch_size):
            for sample, logprobs, entropy in zip(chunk, *self._token_stats(self.unwrapped, chunk), strict=True):
                sample.logprobs, sample.entropy = logprobs, entropy
        if self.reference is not None:
            for chunk in micro_batches(samples, self.config.optim.micro_batch_size):
                for sample, logprobs in zip(chunk, self._token_stats(self.reference, chunk)[0], strict=True):
                    sample.ref_logprobs = logprobs

    def assign_advantages(self, samples: Sequence[Sample]) -> None:
        """Fill advantages and EDA weights over the true groups (arXiv:2507.21848, eqs. 3, 6, 7).

        Skipped responses are in no group: their advantage stays 0, and the others' is as if they were not there.
        """
        eda = self.config.loss.eda
        samples = [sample for sample in samples if not sample.reward.skipped]
        if not samples:
            return
        rewards = torch.tensor([sample.reward.total for sample in samples])
        groups = torch.tensor([sample.group for sample in samples])
        entropy = torch.nn.utils.rnn.pad_sequence(
            [sample.entropy for sample in samples if sample.entropy is not None], batch_first=True
        )
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(self._counts(sample.response), dtype=torch.bool) for sample in samples], batch_first=True
        )
        advantages = group_advantages(rewards, groups, scale_rewards=eda.scale_rewards)
        weights = torch.ones_like(advantages)
        if self.config.use_eda:
            weights = entropy_weights(entropy, mask, groups, eda, advantages=advantages)
            advantages = entropy_driven_advantages(rewards, entropy, mask, groups, eda)
        for sample, advantage, weight in zip(samples, advantages.tolist(), weights.tolist(), strict=True):
            sample.advantage, sample.weight = advantage, weight

    def update(self, samples: Sequence[Sample], step: int) -> dict[str, float]:
        """Learn from the rollout: ``epochs`` passes of ``minibatches`` optimizer steps each."""
        optim = self.config.optim
        totals = _LossTotals()
        norms: list[float] = []
        drift: list[tuple[Sample, list[float], list[float]]] = []
        self.model.train()
        for epoch in range(optim.epochs):
            seed = derive_seed(self.config.seed, "minibatches", step, epoch)
            for number, part in enumerate(minibatches(samples, optim.minibatches, seed=seed)):
                pairs = self.accumulate_gradient(part, totals)
                if epoch == number == 0:  # the weights are still those that sampled
                    drift = pairs
                norms.append(float(self.accelerator.clip_grad_norm_(self.policy.parameters(), optim.max_grad_norm)))
                learning_rate = float(self.scheduler.get_last_lr()[0])
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
        drifts = drift_metrics(gather_object(drift))
        return (
            totals.metrics(optim.epochs * optim.minibatches)
            | drifts
            | {"grad/norm": sum(norms) / len(norms), "optim/lr": learning_rate}
        )

    def accumulate_gradient(
        self, part: Sequence[Sample], totals: _LossTotals
    ) -> list[tuple[Sample, list[float], list[float]]]:
        """Add the gradient of one optimizer step's loss, the same however ``part`` is cut into micro-batches.

        Returns the samples that took part with their recomputed logprobs and entropies.
        """
        normalizers = self._normalizers(part)
        # DistributedDataParallel averages gradients over processes, while the normalizers are already global.
        scale = self.accelerator.num_processes
        chunks = list(micro_batches(self._teaching(part), self.config.optim.micro_batch_size))
        pairs: list[tuple[Sample, list[float], list[float]]] = []
        for position, chunk in enumerate(chunks):
            batch = self._pad(chunk)
            synchronize = position == len(chunks) - 1
            with contextlib.nullcontext() if synchronize else self.accelerator.no_sync(self.policy):
                out = self._loss(batch, normalizers)
                stands_in = chunk[0].reward.skipped  # alone in its chunk, for the reduction's sake
                self.accelerator.backward(out.loss * (0 if stands_in else scale))
            if stands_in:
                break
            totals.add(out)
            for sample, logprobs, entropy in zip(
                chunk, unpad(out.logprobs, batch), unpad(out.entropy, batch), strict=True
            ):
                pairs.append((sample, logprobs.tolist(), entropy.tolist()))
        return pairs

    def evaluate(self) -> Evaluation:
        """Return held-out accuracy with the run's evaluation settings; every process takes a share of the prompts."""
        config, accelerator = self.config, self.accelerator
        sampling = replace(self.sampling, temperature=config.eval_temperature, top_p=1.0)
        share = evaluate(
            self.engine,
            self.eval_prompts[accelerator.process_index :: accelerator.num_processes],
            self.rewarder.grader,
            self.tokenizer,
            generations=config.eval_generations,
            sampling=sampling,
            seed=derive_seed(config.seed, "eval", accelerator.process_index),
            reward=config.reward,
        )
        return Evaluation.merge(gather_object([share]))

    def close(self) -> None:
        try:
            self.engine.close()
        finally:
            self.rewarder.close()
            # accelerate would hold the next run in this process to this one's precision.
            AcceleratorState._reset_state()

    # ------------------------------------------------------------------ details

    @property
    def unwrapped(self) -> PolicyModel:
        """The policy without distributed hooks: scoring runs a different number of batches on each process."""
        return self.accelerator.unwrap_model(self.policy)

    def _loss(self, batch: Batch, normalizers: _Normalizers) -> GRPOLossOutput:
        optim = self.config.optim
        corrects_sampler = self.loss_config.sampler_ratio_cap is not None
        off_policy = optim.epochs * optim.minibatches > 1 or corrects_sampler

        def loss(hidden: Tensor, head: LMHead) -> GRPOLossOutput:
            return linear_edge_grpo_loss(
                hidden[:, :-1],
                head.weight,
                batch.targets,
                batch.completion_mask,
                head.bias,
                advantages=batch.advantages,
                # With one optimizer step per rollout the ratio's denominator is the current logprob, detached.
                old_logprobs=batch.logprobs if off_policy else None,
                ref_logprobs=batch.ref_logprobs,
                sampling_logprobs=batch.sampling_logprobs if corrects_sampler else None,
                injected_mask=batch.injected_mask,
                **normalizers._asdict(),
                config=self.loss_config,
            )

        return self.policy(batch.input_ids, batch.attention_mask, loss)

    def _token_stats(self, model: PolicyModel, chunk: Sequence[Sample]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the logprobs and the entropies of each sample's response tokens, by a forward pass."""
        batch = self._pad(chunk)
        config = self.loss_config

        def stats(hidden: Tensor, head: LMHead) -> tuple[Tensor, Tensor]:
            out = linear_token_stats(
                hidden[:, :-1],
                head.weight,
                batch.targets.masked_fill(~batch.completion_mask, _IGNORE_INDEX),
                head.bias,
                temperature=config.temperature,
                softcap=config.softcap,
                logit_scale=config.logit_scale,
                ignore_index=_IGNORE_INDEX,
            )
            return out.logprobs, out.entropy

        with self.accelerator.autocast():
            logprobs, entropy = model(batch.input_ids, batch.attention_mask, stats)
        return unpad(logprobs, batch), unpad(entropy, batch)

    def _normalizers(self, part: Sequence[Sample]) -> _Normalizers:
        """Return the totals over all processes that make micro-batch losses add up to the whole step's loss."""
        part = [sample for sample in part if not sample.reward.skipped]
        tokens = sum(sum(self._counts(sample.response)) for sample in part)
        counts = torch.tensor([tokens, len(part)], dtype=torch.int64, device=self.accelerator.device)
        tokens, sequences = self.accelerator.reduce(counts, reduction="sum").tolist()
        threshold = None
        if self.config.loss.top_entropy_quantile < 1:
            entropies = gather_object(
                [value for sample in part if sample.entropy is not None for value in sample.entropy]
            )
            if entropies:
                threshold = float(torch.quantile(torch.stack(entropies), 1 - self.config.loss.top_entropy_quantile))
        return _Normalizers(max(tokens, 1), max(sequences, 1), threshold)

    def _teaching(self, part: Sequence[Sample]) -> Sequence[Sample]:
        """Return the samples whose gradient is not exactly zero: a collapsed group need not pass through the model.

        They still count in the normalizers, which skipped ones do not. One sample is kept in any case, since every
        process has to reduce its gradient.
        """
        loss = self.config.loss
        everyone_teaches = loss.beta or loss.entropy_coef or loss.injected == "sft"
        active = [sample for sample in part if not sample.reward.skipped]
        return [sample for sample in active if everyone_teaches or sample.advantage != 0] or active[:1] or part[:1]

    def _counts(self, response: Response) -> list[bool]:
        """Return which tokens have a loss and count in the response's entropy: all but injected ones to be masked."""
        masked = self.config.loss.injected == "mask"
        return [not (masked and mark == Provenance.INJECTED) for mark in response.provenance]

    def _pad(self, samples: Sequence[Sample]) -> Batch:
        return pad(samples, self.tokenizer.pad_token_id, self.accelerator.device)

    def _prompts_of(self, step: int) -> list[Prompt]:
        """Return this process's prompts of a step: the data in a new order each epoch, whatever came before."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        per_step, per_process = self.config.rollout.num_prompts, self.config.rollout.num_prompts // processes
        start = (step - 1) * per_step + rank * per_process
        places = [divmod(position, len(self.prompts)) for position in range(start, start + per_process)]
        orders = {epoch: self._order(epoch) for epoch in {epoch for epoch, _ in places}}
        return [self.prompts[int(orders[epoch][offset])] for epoch, offset in places]

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "order", epoch))
        return torch.randperm(len(self.prompts), generator=generator)

    def _rejected_solutions(self) -> set[int]:
        """Return the rows whose reference solution their own grader rejects, where one might be injected."""
        if not (self.config.use_gec and self.config.correction_config.solution):
            return set()
        examples = [prompt.example for prompt in self.prompts]
        rejected = rejected_solutions(examples, self.rewarder.grader, self.config.reward.answer)
        rows = {examples[position].index for position in rejected}
        if rows and self.accelerator.is_main_process:
            print(
                f"{self.config.data.train}: {len(rows)} of {len(examples)} reference solutions are not injected: "
                "their own grader rejects them; edge-grpo check lists them",
                file=sys.stderr,
            )
        return rows

    def _load_prompts(self, spec: str, columns: Mapping[str, str], *, limit: int | None = None) -> list[Prompt]:
        data = self.config.data
        examples = load_examples(spec, columns, seed=self.config.seed, limit=limit)
        prompts, too_long = render_prompts(examples, self.tokenizer, data)
        if too_long and self.accelerator.is_main_process:
            print(f"{spec}: left out {too_long} prompts of more than {data.max_prompt_length} tokens", file=sys.stderr)
        self.rewarder.check(prompts)  # now, not in the step that first meets a row without an answer
        return prompts

    def _learning_rate_factor(self, update: int) -> float:
        optim = self.config.optim
        if update < optim.warmup_steps:
            return (update + 1) / optim.warmup_steps
        total = self.config.steps * optim.epochs * optim.minibatches - optim.warmup_steps
        progress = min(1.0, (update - optim.warmup_steps) / max(total, 1))
        if optim.schedule == "linear":
            return 1.0 - progress
        if optim.schedule == "cosine":
            return 0.5 * (1.0 + float(torch.cos(torch.tensor(progress * torch.pi))))
        return 1.0

    def _resume(self) -> int:
        saved = self.output / "config.yaml"
        if saved.is_file():
            old = flatten(yaml.safe_load(saved.read_text(encoding="utf-8")))
            new = flatten(to_dict(self.config))
            changed = [key for key in new if key not in _MAY_CHANGE_ON_RESUME and old.get(key) != new[key]]
            if changed:
                changes = ", ".join(f"{key} was {old.get(key)!r}, is {new[key]!r}" for key in changed)
                raise ValueError(
                    f"cannot resume {self.output}: {changes}; "
                    "resume with the run's own config.yaml, or start a new run with another output"
                )
        step = checkpoint.load_latest(self.accelerator, self.output / "checkpoints")
        self.engine.update_weights(self.model)
        return step

    def _check_distribution(self) -> None:
        kind = self.accelerator.distributed_type
        supported = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        if kind not in supported:
            raise ValueError(
                f"distributed type {kind.value} is not supported: sampling with transformers needs whole parameters on "
                "every process; launch with accelerate's plain data parallelism (--multi_gpu or --cpu)"
            )
        processes, prompts = self.accelerator.num_processes, self.config.rollout.num_prompts
        if processes > 1 and self.config.rollout.engine == "vllm":
            raise ValueError(
                f"rollout.engine='vllm' runs in one process; got {processes}; use 'vllm-server', which they can share"
            )
        if prompts % (processes * self.config.optim.minibatches):
            raise ValueError(
                f"rollout.num_prompts = {prompts} must be divisible by processes x optim.minibatches = "
                f"{processes} x {self.config.optim.minibatches}, since groups stay whole"
            )

    def _encode_text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def _decode_all(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - started


class _Normalizers(NamedTuple):
    """Totals of one optimizer step over all processes, under the names that the loss gives them."""

    num_items: int
    num_sequences: int
    entropy_threshold: float | None


class _LossTotals:
    """Adds up the loss and the metrics of micro-batches; means over all processes are formed once, at the end."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._maxima: dict[str, float] = {}

    def add(self, out: GRPOLossOutput) -> None:
        self._sums["loss"] += float(out.loss.detach())
        for name, value in out.metrics.items():
            if name.endswith("_max"):
                self._maxima[name] = max(self._maxima.get(name, 0.0), float(value))
            else:
                self._sums[name] += float(value)

    def metrics(self, optimizer_steps: int) -> dict[str, float]:
        """Return the named means and maxima. All processes call it."""
        sums: defaultdict[str, float] = defaultdict(float)
        maxima: dict[str, float] = {}
        for process_sums, process_maxima in gather_object([(self._sums, self._maxima)]):
            for name, value in process_sums.items():
                sums[name] += value
            for name, value in process_maxima.items():
                maxima[name] = max(maxima.get(name, 0.0), value)
        tokens = max(sums["tokens"], 1)
        metrics = {
            "loss": sums["loss"] / optimizer_steps,
            "clip/low": sums["clip_low"] / tokens,
            "clip/high": sums["clip_high"] / tokens,
            "clip/region": sums["clip_region"] / tokens,
            "ratio/mean": sums["ratio_sum"] / tokens,
            "ratio/max": maxima.get("ratio_max", math.nan),  # where every response was skipped
        }
        if "kl_sum" in sums:
            metrics["kl/mean"] = sums["kl_sum"] / tokens
        return metrics


def _evaluation_metrics(evaluation: Evaluation) -> dict[str, float]:
    return {"eval/accuracy": evaluation.accuracy, "eval/stderr": evaluation.stderr}


def _peak_bytes() -> int:
    """Return the process's peak memory: the accelerator's where there is one, else the resident set's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
