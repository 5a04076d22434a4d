"""Reward functions that were written for TRL, open-r1 and verl run as they are."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_grpo.config import RewardConfig
from edge_grpo.grading.rewards import Rewarder
from edge_grpo.types import Example, Prompt, Reward, TrainerState

COMPLETIONS = [
    "<think>2 and 3</think>\nSo \\boxed{5}.",
    "<think>2 and 3</think>\nSo \\boxed{6}.",
    "<think>so \\boxed{5}? let me",
    "5 5 5 5 5 5",
]
IDS = [[5, 1, 2, 3], [5, 1, 2, 3, 9, 9, 9, 9], [4], [7, 7, 7, 7, 7, 7]]
QUESTION = {"role": "user", "content": "2+3?"}


def chat(solution: str | None = "It is \\boxed{5}.", answer: str = "5", **extra: object) -> Prompt:
    return Prompt(Example(0, "2+3?", answer, solution, extra), "[user]2+3?[assistant]", (1, 2), (QUESTION,))


def plain(**extra: object) -> Prompt:
    return Prompt(Example(0, "2+3?", "5", "It is \\boxed{5}.", extra), "2+3?", (1, 2))


@pytest.fixture
def rewarder() -> Iterator[Callable[..., Rewarder]]:
    """A function from paths to a rewarder, which is closed in the end."""
    made: list[Rewarder] = []

    def make(*paths: str, **settings: object) -> Rewarder:
        made.append(Rewarder(RewardConfig(weights=dict.fromkeys(paths, 1.0), **settings)))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def write(tmp_path, monkeypatch) -> Callable[[str], None]:
    """A function that writes the module ``own_rewards``."""
    monkeypatch.syspath_prepend(tmp_path)
    return lambda source: (tmp_path / "own_rewards.py").write_text(source) and None


def parts(rewards: list[Reward], path: str) -> list[float]:
    return [reward.parts[path] for reward in rewards]


# ---- TRL and open-r1 -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_trls_own_functions_run_unchanged(rewarder, write):
    """The same values as TRL's trainer would get; each function starts a process that imports trl."""
    rewards = pytest.importorskip("trl.rewards")
    write(
        "from trl.rewards import *\n"
        "from trl.rewards import get_cosine_scaled_reward, get_soft_overlong_punishment\n"
        "cosine, overlong = get_cosine_scaled_reward(10), get_soft_overlong_punishment(8, 4)\n"
    )
    messages = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
    given = {"completions": messages, "solution": ["It is \\boxed{5}."] * 4, "completion_ids": IDS}
    expected = {
        "trl.rewards:think_format_reward": rewards.think_format_reward(**given),
        "trl.rewards:accuracy_reward": rewards.accuracy_reward(**given),
        "trl.rewards:reasoning_accuracy_reward": rewards.reasoning_accuracy_reward(**given),
        "own_rewards:cosine": rewards.get_cosine_scaled_reward(10)(**given),
        "own_rewards:overlong": rewards.get_soft_overlong_punishment(8, 4)(**given),
    }
    found = rewarder(*expected)([chat()] * 4, COMPLETIONS, completion_ids=IDS)
    for path, values in expected.items():
        assert parts(found, path) == pytest.approx(values), path
    assert [len(set(values)) > 1 for values in expected.values()] == [True] * 5  # none is constant on these
    assert found[0].logged["gold_parsed"] == "[5, '5']"


def test_trls_contract(rewarder, write):
    """Everything that ``GRPOTrainer._calculate_rewards`` passes, of the types that it has there."""
    write("""
def judge(prompts, completions, completion_ids, level, question, trainer_state, log_metric, log_extra, **kwargs):
    assert prompts == [[{"role": "user", "content": "2+3?"}]] * len(completions)
    assert [list(one[0]) for one in completions] == [["role", "content"]] * len(completions)
    assert completion_ids[0] == [5, 1, 2, 3] and level == [2] * 4 and question == ["2+3?"] * 4
    assert kwargs["answer"] == ["5"] * 4 and "prompt" not in kwargs
    log_metric("share", 0.25)
    log_metric("share", 0.75)
    log_extra("length", [len(one[0]["content"]) for one in completions])
    return [trainer_state.global_step / trainer_state.max_steps + trainer_state.epoch] * len(completions)
""")
    own = rewarder("own_rewards:judge")
    state = TrainerState(global_step=3, max_steps=6, epoch=0.25)
    rewards = own([chat(level=2, question="2+3?")] * 4, COMPLETIONS, completion_ids=IDS, state=state)
    assert [reward.total for reward in rewards] == [0.75] * 4
    assert [reward.logged for reward in rewards] == [{"length": len(text)} for text in COMPLETIONS]
    assert own.take_metrics() == {"share": [0.25, 0.75]}
    assert own.take_metrics() == {}


def test_without_a_chat_template_prompts_and_completions_are_texts(rewarder, write):
    write(
        "def judge(prompts, completions): return [float((p, c) == ('2+3?', 'x')) for p, c in zip(prompts, completions)]"
    )
    assert [r.total for r in rewarder("own_rewards:judge")([plain()] * 2, ["x", "y"])] == [1.0, 0.0]


