"""Configuration of a run: dataclasses with defaults, read from YAML and dotted overrides, strictly validated.

Every field is documented beside it (``edge-grpo train --help`` prints these lines). Unknown keys are rejected with the
nearest valid name. The loss and EDA sections are ``edge_kernels``' own configurations, so each fact stands once.
The dataclasses come first, then reading (``load_config``), writing (``to_dict``), recipes, and the help (``describe``).
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import io
import math
import re
import textwrap
import tokenize
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from edge_grpo.text import AnswerStyle, Reasoning, fill, find_answer, last_box
from edge_kernels.config import GRPOLossConfig

Method = Literal["edge", "grpo", "grpo+reflection"]
Engine = Literal["transformers", "vllm", "vllm-server"]
Precision = Literal["float32", "bfloat16", "mixed"]
Schedule = Literal["constant", "linear", "cosine"]
OnError = Literal["fail", "zero", "skip"]
Scope = Literal["all", "collapsed", "one"]
LongSolution = Literal["shorter", "truncate", "skip"]


def _raise(problems: Iterable[str]) -> None:
    """Raise one ValueError that names every problem, so that a user mends a configuration in one go."""
    if text := "\n".join(problems):
        raise ValueError(text)


def _whole(least: int, **values: object) -> list[str]:
    """The complaints about values that are not integers of at least ``least``."""
    return [
        f"{name} must be a whole number of at least {least}; got {value!r}"
        for name, value in values.items()
        if isinstance(value, bool) or not isinstance(value, int) or value < least
    ]


def _real(bound: str, **values: object) -> list[str]:
    """The complaints about values that are not numbers within ``bound``: one of those listed here."""
    inside = {
        "> 0": lambda x: x > 0,
        ">= 0": lambda x: x >= 0,
        "(0, 1]": lambda x: 0 < x <= 1,
        "(0, 1e6]": lambda x: 0 < x <= 1e6,  # seconds: what waits on them takes no infinity
    }[bound]
    return [
        f"{name} must be a number {'in ' if bound[0] == '(' else ''}{bound}; got {value!r}"
        for name, value in values.items()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not inside(value)  # NaN is inside nothing
    ]


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

    def __post_init__(self) -> None:
        problems = _whole(1, eval_size=self.eval_size, max_prompt_length=self.max_prompt_length)
        roles = ("problem", "answer", "solution")
        for role in self.columns:
            if role not in roles:
                close = difflib.get_close_matches(str(role), roles, 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                problems.append(f"columns maps {', '.join(roles)} to the dataset's columns; got the key {role!r}{hint}")
        if fill(self.prompt_template, "problem", "x") == fill(self.prompt_template, "problem", "y"):
            problems.append(f"prompt_template must contain {{problem}}; got {self.prompt_template!r}")
        _raise(problems)


# Arguments of vLLM that are not a user's to set, and where their values come from.
_FIXED_IN_VLLM = {
    "model": "is model.path",
    "max_model_len": "is made of data.max_prompt_length, rollout.max_completion_length and correction.max_length",
    "max_num_seqs": "is rollout.batch_size",
    "logprobs_mode": "must be what the loss recomputes",
    "generation_config": "would change the distribution that is sampled",
    "skip_tokenizer_init": "is set, since only token ids pass",
    "disable_log_stats": "is set",
    "host": "is part of rollout.server",
    "port": "is part of rollout.server",
}


@dataclass(frozen=True)
class RolloutConfig:
    engine: Engine = "transformers"  # what generates
    num_prompts: int = 8  # prompts per step, over all processes
    num_generations: int = 8  # responses per prompt: the group size G
    temperature: float = 1.0  # sampling temperature; the loss uses the same
    top_p: float = 1.0  # nucleus sampling
    max_completion_length: int = 256  # tokens of one response before correction
    batch_size: int = 64  # sequences generated at once per process
    vllm: dict[str, bool | int | float | str] = field(default_factory=dict)  # vLLM's own arguments: dtype: bfloat16
    server: str = "127.0.0.1:8000"  # where vllm-server is found, and where edge-grpo serve listens
    server_folder: str | None = None  # takes the weights to vllm-server, which must see it too; null sends them by NCCL
    timeout: float = 600.0  # seconds that vllm-server may take to start, for a request, or for new weights

    def __post_init__(self) -> None:
        problems = _whole(
            1,
            num_prompts=self.num_prompts,
            max_completion_length=self.max_completion_length,
            batch_size=self.batch_size,
        )
        problems += _real("(0, 1]", top_p=self.top_p) + _real("(0, 1e6]", timeout=self.timeout)
        address = re.fullmatch(r"[^/\s:]+:(\d{1,5})", self.server)
        if not address or not 0 < int(address[1]) < 65536:
            problems.append(f"server must read HOST:PORT; got {self.server!r}")
        for name in sorted(name for name in self.vllm if "-" in name):
            problems.append(f"vllm takes its arguments with underscores; got {name!r}")
        for name in sorted(_FIXED_IN_VLLM.keys() & self.vllm.keys()):
            problems.append(f"vllm must not set {name}, which {_FIXED_IN_VLLM[name]}")
        if problem := _real("> 0", temperature=self.temperature):
            problems.append(f"{problem[0]}; greedy responses of a group would all be equal and teach nothing")
        if problem := _whole(2, num_generations=self.num_generations):
            problems.append(f"{problem[0]}; an advantage compares the responses of a group")
        _raise(problems)


@dataclass(frozen=True)
class RewardConfig:
    accuracy: float = 1.0  # weight of the answer being right (math-verify)
    format: float = 0.0  # weight of there being exactly one answer, and well-formed
    answer: AnswerStyle = "box"  # the last \boxed{}; or hash: #### 5, line: Answer: 5, tag: <answer>5</answer>
    reasoning: Reasoning = "auto"  # no answer in an open <think> block; or without any </think>; or ignore such blocks
    tolerance: float = 0.0  # relative error that any number may have; decimal fractions may always have 1e-6
    functions: dict[str, float] = field(default_factory=dict)  # package.module:function -> weight
    workers: int = 2  # processes that compare answers, for each training process
    timeout: float = 5.0  # seconds for comparing one answer; beyond, its outcome is timed_out
    function_timeout: float = 60.0  # seconds for one call of a function
    on_error: OnError = "fail"  # a function raised or overran: end the run, count it as 0, or leave the response out

    def __post_init__(self) -> None:
        weights = {"accuracy": self.accuracy, "format": self.format}
        weights |= {f"functions[{path!r}]": weight for path, weight in self.functions.items()}
        problems = _whole(1, workers=self.workers)
        problems += _real("(0, 1e6]", timeout=self.timeout, function_timeout=self.function_timeout)
        problems += _real(">= 0", tolerance=self.tolerance)
        for name, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                problems.append(f"{name} must be a finite number; got {weight!r}")
        for path in self.functions:
            if not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", str(path)):
                problems.append(f"functions are named package.module:function; got {path!r}")
        if not problems and not any(weights.values()):
            problems.append("accuracy, format and functions all have weight 0, so there is nothing to learn")
        _raise(problems)


@dataclass(frozen=True)
class CorrectionConfig:
    reflect: float = 0.5  # probability of appending the reflection prompt and letting the policy go on
    answer: float = 0.25  # probability of appending the reflection prompt and the right answer
    solution: float = 0.25  # probability of replacing the response by the reference solution
    reflection_text: str = " Wait! Something is wrong here."  # what reflect and answer append
    answer_text: str = " The correct answer is \\boxed{{{answer}}}."  # what answer appends then; contains {answer}
    max_length: int = 256  # tokens that a correction may add to a response
    truncated: bool = True  # whether responses cut off by the length limit are corrected too
    scope: Scope = "all"  # correct all wrong responses, those of collapsed groups, or one of each group with none right
    max_per_group: int | None = None  # correct at most so many responses of a group, drawn at random
    long_solution: LongSolution = "shorter"  # a solution beyond the limit: try answer, reflect; truncate it; or skip

    def __post_init__(self) -> None:
        kinds = {"reflect": self.reflect, "answer": self.answer, "solution": self.solution}
        problems = _real(">= 0", **kinds) + _whole(1, max_length=self.max_length)
        if self.max_per_group is not None:
            problems += _whole(1, max_per_group=self.max_per_group)
        if not problems and abs(sum(kinds.values()) - 1) > 1e-6:
            problems.append(
                "reflect, answer and solution are the probabilities of the three corrections and must add up to 1; got "
                f"{self.reflect} + {self.answer} + {self.solution} = {sum(kinds.values()):g}"
            )
        if not self.reflection_text.strip() and self.reflect + self.answer:
            problems.append("reflection_text must not be empty; set reflect and answer to 0 to leave it out")
        filled = fill(self.answer_text, "answer", "7")
        if filled == fill(self.answer_text, "answer", "8"):
            problems.append(f"answer_text must contain {{answer}}; got {self.answer_text!r}")
        elif "\\boxed" in filled and last_box(fill(self.answer_text, "answer", "x + 7")) != "x + 7":
            problems.append(
                f"answer_text must put {{answer}} into a readable \\boxed{{}}; got {self.answer_text!r}, which makes "
                f"{filled!r} of the answer 7; double the braces that are to stay: \\boxed{{{{{{answer}}}}}}"
            )
        _raise(problems)


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

    def __post_init__(self) -> None:
        problems = _whole(1, epochs=self.epochs, minibatches=self.minibatches, micro_batch_size=self.micro_batch_size)
        problems += _whole(0, warmup_steps=self.warmup_steps)
        problems += _real("> 0", learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm)
        _raise(problems + _real(">= 0", weight_decay=self.weight_decay))


@dataclass(frozen=True)
class TrainConfig:
    method: Method = "edge"  # edge: EDA and GEC; grpo: neither; grpo+reflection: GEC with reflection only, no EDA
    eda: bool | None = None  # override the method's choice of Entropy-Driven Advantage
    gec: bool | None = None  # override the method's choice of Guided Error Correction
    steps: int = 100  # rollouts to train on
    seed: int = 0  # of the order of the data, sampling and corrections
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

    def __post_init__(self) -> None:
        problems = _type_problems(self)
        if not problems:
            problems = self._range_problems() + self._conflicts()
        _raise(problems)

    @property
    def use_eda(self) -> bool:
        """Whether advantages are entropy-driven: the method's choice unless ``eda`` overrides it."""
        return self.method == "edge" if self.eda is None else self.eda

    @property
    def use_gec(self) -> bool:
        """Whether incorrect responses are corrected: the method's choice unless ``gec`` overrides it."""
        return self.method != "grpo" if self.gec is None else self.gec

    @property
    def sampler_ratio_cap(self) -> float | None:
        """The bound on the importance ratio between trainer and sampler; None leaves the ratio out.

        ``loss.sampler_ratio_cap`` if that is set; else 2 where a vLLM engine samples, whose probabilities are not quite
        the trainer's. Under ``top_p`` < 1 vLLM's are unknown. Floor and cap 1 give every token the ratio 1.
        """
        if self.loss.sampler_ratio_cap is not None or self.rollout.engine == "transformers":
            return self.loss.sampler_ratio_cap
        return 2.0 if self.rollout.top_p == 1 else None

    @property
    def correction_config(self) -> CorrectionConfig:
        """The corrections to apply: those configured, or reflection alone for the method "grpo+reflection"."""
        if self.method == "grpo+reflection":
            return dataclasses.replace(self.correction, reflect=1.0, answer=0.0, solution=0.0)
        return self.correction

    def _range_problems(self) -> list[str]:
        problems = _whole(
            1, steps=self.steps, keep_checkpoints=self.keep_checkpoints, eval_generations=self.eval_generations
        )
        problems += _whole(
            0,
            seed=self.seed,
            save_every=self.save_every,
            eval_every=self.eval_every,
            log_completions=self.log_completions,
        )
        if not self.output.strip():
            problems.append("output must be the path of a folder; got an empty string")
        return problems + _real(">= 0", eval_temperature=self.eval_temperature)

    def _conflicts(self) -> list[str]:
        """Settings that are each fine and cannot go together."""
        problems = []
        if self.rollout.num_prompts % self.optim.minibatches:
            problems.append(
                "rollout.num_prompts must be a multiple of optim.minibatches, because whole groups stay together; "
                f"got {self.rollout.num_prompts} prompts in {self.optim.minibatches} minibatches"
            )
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            if self.rollout.engine == "vllm" and self.rollout.vllm.get(name, 1) != 1:
                problems.append(
                    f"rollout.vllm.{name} = {self.rollout.vllm[name]} takes processes that the weights do not reach; "
                    "set rollout.engine to vllm-server, or leave it at 1"
                )
        if self.loss.sampler_ratio_cap is not None and self.rollout.engine != "transformers" and self.rollout.top_p < 1:
            problems.append(
                f"loss.sampler_ratio_cap = {self.loss.sampler_ratio_cap} needs the sampler's logprobs; vLLM reports "
                f"those that top_p changed; got rollout.top_p = {self.rollout.top_p}; set one of them to its default"
            )
        correction = self.correction_config
        filled = fill(correction.answer_text, "answer", "x + 7")
        if self.use_gec and correction.answer and find_answer(filled, self.reward.answer) != "x + 7":
            problems.append(
                f"correction.answer_text must give the answer where reward.answer = {self.reward.answer!r} looks for "
                f"it; got {correction.answer_text!r}"
            )
        if self.eval_every and self.data.eval is None:
            problems.append(f"eval_every = {self.eval_every} needs held-out data; set data.eval, or eval_every to 0")
        if self.eval_generations > 1 and self.eval_temperature == 0:
            problems.append(
                f"eval_generations = {self.eval_generations} at eval_temperature 0 would repeat one greedy response; "
                "set eval_temperature above 0, or eval_generations to 1"
            )
        if self.loss.entropy_coef != 0 and self.loss.top_entropy_quantile < 1:
            problems.append(
                "loss.entropy_coef and loss.top_entropy_quantile cannot be combined: the entropy bonus would act on "
                "the tokens of the quantile alone, whose number a micro-batch does not know; set one of them to its "
                "default"
            )
        defaults = GRPOLossConfig()
        for key, source in _FROM_ELSEWHERE.items():
            name = key.removeprefix("loss.")
            default, value = getattr(defaults, name), getattr(self.loss, name)
            if value != default:
                problems.append(f"{key} must be left at {default}; got {value!r}; it is {source}")
        return problems


