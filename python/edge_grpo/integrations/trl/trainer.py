"""``EdgeGRPOTrainer``: GRPOTrainer with three seams, each behind a switch: generation, advantages, the loss.

Correction over processes is ``guided``, the loss ``loss`` and ``head``, what the loss lacks ``options``.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from edge_grpo.integrations.trl.config import ConfiguredTrainer, EdgeGRPOConfig
from edge_grpo.integrations.trl.guard import check_trl
from edge_grpo.integrations.trl.guided import Attempts, Guide
from edge_grpo.integrations.trl.head import use_edge_kernels
from edge_grpo.integrations.trl.loss import fused_loss, loss_mask
from edge_grpo.integrations.trl.options import UnsupportedError, loss_config
from edge_grpo.policy.head import LMHead
from edge_grpo.policy.model import check_head
from edge_kernels import GRPOLossConfig, response_entropy, response_entropy_weights
from edge_kernels.advantages import apply_weights

Inputs = dict[str, Any]


@dataclass
class _Round:
    """What one generation batch collects on its way through TRL's code."""

    rows: list[Inputs]
    entropy: Tensor | None = None  # (B, T), of TRL's first scoring pass with the policy
    rewards: Tensor | None = None  # (processes * B, functions)
    injected: list[list[bool]] | None = None  # per token of each response