def test_async_functions_are_awaited_on_one_loop(rewarder, write):
    write("""
import asyncio
loops = set()

async def judge(completions, **kwargs):
    loops.add(asyncio.get_running_loop())
    async def one(text):
        await asyncio.sleep(0)
        return float(len(text))
    return await asyncio.gather(*(one(text) for text in completions))

class Judge:
    async def __call__(self, completions, **kwargs):
        return [float(len(loops))] * len(completions)

    @staticmethod
    async def fails(completions): raise KeyError("judge")

object = Judge()
async def num_loops(completions): loops.add(asyncio.get_running_loop()); return [float(len(loops))] * len(completions)
""")
    own = rewarder("own_rewards:judge", "own_rewards:object", "own_rewards:num_loops")
    for _ in range(2):
        [reward] = own([plain()], ["xyz"])
    assert list(reward.parts.values())[2:] == [3.0, 0.0, 1.0]
    with pytest.raises(RuntimeError, match=r"(?s)sample 0 .*KeyError: 'judge'"):
        rewarder("own_rewards:Judge.fails")([plain()], ["x"])


def test_a_column_of_the_data_keeps_its_name_where_it_has_another_role(rewarder, write):
    """TRL's accuracy functions look for the gold answer in the column "solution"."""
    mapped = Prompt(Example(0, "2+3?", "$5$", None, {"solution": "$5$", "gold": 5}), "2+3?", (1,))
    write("def judge(completions, solution, gold): return [float(p == ('$5$', 5)) for p in zip(solution, gold)]\n")
    assert rewarder("own_rewards:judge")([mapped], ["x"])[0].total == 1.0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("log_extra('a', [1]); return [0.0] * 2", "must log a value per completion with log_extra; 'a' has others"),
        ("return {'score': 1.0}", "must return a list with a number per completion; got dict"),
        ("return None", "must return a list with a number per completion; got NoneType"),
    ],
)
def test_a_broken_contract_is_a_sentence(rewarder, write, body, message):
    write(f"def judge(completions, log_extra):\n    {body}\n")
    with pytest.raises(ValueError, match=f"reward function 'own_rewards:judge' {message}"):
        rewarder("own_rewards:judge")([plain()] * 2, ["x", "y"])


def test_what_is_logged_of_one_completion_at_a_time_is_kept(rewarder, write):
    write("""
def judge(completions, log_metric, log_extra):
    log_metric("calls", 1)
    log_extra("seen", [object if text == "odd" else text for text in completions])
    return [1 / (text != "bad") for text in completions]
""")
    own = rewarder("own_rewards:judge", on_error="skip")
    rewards = own([plain()] * 3, ["x", "bad", "odd"])
    assert [reward.skipped for reward in rewards] == [False, True, False]
    assert [reward.logged for reward in rewards] == [{"seen": "x"}, {}, {"seen": "<class 'object'>"}]
    assert own.take_metrics() == {"calls": [1.0, 1.0]}


# ---- verl ----------------------------------------------------------------------------------------------------------

VERL = {
    "data_source": "openai/gsm8k",
    "reward_model": {"style": "rule", "ground_truth": "5"},
    "extra_info": {"index": 7},
}


def test_verls_compute_score_is_called_for_each_completion(rewarder, write):
    write("""
def compute_score(data_source, solution_str, ground_truth, extra_info=None, sandbox=None, **kwargs):
    assert (data_source, ground_truth, extra_info, sandbox, kwargs) == ("openai/gsm8k", "5", {"index": 7}, None, {})
    right = f"boxed{{{ground_truth}}}" in solution_str
    return {"score": 1.0 if right else -0.5, "acc": right} if "think" in solution_str else right

async def later(data_source, solution_str, ground_truth, extra_info): return len(solution_str)

def batch(data_sources, solution_strs, ground_truths, extra_infos, scale=2.0):
    return [scale * (truth in text) for text, truth in zip(solution_strs, ground_truths)]

def bare(solution_str, ground_truth, method="strict"):
    return float((solution_str, ground_truth, method) == ("x", "5", "strict"))

def more(solution_str, ground_truth, tools): return 1.0
""")
    own = rewarder("own_rewards:compute_score", "own_rewards:later", "own_rewards:batch")
    rewards = own([chat(**VERL)] * 4, COMPLETIONS)
    assert parts(rewards, "own_rewards:compute_score") == [1.0, -0.5, 1.0, 0.0]
    assert parts(rewards, "own_rewards:later") == [float(len(text)) for text in COMPLETIONS]
    assert parts(rewards, "own_rewards:batch") == [2.0, 0.0, 2.0, 2.0]
    assert [reward.logged for reward in rewards] == [{"acc": True}, {"acc": False}, {"acc": True}, {"acc": None}]
    # Where the data is not verl's, the ground truth is the answer.
    assert rewarder("own_rewards:bare")([plain(method="flexible")], ["x"])[0].total == 1.0
    with pytest.raises(ValueError, match="requires tools; there are data_source, extra_info, "):
        rewarder("own_rewards:more")([plain()], ["x"])


@pytest.mark.parametrize(
    ("module", "expected"),
    [("gsm8k", [1.0, 0.0]), ("math_reward", [0.0, 1.0])],
)
def test_verls_own_functions_run_unchanged(rewarder, monkeypatch, module, expected):
    found = importlib.util.find_spec("verl")
    if found is None:
        pytest.skip("verl is not installed")
    [folder] = found.submodule_search_locations
    monkeypatch.syspath_prepend(Path(folder) / "utils" / "reward_score")  # verl itself would start ray
    rewards = rewarder(f"{module}:compute_score")([chat(**VERL)] * 2, ["#### 5", "\\boxed{5}"])
    assert [reward.total for reward in rewards] == expected