# Keys that the loss has for other trainers' sake, and where this one takes their values.
_FROM_ELSEWHERE = {
    "loss.temperature": "taken from rollout.temperature",
    "loss.softcap": "taken from the model",
    "loss.logit_scale": "taken from the model",
}


# ---- Reading -------------------------------------------------------------------------------------------------------

Config = TypeVar("Config")
_NULL = ("null", "Null", "NULL", "~", "None")


def load_config(path: Path | str | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration in a YAML file (None: the defaults) after ``overrides`` such as "optim.learning_rate=1e-5".

    A value of an override is read as its field's type: text is taken as it stands, everything else is YAML, ``null``
    is None, and lists may be written "a,b". Raises FileNotFoundError without the file, and one ValueError that lists
    every unknown key, every value of the wrong type or range, and every conflict.
    """
    tree = _read_yaml(Path(path)) if path is not None else {}
    problems: list[str] = []
    for override in overrides:
        _apply_override(tree, override, problems)
    return _build_all(tree, problems, f"{path}: " if path is not None else "")


def from_dict(tree: Mapping[str, Any]) -> TrainConfig:
    """The configuration in a nested mapping; the inverse of ``to_dict``, as strict as ``load_config``."""
    return _build_all(tree, [], "")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested dicts of plain values that YAML and JSON can hold; tuples become lists."""

    def plain(value: Any) -> Any:
        if is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    result: dict[str, Any] = plain(config)
    return result


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of what ``to_dict`` returns, by dotted key; a mapping that is itself a value stays whole."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        is_section = isinstance(value, Mapping) and (key not in _key_types() or is_dataclass(_key_types()[key]))
        leaves |= flatten(value, f"{key}.") if is_section else {key: value}
    return leaves


class _Loader(yaml.SafeLoader):
    """SafeLoader that rejects a key given twice, where YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                key, line = key_node.value, key_node.start_mark.line + 1
                if key in seen:
                    raise ValueError(f"line {line}: the key {key!r} stands already in line {seen[key]}")
                seen[key] = line
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {path}; recipes by name are: {', '.join(recipe_names())}")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold `key: value` lines; got a {type(tree).__name__}")
    return tree


def _apply_override(tree: dict[str, Any], override: str, problems: list[str]) -> None:
    """Put KEY=VALUE into ``tree``. What follows the name of a dict field is that dict's key, dots and all."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        problems.append(f"an override must read KEY=VALUE; got {override!r}")
        return
    types_by_key = _key_types()
    owner = next((k for k, kind in types_by_key.items() if get_origin(kind) is dict and key.startswith(f"{k}.")), None)
    path = [*owner.split("."), key[len(owner) + 1 :]] if owner else key.split(".")
    annotation = get_args(types_by_key[owner])[1] if owner else types_by_key.get(key)
    if annotation is None:
        problems.append(_unknown(key))
        return
    if is_dataclass(annotation):
        problems.append(f"{key} is a section; set one of its keys, for example {key}.{_leaf_names(annotation)[0]}=...")
        return
    try:
        value = _parse(text.strip(), annotation)
    except (yaml.YAMLError, ValueError) as error:
        problems.append(f"{key}={text} is not readable as YAML: {' '.join(str(error).split())}")
        return
    section: Any = tree
    for name in path[:-1]:
        if section.get(name) is None:
            section[name] = {}
        section = section[name]
        if not isinstance(section, dict):
            return  # the file holds something else where a section belongs, which is reported when it is built
    section[path[-1]] = value


def _parse(text: str, annotation: Any) -> Any:
    if type(None) in _members(annotation) and text in _NULL:
        return None
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'"
    members = _members(annotation)
    if not quoted and bool not in members and any(member is str or get_origin(member) is Literal for member in members):
        return text
    if get_origin(annotation) is tuple and not text.startswith("["):
        return [item.strip() for item in text.split(",") if item.strip()]
    return yaml.load(text, _Loader)


def _build_all(tree: Mapping[str, Any], problems: list[str], source: str) -> TrainConfig:
    config = _build(TrainConfig, tree, "", problems)
    if config is None or problems:
        listed = problems if len(problems) == 1 else [f"{len(problems)} problems", *(f"  - {p}" for p in problems)]
        raise ValueError(source + "\n".join(listed))
    return config


def _build(cls: type[Config], tree: Mapping[Any, Any], prefix: str, problems: list[str]) -> Config | None:
    """An instance of the dataclass ``cls`` from ``tree``, or None after adding to ``problems``."""
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    before = len(problems)
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in hints:
            problems.append(_unknown(key))
        elif not is_dataclass(hints[name]):
            values[name] = _convert(value, hints[name], key, problems)
        elif value is not None and not isinstance(value, Mapping):
            problems.append(f"{key} is a section and must hold `key: value` lines; got {value!r}")
        elif (section := _build(hints[name], value or {}, f"{key}.", problems)) is not None:
            values[name] = section
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except ValueError as error:
        for line in str(error).splitlines():
            problems.append(prefix + line if line.split()[0] in hints else f"{prefix[:-1]}: {line}" if prefix else line)
        return None


# ---- Types ---------------------------------------------------------------------------------------------------------


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _convert(value: Any, annotation: Any, key: str, problems: list[str]) -> Any:
    """``value`` from YAML as ``annotation``, where only spelling differs; a complaint in ``problems`` otherwise."""
    members = _members(annotation)
    if value is None and type(None) in members:
        return None
    if float in members and isinstance(value, (str, int)) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML 1.1 reads 1e-6 as text: it wants 1.0e-6
        except (ValueError, OverflowError):
            number = math.nan
        if not math.isnan(number):
            return number
    if isinstance(value, list) and any(get_origin(member) is tuple for member in members):
        value = tuple(value)
    if not _matches(value, annotation):
        problems.append(_mismatch(key, value, annotation))
    return value


def _matches(value: Any, annotation: Any) -> bool:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(_matches(value, member) for member in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(_matches(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(
            _matches(k, arguments[0]) and _matches(v, arguments[1]) for k, v in value.items()
        )
    if annotation in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if annotation is float else annotation)


def _describe_type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe_type(member) for member in arguments)
    if origin is Literal:
        return "one of " + ", ".join(arguments)
    if origin is tuple:
        return f"a list, each item {_describe_type(arguments[0])}"
    if origin is dict:
        return f"a mapping from {_describe_type(arguments[0])} to {_describe_type(arguments[1])}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _mismatch(key: str, value: Any, annotation: Any) -> str:
    complaint = f"{key} must be {_describe_type(annotation)}; got {value!r}"
    literals = [member for member in _members(annotation) if get_origin(member) is Literal]
    choices = [choice for literal in literals for choice in get_args(literal)]
    if choices and (close := difflib.get_close_matches(str(value), choices, 1)):
        complaint += f"; did you mean {close[0]}?"
    elif str in _members(annotation) and isinstance(value, (bool, int, float)):
        complaint += "; put it in quotes"
    return complaint


def _type_problems(config: Any, prefix: str = "") -> list[str]:
    """Complaints about fields of the wrong type in a configuration that was built in Python."""
    problems = []
    for name, annotation in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not _matches(value, annotation):
            problems.append(_mismatch(f"{prefix}{name}", value, annotation))
        elif is_dataclass(annotation):
            problems += _type_problems(value, f"{prefix}{name}.")
    return problems


@functools.cache
def _key_types(cls: Any = TrainConfig, prefix: str = "") -> dict[str, Any]:
    """The annotation of every dotted key, sections included."""
    found = {f"{prefix}{name}": annotation for name, annotation in get_type_hints(cls).items()}
    for name, section in _sections(cls).items():
        found |= _key_types(section, f"{prefix}{name}.")
    return found


def _sections(cls: Any) -> dict[str, Any]:
    return {name: annotation for name, annotation in get_type_hints(cls).items() if is_dataclass(annotation)}


def _leaf_names(cls: Any) -> list[str]:
    return [name for name in get_type_hints(cls) if name not in _sections(cls)]


def _unknown(key: str) -> str:
    """The complaint about an unknown key, with the nearest valid one: a typo, or a key that forgot its section."""
    valid = _key_types()
    close = difflib.get_close_matches(key, valid, 1, cutoff=0.75)
    if not close:
        leaf = difflib.get_close_matches(key.rpartition(".")[2], {k.rpartition(".")[2] for k in valid}, 1, cutoff=0.75)
        close = [k for k in valid if leaf and k.rpartition(".")[2] == leaf[0]]
    return f"unknown key {key}" + (f"; did you mean {' or '.join(close)}?" if close else "")


# ---- Recipes and help ----------------------------------------------------------------------------------------------


_RECIPES = Path(__file__).resolve().parents[1] / "recipes"  # in a checkout a link to its top-level folder


def recipe_names() -> list[str]:
    """The names that ``recipe_path`` knows."""
    return sorted(path.stem for path in _RECIPES.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The YAML file of a recipe that is shipped with the package, by its name without ".yaml"."""
    path = _RECIPES / f"{name.removesuffix('.yaml')}.yaml"
    if name and Path(name).name == name and path.is_file():
        return path
    close = difflib.get_close_matches(name, recipe_names(), 1)
    hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(recipe_names()) or 'none'}"
    raise ValueError(f"no recipe of the name {name!r} (a file goes by --config); {hint}")


class Entry(NamedTuple):
    """One configuration key as ``edge-grpo train --help`` shows it."""

    key: str
    type: str
    default: Any
    help: str


def describe(cls: Any = TrainConfig, prefix: str = "") -> Iterator[Entry]:
    """Yield every key that can be set, sections last, with the help that stands beside its field."""
    notes = _notes(cls)
    hints = get_type_hints(cls)
    defaults = cls()
    for name in _leaf_names(cls):
        if (key := f"{prefix}{name}") not in _FROM_ELSEWHERE:
            yield Entry(key, _short_type(hints[name]), getattr(defaults, name), notes.get(name, ""))
    for name, section in _sections(cls).items():
        yield from describe(section, f"{prefix}{name}.")


def _short_type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return "|".join(_short_type(member) for member in arguments)
    if origin is Literal:
        return "|".join(arguments)
    if origin is tuple:
        return f"list[{_short_type(arguments[0])}]"
    if origin is dict:
        return f"dict[{_short_type(arguments[0])},{_short_type(arguments[1])}]"
    return "null" if annotation is type(None) else annotation.__name__


def _notes(cls: Any) -> dict[str, str]:
    """What is said about each field: the comment on its line, or its paragraph in the class's docstring.

    Such a paragraph begins "``name``  text" or "``name, other``  text"; a field without either is looked for in the
    text of the others.
    """
    source = textwrap.dedent(inspect.getsource(cls))
    comments = {
        token.start[0]: token.string.lstrip("# ").rstrip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    fields = {n.target.id: n for n in body.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    notes: dict[str, str] = {}
    for paragraph in re.split(r"\n(?=``)|\n\n", ast.get_docstring(body) or ""):
        if match := re.match(r"((?:``[\w, ]+``(?:, )?)+)\s{2,}(.*)", paragraph, re.DOTALL):
            text = " ".join(match[2].split()).replace("``", "").rstrip(".")
            notes |= dict.fromkeys(re.findall(r"\w+", match[1]), text)
    for name, node in fields.items():
        if node.end_lineno in comments:
            notes[name] = comments[node.end_lineno]
    for name in fields.keys() - notes.keys():
        if owner := next((other for other, text in notes.items() if re.search(rf"\b{name}\b", text)), None):
            notes[name] = f"see {owner}, which uses it"
    return notes