class EdgeGRPOTrainer(ConfiguredTrainer):
    """TRL's GRPOTrainer with entropy-driven advantages, guided error correction and the fused loss.

        trainer = EdgeGRPOTrainer(model=..., reward_funcs=..., args=EdgeGRPOConfig(...), train_dataset=...)

    Takes what GRPOTrainer takes. Rewards, generation, evaluation, adapters, checkpoints and trackers are TRL's.
    Evaluation is without corrections and entropy weights. Raises ImportError for a TRL that does not fit, TypeError for
    a GRPOConfig, and ValueError for settings that cannot work together.

    Where the fused loss lacks an option of TRL, the loss is TRL's own on statistics from ``edge_kernels``, and one
    warning names the option.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: EdgeGRPOConfig | None = None,
        *arguments: Any,
        **options: Any,
    ) -> None:
        check_trl()
        if args is None:
            args = EdgeGRPOConfig(output_dir="edge-grpo")
        if not isinstance(args, EdgeGRPOConfig):
            raise TypeError(f"args must be an EdgeGRPOConfig; got {type(args).__name__}; it takes the same arguments")
        self.settings = args.edge_settings()
        self._round: _Round | None = None
        super().__init__(model, reward_funcs, args, *arguments, **options)
        self._loss_config = self._prepare_fused_loss() if args.fused_loss else None
        self._guide = Guide(self) if args.gec else None
        if self._loss_config is None and args.gec and args.injected in ("sft", "shaped"):
            raise ValueError(
                f"injected={args.injected!r} is an option of the fused loss, which this run does not use; set it to "
                "'credit' or 'mask'"
            )

    # ---- The loss --------------------------------------------------------------------------------------------------

    def _prepare_fused_loss(self) -> GRPOLossConfig | None:
        """Put our statistics into the models and return the fused loss, or None where TRL's own is to be used."""
        policy = self.model.get_base_model() if is_peft_model(self.model) else self.model
        try:
            head = self._readable_head(policy)
        except UnsupportedError as error:
            self._warn(f"the fused loss cannot read this model's head: {error}; loss and statistics are TRL's")
            return None
        for model in (policy, self.ref_model):
            if model is not None:
                use_edge_kernels(
                    self.accelerator.unwrap_model(model),
                    temperature=self.temperature,
                    cast_to_fp32=self.args.cast_lm_head_to_fp32,
                )
        try:
            return loss_config(self, head)
        except UnsupportedError as error:
            self._warn(f"the fused loss does not offer {error}; the loss is TRL's, on statistics of edge_kernels")
            return None

    def _readable_head(self, policy: PreTrainedModel) -> LMHead:
        if len(set(getattr(policy, "hf_device_map", {"": 0}).values())) > 1:
            raise UnsupportedError("device_map splits the model over devices")
        was_training = policy.training
        policy.eval()
        try:
            plugin = self.args.deepspeed_plugin
            is_split = plugin is not None and plugin.zero_stage == 3
            # FSDP may leave the weights of all processes but one unread until now, and ZeRO-3 has emptied them.
            if not (self.is_fsdp_enabled or is_split):
                check_head(policy)
            return LMHead.of(policy)
        except ValueError as error:
            raise UnsupportedError(str(error)) from error
        finally:
            policy.train(was_training)

    def _warn(self, message: str) -> None:
        if self.accelerator.is_main_process:
            warnings.warn(message, stacklevel=4)

    def _compute_loss(self, model: torch.nn.Module, inputs: Inputs) -> Tensor:
        if self._loss_config is None:
            return super()._compute_loss(model, inputs)
        if inputs.get("pixel_values") is not None:
            self._warn("the fused loss takes no images; the loss is TRL's, on statistics of edge_kernels")
            self._loss_config = None
            return super()._compute_loss(model, inputs)
        return fused_loss(self, self._loss_config, model, inputs)

    # ---- Generation ------------------------------------------------------------------------------------------------

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        generated: tuple[Any, ...] = super()._generate(prompts)
        current = self._round
        if current is None or self._guide is None:
            return generated
        prompt_ids, completion_ids, tool_mask, completions, logprobs, *others = generated
        attempts = Attempts(prompt_ids, completion_ids, completions, logprobs)
        guided = self._guide.correct(current.rows, prompts, attempts, super()._calculate_rewards)
        current.rewards, current.injected = guided.rewards, guided.injected
        if self.args.injected == "mask":
            tool_mask = [[int(not mark) for mark in marks] for marks in guided.injected]
        prompt_ids, completion_ids, completions, logprobs = guided.attempts
        return prompt_ids, completion_ids, tool_mask, completions, logprobs, *others

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        current = self._round
        if current is not None and current.rewards is not None:
            return current.rewards  # each response was judged when it was made
        rewards: Tensor = super()._calculate_rewards(*args, **kwargs)
        if current is not None:
            current.rewards = rewards
        return rewards

    # ---- Advantages ------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[Inputs]) -> Inputs:
        if not (self.model.training and (self.args.eda or self.args.gec)):
            return super()._generate_and_score_completions(inputs)
        self._round = _Round(inputs)
        try:
            output = super()._generate_and_score_completions(inputs)
            if self.args.eda:
                self._scale_advantages(output, self._round)
            if self._round.injected is not None and self.args.injected in ("sft", "shaped"):
                output["injected_mask"] = _padded(self._round.injected, output["completion_ids"])
        finally:
            self._round = None
        return output

    def _get_per_token_logps_and_entropies(
        self, model: torch.nn.Module, *args: Any, compute_entropy: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        current = self._round
        wanted = current is not None and current.entropy is None and self.args.eda and model is self.model
        result = super()._get_per_token_logps_and_entropies(
            model, *args, compute_entropy=compute_entropy or wanted, **kwargs
        )
        if wanted and current is not None:
            current.entropy = result[1]
        return result

    def _scale_advantages(self, output: Inputs, current: _Round) -> None:
        """Multiply the advantages by the entropy weights of whole groups, which may lie on several processes."""
        # TRL's first pass was the policy's only if it kept the log-probabilities; else it may be the reference's.
        entropy = current.entropy if "old_per_token_logps" in output else None
        entropy = self._score_entropy(output) if entropy is None else entropy
        gather = self.accelerator.gather
        means = gather(response_entropy(entropy, loss_mask(output)))  # (processes * B,)
        if current.rewards is not None:  # a response without any reward is in no group
            means = means.masked_fill(current.rewards.isnan().all(dim=1), -torch.inf)
        advantages = gather(output["advantages"])
        groups = torch.arange(len(means), device=means.device) // self.num_generations
        weights = response_entropy_weights(means, groups, self.settings.eda, advantages=advantages)
        scaled = apply_weights(advantages, weights).to(advantages.dtype)
        size, rank = len(output["advantages"]), self.accelerator.process_index
        output["advantages"] = scaled[rank * size : (rank + 1) * size]
        logged = self._logs["advantages"]  # TRL put those of this batch there; the table shows what is learned from
        for _ in range(min(len(logged), len(scaled))):
            logged.pop()
        logged.extend(scaled.tolist())
        for name, value in (("min", weights.min()), ("mean", weights.mean()), ("max", weights.max())):
            self._metrics["train"][f"eda/weight_{name}"].append(value.item())

    @torch.no_grad()
    def _score_entropy(self, output: Inputs) -> Tensor:
        """Return the entropy of every completion's tokens by a forward pass, (B, T), nats."""
        names = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
        images = {name: value for name, value in output.items() if name in names}
        checkpointing: Any = self.args.gradient_checkpointing_kwargs
        with disable_gradient_checkpointing(self.model, checkpointing):
            _, entropy, _ = super()._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
                torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
                output["completion_ids"].size(1),
                batch_size=self.args.per_device_train_batch_size,
                compute_entropy=True,
                **images,
            )
        assert entropy is not None
        return entropy


def _padded(flags: list[list[bool]], like: Tensor) -> Tensor:
    """Return flags per token as a tensor of the shape and device of ``like`` (B, T)."""
    mask = torch.zeros(like.shape, dtype=torch.bool)
    for row, marks in enumerate(flags):
        mask[row, : len(marks)] = torch.tensor(marks, dtype=torch.bool)
    return mask.to(like.device)
