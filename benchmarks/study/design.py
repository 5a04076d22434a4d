"""Which runs the study is made of. Making them is ``work``'s, what follows from them ``outcomes``'s.

A cell is one way to train in one setting. Its learning rate is the best of a grid on tuning seeds, which its results
do not use; the grid is extended by a factor of two where its first or last value is best.
"""

from __future__ import annotations

from dataclasses import dataclass

RATES = (1e-4, 2e-4, 4e-4, 8e-4)
SMALLEST_RATE, LARGEST_RATE = 5e-5, 1.6e-3
SEEDS = tuple(range(8))
TUNING_SEEDS = (100, 101)
PUBLISHED_MIX = "{reflect: 0.5, answer: 0.25, solution: 0.25}"

_TINY = (
    "steps=80",
    "save_every=0",
    "eval.size=64",
    "eval.generations=4",
    "eval.every=10",
    "rollout.num_generations=4",
    "rollout.temperature=0.6",
    "rollout.max_completion_length=96",
    "correction.max_length=128",
    f"correction.mix={PUBLISHED_MIX}",
    "optim.schedule=constant",
)


@dataclass(frozen=True)
class Setting:
    """What all its cells have in common: a recipe and overrides of it, the rates to try, the seeds of the results."""

    name: str
    recipe: str
    overrides: tuple[str, ...]
    tokens: float  # thousands of generated tokens at which its cells are compared
    rates: tuple[float, ...] = RATES
    seeds: tuple[int, ...] = SEEDS

    @property
    def steps(self) -> int:
        """The steps of each of its runs."""
        return int(next(text.removeprefix("steps=") for text in self.overrides if text.startswith("steps=")))


@dataclass(frozen=True)
class Cell:
    """One way to train: overrides of the recipe in a setting.

    ``family`` is the table that shows it; ``tuning_seeds`` choose its rate. ``supervised`` trains on the solutions of
    the step's prompts, without sampling. With ``rate_of`` the rate is that of another cell of the setting, times the
    mean entropy weight that the runs of ``factor_of`` had if that is given, in place of tuning.
    """

    name: str
    family: str
    setting: Setting
    overrides: tuple[str, ...] = ()
    tuning_seeds: tuple[int, ...] = TUNING_SEEDS
    supervised: bool = False
    rate_of: str | None = None
    factor_of: str | None = None

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{self.setting.name}: {self.name}"


def _arithmetic(level: int, prompts: int, seeds: tuple[int, ...] = SEEDS) -> Setting:
    """Arithmetic of a level with the model that the package ships, and so many prompts a step."""
    task = (f"data.train=arithmetic:{level}", f"eval.data=arithmetic:{level}@test", f"rollout.num_prompts={prompts}")
    return Setting(f"level {level}, {prompts} prompts", "tiny", (*_TINY, *task), 5.0 * prompts, seeds=seeds)


HARD = _arithmetic(5, 2)
EASY = _arithmetic(2, 2, SEEDS[:5])
HARD_WIDE = _arithmetic(5, 8, SEEDS[:5])
EASY_WIDE = _arithmetic(2, 8, SEEDS[:5])

# A pre-trained model on a task that it rarely solves, with adapters of rank 16 on bfloat16 weights.
SMOLLM2 = Setting(
    "SmolLM2-135M",
    "smollm2-135m",
    (
        "steps=20",
        "save_every=0",
        "model.precision=bfloat16",
        "model.lora.rank=16",
        r"data.system_prompt=7 + 8 = 15. The answer is \boxed{15}.",
        "data.train=arithmetic:1",
        "eval.data=arithmetic:1@test",
        "eval.size=50",
        "eval.generations=2",
        "eval.every=10",
        "rollout.num_prompts=2",
        "rollout.num_generations=4",
        "rollout.temperature=0.7",
        "rollout.max_completion_length=32",
        "correction.max_length=40",
        "optim.warmup_steps=0",
        "optim.schedule=constant",
    ),
    tokens=2.0,
    rates=(1.5e-4, 3e-4),
    seeds=SEEDS[:3],
)


def _method(name: str, scope: str | None = None) -> tuple[str, ...]:
    return (f"method={name}", *((f"correction.scope={scope}",) if scope else ()))


def _main(setting: Setting) -> list[Cell]:
    """The methods, each correction with every scope."""
    ways = {"GRPO": _method("grpo"), "forced reflection": _method("grpo+reflection"), "EDA": _method("eda")}
    for scope in ("all", "collapsed", "one"):
        ways[f"GEC, {scope}"] = _method("gec", scope)
        ways[f"EDGE, {scope}"] = _method("edge", scope)
    return [Cell(name, "methods", setting, overrides) for name, overrides in ways.items()]


def _kinds() -> list[Cell]:
    """What is injected, how it counts, and what the first attempt is credited with: around one cell, at its rate."""
    masked = "correction.superseded=mask"
    mixes: dict[str, tuple[str, ...]] = {
        f"{kind} alone": (f"correction.mix={{{kind}: 1}}",) for kind in ("reflect", "answer", "solution", "hint")
    }
    treatments: dict[str, tuple[str, ...]] = {
        f"injected: {treatment}": (f"loss.injected={treatment}",) for treatment in ("mask", "sft", "shaped")
    }
    treatments["superseded: mask"] = (masked,)
    treatments["reflect alone, superseded: mask"] = (masked, "correction.mix={reflect: 1}")
    edge = _method("edge", "collapsed")
    ways = [("kinds", *way) for way in mixes.items()] + [("injected", *way) for way in treatments.items()]
    return [
        Cell(name, family, HARD, (*edge, *overrides), rate_of="EDGE, collapsed") for family, name, overrides in ways
    ]


