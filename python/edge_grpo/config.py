"""Configuration of a run: dataclasses with defaults, read from YAML and dotted overrides, strictly validated.

Every field is documented beside it (``edge-grpo train --help`` prints these lines). Unknown keys are rejected with the
nearest valid name. The loss and EDA sections are ``edge_kernels``' own configurations, so each fact stands once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from edge_kernels.config import GRPOLossConfig

Method = Literal["edge", "grpo", "grpo+reflection"]
Engine = Literal["transformers", "vllm", "vllm-server"]
Precision = Literal["float32", "bfloat16", "mixed"]
Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class ModelConfig:
    path: str = "edge_grpo:tiny"  # hub id, folder, .gguf file, or edge_grpo:tiny, the model shipped in the package
    precision: Precision = "float32"  # of parameters; mixed: float32 parameters under bfloat16 autocast
    gradient_checkpointing: bool = False  # recompute activations in the backward pass to save memory


@dataclass(frozen=True)
class DataConfig:
    train: str = "arithmetic"  # NAME[@SPLIT]: arithmetic[:LEVELS], reasoning_gym:TASK, hub id, file, or saved dataset
    eval: str | None = None  # held-out data in the same notation; None turns evaluation off
    eval_size: int = 200  # use at most this many held-out examples
    columns: dict[str, str] = field(default_factory=dict)  # maps problem, answer, solution to the dataset's columns
    system_prompt: str | None = None  # first message of the chat template
    prompt_template: str = "{problem}"  # user message; must contain {problem}
    max_prompt_length: int = 512  # tokens; longer prompts are left out, and counted in the log


@dataclass(frozen=True)
class RolloutConfig:
    engine: Engine = "transformers"  # what generates
    num_prompts: int = 8  # prompts per step, over all processes
    num_generations: int = 8  # responses per prompt: the group size G
    temperature: float = 1.0  # sampling temperature; the loss uses the same
    top_p: float = 1.0  # nucleus sampling
    max_completion_length: int = 256  # tokens of one response before correction
    batch_size: int = 64  # sequences generated at once per process


@dataclass(frozen=True)
class RewardConfig:
    accuracy: float = 1.0  # weight of the boxed answer being right (math-verify)
    format: float = 0.0  # weight of there being exactly one well-formed \boxed{}
    functions: dict[str, float] = field(default_factory=dict)  # package.module:function -> weight


@dataclass(frozen=True)
class CorrectionConfig:
    reflect: float = 0.5  # probability of appending the reflection prompt and letting the policy go on
    answer: float = 0.25  # probability of appending the reflection prompt and the right answer
    solution: float = 0.25  # probability of replacing the response by the reference solution
    reflection_text: str = " Wait! Something is wrong here."  # what reflect and answer append
    answer_text: str = " The correct answer is \\boxed{{{answer}}}."  # what answer appends then; contains {answer}
    max_length: int = 256  # tokens that a correction may add to a response
    truncated: bool = True  # whether responses cut off by the length limit are corrected too


@dataclass(frozen=True)
class OptimConfig:
    learning_rate: float = 1e-6  # peak, AdamW
    weight_decay: float = 0.0
    schedule: Schedule = "constant"  # after warm-up, down to zero at the last step for linear and cosine
    warmup_steps: int = 0
    max_grad_norm: float = 1.0  # clip the global gradient norm
    epochs: int = 1  # passes over each rollout
    minibatches: int = 1  # optimizer steps per pass; whole groups stay together
    micro_batch_size: int = 8  # sequences per forward and backward; changes memory, not the gradient


@dataclass(frozen=True)
class TrainConfig:
    method: Method = "edge"  # edge: EDA and GEC; grpo: neither; grpo+reflection: GEC with reflection only, no EDA
    eda: bool | None = None  # override the method's choice of Entropy-Driven Advantage
    gec: bool | None = None  # override the method's choice of Guided Error Correction
    steps: int = 100  # rollouts to train on
    seed: int = 0
    output: str = "runs/edge-grpo"  # the run's folder: configuration, metrics, completions, checkpoints, final model
    save_every: int = 50  # steps between checkpoints; 0 keeps only the final model
    keep_checkpoints: int = 2  # older ones are deleted
    eval_every: int = 0  # steps between evaluations; 0 evaluates before and after only
    eval_generations: int = 1  # responses per held-out example (avg@k)
    eval_temperature: float = 0.0  # 0 is greedy
    log_completions: int = 8  # responses written to completions.jsonl per step
    trackers: tuple[str, ...] = ()  # trackio, wandb, tensorboard: accelerate's trackers; JSONL is always written
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    loss: GRPOLossConfig = field(default_factory=GRPOLossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
