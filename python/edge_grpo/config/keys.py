"""The keys of a run's configuration: frozen dataclasses with defaults and rules, and what follows from them.

The comment beside a field is its help (``edge-grpo train --help``). The section ``loss`` is ``edge_kernels``' own
configuration, so its options are defined once. Reading files and overrides is in ``reading``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, Literal, get_type_hints

from edge_grpo.config.checks import did_you_mean, matches, mismatch, real, refuse, whole
from edge_grpo.config.correction import CorrectionConfig
from edge_grpo.config.model import ModelConfig
from edge_grpo.config.published import PublishedConfig
from edge_grpo.config.rollout import RolloutConfig
from edge_grpo.text import AnswerStyle, Reasoning, fill, find_answer
from edge_kernels.config import EDAConfig, GRPOLossConfig, KLEstimator, MeanOver, ScaleRewards

Method = Literal["edge", "grpo", "eda", "gec", "grpo+reflection"]
Schedule = Literal["constant", "linear", "cosine"]
OnError = Literal["fail", "zero", "skip"]
Unboxable = Literal["refuse", "drop", "keep"]
TRACKERS = ("trackio", "wandb", "tensorboard", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab")


_FIXED_IN_CHATS = {"conversation", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict"}


@dataclass(frozen=True)
class DataConfig:
    train: str = "arithmetic"  # NAME[@SPLIT]: arithmetic[:LEVELS], reasoning_gym:TASK, hub id, file, *.jsonl, or folder
    columns: dict[str, str] = field(default_factory=dict)  # maps problem, answer, solution to the dataset's columns
    system_prompt: str | None = None  # first message of the chat template
    prompt_template: str = "{problem}"  # user message; must contain {problem}
    # variables of the chat template: enable_thinking: false; chat_template names one of several templates
    chat_template_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    max_prompt_length: int = 512  # tokens; longer prompts are left out, and counted in the log
    unboxable: Unboxable = "refuse"  # training rows whose answer no model will give, such as a sentence: refuse or drop

    def __post_init__(self) -> None:
        problems = whole(1, max_prompt_length=self.max_prompt_length)
        roles = ("problem", "answer", "solution")
        problems += [
            f"columns maps {', '.join(roles)} to the dataset's columns; got the key {role!r}{did_you_mean(role, roles)}"
            for role in self.columns
            if role not in roles
        ]
        for name in sorted(_FIXED_IN_CHATS & self.chat_template_kwargs.keys()):
            problems.append(f"chat_template_kwargs must not set {name}, which this trainer does")
        if fill(self.prompt_template, "problem", "x") == fill(self.prompt_template, "problem", "y"):
            problems.append(f"prompt_template must contain {{problem}}; got {self.prompt_template!r}")
        refuse(problems)


@dataclass(frozen=True)
class EvalConfig:
    data: str | None = None  # held-out data, written as for data.train; null turns evaluation off, whatever eval.every
    size: int = 200  # use at most this many held-out examples
    every: int = 0  # steps between evaluations; 0 evaluates before and after only
    generations: int = 1  # responses per example (avg@k): one is greedy, several are sampled at rollout.temperature

    def __post_init__(self) -> None:
        refuse(whole(1, size=self.size, generations=self.generations) + whole(0, every=self.every))


@dataclass(frozen=True)
class RewardConfig:
    # by name: accuracy (answer right), format (exactly one well-formed answer), package.module:function; others are 0
    weights: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0})
    # how an answer is given; the last one counts: box \boxed{5}, hash #### 5, line Answer: 5, tag <answer>5</answer>
    answer: AnswerStyle = "box"
    # auto: no answer counts in an open <think> block; require_end: nor where there is no </think>; ignore: all count
    reasoning: Reasoning = "auto"
    tolerance: float = 0.0  # relative error that any number may have; a decimal fraction may always have 1e-6
    timeout: float = 5.0  # seconds to compare one answer, after which its outcome is timed_out
    function_timeout: float = 60.0  # seconds for one call of a function
    on_error: OnError = "fail"  # when a function fails: end the run, count it as 0, or leave the response out
    kl_coef: float = 0.0  # subtracts so much times the KL divergence to the initial policy, summed over the response
    kl_penalty: KLEstimator = "k1"  # of d = logprob - reference's: k1 d, abs |d|, k2 d^2 / 2, k3 exp(-d) + d - 1

    def __post_init__(self) -> None:
        problems = real("(0, 1e6]", timeout=self.timeout, function_timeout=self.function_timeout)
        problems += real(">= 0", tolerance=self.tolerance, kl_coef=self.kl_coef)
        problems += real("[-1e30, 1e30]", **{f"weights[{name!r}]": weight for name, weight in self.weights.items()})
        own = ("accuracy", "format")
        problems += [
            f"weights takes accuracy, format, and functions as package.module:function; got {name!r}"
            + did_you_mean(name, own)
            for name in self.weights
            if name not in own and not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", str(name))
        ]
        if not problems and not any(self.weights.values()):
            problems.append(f"weights must not all be 0: there would be nothing to learn; got {self.weights}")
        refuse(problems)

    @property
    def functions(self) -> list[str]:
        """The user's functions among ``weights``, by dotted path."""
        return [name for name in self.weights if ":" in name]