def _controls() -> list[Cell]:
    """What could explain an effect in place of the method, and what users try first."""
    return [
        Cell("supervised fine-tuning", "controls", HARD, (*_SUPERVISED,), supervised=True),
        Cell("EDGE, one, solution alone", "controls", HARD, (*_method("edge", "one"), _SOLUTION)),
        Cell("GEC, one, solution alone", "controls", HARD, (*_method("gec", "one"), _SOLUTION)),
        Cell("EDA, preserve_scale", "controls", HARD, (*_method("eda"), "eda.preserve_scale=true")),
        Cell("GRPO, rate x mean weight", "controls", HARD, _method("grpo"), rate_of="GRPO", factor_of="EDA"),
        Cell("GRPO, resample", "controls", HARD, (*_method("grpo"), _RESAMPLE)),
        Cell("GRPO, resample, at GRPO's rate", "controls", HARD, (*_method("grpo"), _RESAMPLE), rate_of="GRPO"),
        Cell("EDGE, collapsed, at GRPO's rate", "controls", HARD, _method("edge", "collapsed"), rate_of="GRPO"),
        Cell("EDA, resample", "controls", HARD, (*_method("eda"), _RESAMPLE)),
        Cell("EDGE, one, resample", "controls", HARD, (*_method("edge", "one"), _RESAMPLE)),
        Cell("GEC, solution alone, collapsed", "controls", HARD, (*_method("gec", "collapsed"), _SOLUTION)),
    ]


IN_FLOAT32 = "at that rate, float32"
_RESAMPLE = "rollout.resample=4"
_SOLUTION = "correction.mix={solution: 1}"
_SUPERVISED = (*_method("gec", "all"), _SOLUTION, "loss.injected=sft")


def _published() -> list[Cell]:
    """The published code's deviations from the paper, each alone and all at once, at the rate of the paper's method."""
    deviations: dict[str, tuple[str, ...]] = {
        "entropy not detached": ("published.entropy_gradient=true",),
        "entropy over padding": ("published.padding_entropy=true",),
        "mean over the batch": ("eda.mean_over=batch",),
        "no bound on the weight": ("eda.clip=.inf",),
        "no end of sequence": ("published.drop_eos=true",),
    }
    # Encoding again changes no response of this tokenizer.
    deviations["all, encoded again too"] = (
        *(text for texts in deviations.values() for text in texts),
        "published.reencode=true",
    )
    edge = _method("edge", "all")
    return [
        Cell(name, "published", HARD, (*edge, *overrides), rate_of="EDGE, all")
        for name, overrides in deviations.items()
    ]


def _elsewhere(setting: Setting) -> list[Cell]:
    """The methods that matter, and dynamic sampling, in another setting."""
    ways = {
        "GRPO": _method("grpo"),
        "EDA": _method("eda"),
        "EDGE, one": _method("edge", "one"),
        "EDGE, one, solution alone": (*_method("edge", "one"), _SOLUTION),
    }
    tuned = [Cell(name, "settings", setting, overrides, TUNING_SEEDS[:1]) for name, overrides in ways.items()]
    resampled = (*_method("eda"), _RESAMPLE)
    return [*tuned, Cell("EDA, resample, at EDA's rate", "settings", setting, resampled, rate_of="EDA")]


def _pre_trained() -> list[Cell]:
    """GRPO, dynamic sampling, and corrections with SmolLM2-135M; in float32 where a CPU multiplies no bfloat16."""
    float32 = "model.precision=float32"
    recommended = (*_method("edge", "one"), _SOLUTION, float32)
    return [
        Cell("GRPO", "smollm2", SMOLLM2, _method("grpo")),
        Cell("EDA, resample", "smollm2", SMOLLM2, (*_method("eda"), _RESAMPLE)),
        Cell("GRPO at that rate", "smollm2", SMOLLM2, _method("grpo"), rate_of="EDA, resample"),
        Cell("EDGE, one, at that rate", "smollm2", SMOLLM2, _method("edge", "one"), rate_of="EDA, resample"),
        Cell(f"GRPO, {IN_FLOAT32}", "smollm2", SMOLLM2, (*_method("grpo"), float32), rate_of="EDA, resample"),
        Cell(f"EDGE, one, solution alone, {IN_FLOAT32}", "smollm2", SMOLLM2, recommended, rate_of="EDA, resample"),
    ]


def cells() -> list[Cell]:
    """All cells, in the order in which they are made."""
    found = _main(HARD) + _controls() + _pre_trained() + _published() + _kinds()
    for setting in (HARD_WIDE, EASY, EASY_WIDE):
        found += _elsewhere(setting)
    return found


# What is shown first and repeated quickly: in the setting HARD, at the tuned rates.
SHOWN = ("GRPO", "EDA", "EDA, resample", "EDGE, all", "EDGE, one, solution alone")