@dataclass(frozen=True)
class AdvantageConfig:
    clip: float = 10.0  # bounds P_hat, a response's relative entropy, to [1/clip, clip]; .inf for no bound
    preserve_scale: bool = False  # rescale the weights of a group so that its mean absolute advantage is unchanged
    mean_over: MeanOver = "group"  # P_hat is relative to the response's group (paper), or to the batch (published code)
    scale_rewards: bool | ScaleRewards = "group"  # divide by the standard deviation of the group, of the batch, or none

    def __post_init__(self) -> None:
        refuse(real(">= 1", clip=self.clip))


@dataclass(frozen=True)
class OptimConfig:
    learning_rate: float = 1e-6  # peak, AdamW
    weight_decay: float = 0.0  # AdamW's, decoupled from the gradient
    schedule: Schedule = "constant"  # after warm-up, down to zero at the last step for linear and cosine
    warmup_steps: int = 0  # optimizer steps in which the rate rises to its peak
    max_grad_norm: float = 1.0  # clip the global gradient norm; .inf for no clipping
    epochs: int = 1  # passes over each rollout
    minibatches: int = 1  # optimizer steps per pass; whole groups stay together
    micro_batch_size: int = 8  # sequences per forward and backward; changes memory, not the gradient
    micro_batch_tokens: int = 0  # tokens per forward and backward, padding included; 0: only micro_batch_size limits it
    packing: bool = False  # a micro-batch is one row without padding; attention keeps its sequences apart
    # with model.sharding: reduce the gradient after each micro-batch, for less memory and more communication
    reduce_each_micro_batch: bool = False

    def __post_init__(self) -> None:
        problems = whole(1, epochs=self.epochs, minibatches=self.minibatches, micro_batch_size=self.micro_batch_size)
        problems += whole(0, warmup_steps=self.warmup_steps, micro_batch_tokens=self.micro_batch_tokens)
        problems += real("(0, 1e37]", learning_rate=self.learning_rate) + real("> 0", max_grad_norm=self.max_grad_norm)
        problems += real(">= 0", weight_decay=self.weight_decay)
        if not problems and not self.learning_rate * self.weight_decay < 1:
            problems.append(
                "weight_decay x learning_rate is the share of every weight that a step removes, and must be less than "
                f"1; got {self.weight_decay} x {self.learning_rate}"
            )
        refuse(problems)


@dataclass(frozen=True)
class TrainConfig:
    method: Method = "edge"  # edge: EDA and GEC; eda, gec: that alone; grpo: neither; grpo+reflection: reflect alone
    steps: int = 100  # rollouts to train on
    seed: int = 0  # for data order, sampling and corrections
    output: str = "runs/edge-grpo"  # the run's folder: configuration, metrics, completions, checkpoints, final model
    save_every: int = 50  # steps between checkpoints, of which two are kept; 0 keeps only the final model
    trackers: tuple[str, ...] = ()  # trackio, wandb, tensorboard: accelerate's trackers; JSONL is always written
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    loss: GRPOLossConfig = field(default_factory=GRPOLossConfig)
    eda: AdvantageConfig = field(default_factory=AdvantageConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    published: PublishedConfig = field(default_factory=PublishedConfig)

    def __post_init__(self) -> None:
        refuse(_type_problems(self))
        if self.loss.loss_type == "dr_grpo":
            # TRL's constant is the generation limit. What corrections add is left out: all methods have one scale.
            loss = replace(self.loss, max_completion_length=self.rollout.max_completion_length)
            object.__setattr__(self, "loss", loss)
        refuse(self._range_problems() + self._conflicts())

    @property
    def use_eda(self) -> bool:
        """Whether advantages are entropy-driven."""
        return self.method in ("edge", "eda")

    @property
    def use_gec(self) -> bool:
        """Whether incorrect responses are corrected."""
        return self.method in ("edge", "gec", "grpo+reflection")

    @property
    def correction_config(self) -> CorrectionConfig:
        """The corrections to apply: those configured, or reflection alone for the method "grpo+reflection"."""
        if self.method == "grpo+reflection":
            return replace(self.correction, mix={"reflect": 1.0})
        return self.correction

    @property
    def loss_config(self) -> GRPOLossConfig:
        """The loss with everything but what the model decides: the soft cap and the logit scale."""
        clip = self.eda.clip
        eda = EDAConfig(1 / clip, clip, self.eda.preserve_scale, self.eda.mean_over, self.eda.scale_rewards)
        return replace(
            self.loss, temperature=self.rollout.temperature, sampler_ratio_cap=self.sampler_ratio_cap, eda=eda
        )

    @property
    def sampler_ratio_cap(self) -> float | None:
        """The bound on the importance ratio between trainer and sampler; None leaves the ratio out.

        ``loss.sampler_ratio_cap`` if that is set; else 2 where a vLLM engine samples, whose probabilities are not quite
        the trainer's.
        """
        if self.loss.sampler_ratio_cap is not None or self.rollout.engine == "transformers":
            return self.loss.sampler_ratio_cap
        return 2.0

    @property
    def eval_temperature(self) -> float:
        """The temperature of evaluation: greedy for one response per example, else that of the rollout."""
        return 0.0 if self.eval.generations == 1 else self.rollout.temperature

    def _range_problems(self) -> list[str]:
        problems = whole(1, steps=self.steps) + whole(0, seed=self.seed, save_every=self.save_every)
        if not self.output.strip():
            problems.append("output must be the path of a folder; got an empty string")
        problems += [
            f"trackers takes {', '.join(TRACKERS)}; got {name!r}{did_you_mean(name, TRACKERS)}"
            for name in self.trackers
            if name not in TRACKERS
        ]
        return problems

    def _conflicts(self) -> list[str]:
        """Return complaints about settings that are each fine and cannot go together.

        Each names the keys at fault before its first semicolon, where ``reading`` looks for whom to blame.
        """
        problems = []
        if self.rollout.num_prompts % self.optim.minibatches:
            problems.append(
                "rollout.num_prompts must be a multiple of optim.minibatches, because whole groups stay together; "
                f"got {self.rollout.num_prompts} prompts in {self.optim.minibatches} minibatches"
            )
        for name in ("pipeline_parallel_size", "data_parallel_size"):
            if self.rollout.engine == "vllm" and self.rollout.vllm.get(name, 1) != 1:
                problems.append(
                    f"rollout.vllm.{name} = {self.rollout.vllm[name]} and rollout.engine vllm cannot be combined: the "
                    "trainer's processes share engines by tensor_parallel_size alone; set rollout.engine to "
                    "vllm-server, or leave it at 1"
                )
        if self.rollout.engine == "vllm" and "distributed_executor_backend" in self.rollout.vllm:
            problems.append(
                "rollout.vllm.distributed_executor_backend must not be set with rollout.engine vllm, whose engines "
                "run in the trainer processes; leave it out, or set rollout.engine to vllm-server"
            )
        if self.model.load_in_4bit and self.rollout.engine != "transformers":
            problems.append(
                f"model.load_in_4bit and rollout.engine = {self.rollout.engine} cannot be combined: vLLM gets merged "
                "weights, and 4 bits cannot hold them; set rollout.engine to transformers"
            )
        correction = self.correction_config
        written = fill(correction.answer_text, "answer", "x + 7")
        if self.use_gec and correction.answer and find_answer(written, self.reward.answer) != "x + 7":
            problems.append(
                f"correction.answer_text must give the answer where reward.answer = {self.reward.answer!r} looks for "
                f"it; got {correction.answer_text!r}; write it in that style, or set answer to 0 in correction.mix"
            )
        if self.loss.entropy_coef != 0 and self.loss.top_entropy_quantile < 1:
            problems.append(
                "loss.entropy_coef and loss.top_entropy_quantile cannot be combined: the entropy bonus would act on "
                "the tokens of the quantile alone, whose number a micro-batch does not know; set one of them to its "
                "default"
            )
        if self.optim.packing and (self.published.padding_entropy or self.published.entropy_gradient):
            problems.append(
                "optim.packing and published.padding_entropy or entropy_gradient cannot be combined: these average "
                "over padding, of which a packed row has none; set optim.packing to false"
            )
        problems += self._entropy_gradient_conflicts()
        defaults = GRPOLossConfig()
        for name, source in LOSS_VALUES.items():
            default, value = getattr(defaults, name), getattr(self.loss, name)
            if value != default and not (name == "max_completion_length" and self.loss.loss_type == "dr_grpo"):
                problems.append(f"loss.{name} must be left at {default}; got {value!r}; it is {source}")
        return problems

    def _entropy_gradient_conflicts(self) -> list[str]:
        """Return complaints where the loss is not, on-policy, the weight of a token times its response's advantage."""
        if not (self.published.entropy_gradient and self.use_eda):
            return []
        allowed: dict[str, tuple[Any, ...]] = {
            "loss.loss_type": ("dapo", "bnpo", "grpo", "dr_grpo"),
            "loss.injected": ("credit", "mask"),
            "loss.top_entropy_quantile": (1,),
            "loss.off_policy_mask_threshold": (None,),
            "loss.sampler_ratio_cap": (None,),
            "rollout.engine": ("transformers",),  # a vLLM engine is corrected for
            "optim.epochs": (1,),
            "optim.minibatches": (1,),
            "eda.preserve_scale": (False,),
        }
        found = {key: getattr(getattr(self, key.partition(".")[0]), key.partition(".")[2]) for key in allowed}
        return [
            f"published.entropy_gradient and {key} = {found[key]} cannot be combined; its gradient is known for one "
            f"on-policy step of a plain loss; set {key} to {' or '.join(map(str, values))}"
            for key, values in allowed.items()
            if found[key] not in values
        ]


# Options of the loss that are not keys here, and where this trainer takes their values from.
LOSS_VALUES = {
    "temperature": "taken from rollout.temperature",
    "softcap": "taken from the model",
    "logit_scale": "taken from the model",
    "max_completion_length": "taken from rollout.max_completion_length",
    "sampler_ratio_floor": "always 0",
    "reward_kl_coef": "reward.kl_coef here",
    "reward_kl_penalty": "reward.kl_penalty here",
    "eda": "set in the section eda",
}


def options_of(cls: Any) -> dict[str, Any]:
    """Return the annotation of each option that can be set in a section; of ``TrainConfig``, its sections too."""
    hints = get_type_hints(cls)
    return {name: hints[name] for name in hints if cls is not GRPOLossConfig or name not in LOSS_VALUES}


def _type_problems(config: Any, prefix: str = "") -> list[str]:
    """Return complaints about fields of the wrong type in a configuration that was built in Python."""
    problems = []
    for name, annotation in options_of(type(config)).items():
        value = getattr(config, name)
        if not matches(value, annotation):
            problems.append(mismatch(f"{prefix}{name}", value, annotation))
        elif is_dataclass(annotation):
            problems += _type_problems(value, f"{prefix}{name}.")
    return problems
