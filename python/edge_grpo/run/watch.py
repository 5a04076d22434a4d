"""Steps that teach nothing, noticed while a run goes on: equal rewards, and corrections that make them equal."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence

from edge_grpo.batching import Sample
from edge_grpo.config import CorrectionConfig

STEPS = 10  # that are looked at until something is said of them
SKIPPED_STEPS = 3  # with all responses skipped, until the run ends


class RewardWatch:
    """Looks at the rewards of each step; ``weights`` are the run's, by name."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._functions = [name for name, weight in weights.items() if ":" in name and weight]
        self._same: defaultdict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))  # value, and for how many steps
        self._skipped = 0

    def see(self, step: int, samples: Sequence[Sample]) -> list[str]:
        """Return what is to be said after ``step``, whose responses on all processes are ``samples``.

        Raises RuntimeError where ``reward.on_error=skip`` has left out every response of ``SKIPPED_STEPS`` steps.
        """
        rewards = [sample.reward for sample in samples if not sample.reward.skipped]
        self._skipped = 0 if rewards else self._skipped + 1
        if self._skipped == SKIPPED_STEPS:
            failed = sorted({path for sample in samples for path in sample.reward.failures})
            raise RuntimeError(
                f"{', '.join(failed)} failed on every response of {SKIPPED_STEPS} steps in a row, and "
                "reward.on_error=skip left them all out: nothing is learned; its first failure is told above"
            )
        found = []
        if self._is_constant("", [reward.total for reward in rewards]):
            value = self._same[""][0]
            found.append(
                f"step {step}: every response of the last {STEPS} steps earned {value:g}: equal rewards teach nothing; "
                "completions.jsonl shows what was answered and how it was graded"
            )
        for name in self._functions:
            if self._is_constant(name, [reward.parts[name] for reward in rewards]):
                found.append(
                    f"step {step}: reward function {name} gave {self._same[name][0]:g} for every response of the last "
                    f"{STEPS} steps: it has no effect"
                )
        return found

    def _is_constant(self, name: str, values: Sequence[float]) -> bool:
        """Whether the values of this step are the ``STEPS``-th in a row that are all the same number."""
        if not values:
            return False
        before, count = self._same[name]
        count = (count + 1 if count and before == values[0] else 1) if len(set(values)) == 1 else 0
        self._same[name] = values[0], count
        return count == STEPS


class CorrectionWatch:
    """Looks at the groups of each step: correction may make all responses of a group right, which teaches nothing."""

    def __init__(self, config: CorrectionConfig) -> None:
        self._scope = config.scope
        self._steps: deque[tuple[int, int]] = deque(maxlen=STEPS)  # groups that correction made all right, and all
        self._said = False

    def see(self, step: int, samples: Sequence[Sample]) -> list[str]:
        """Return, once, what is to be said after ``step``, whose responses on all processes are ``samples``."""
        groups: defaultdict[int, list[Sample]] = defaultdict(list)
        for sample in samples:
            if not sample.reward.skipped:
                groups[sample.group].append(sample)
        completed = sum(
            all(sample.reward.correct for sample in group) and not all(sample.first_reward.correct for sample in group)
            for group in groups.values()
        )
        self._steps.append((completed, len(groups)))
        made, total = (sum(column) for column in zip(*self._steps, strict=True))
        if self._said or len(self._steps) < STEPS or 2 * made <= total:
            return []
        self._said = True
        remedy = (
            "correction.scope=collapsed corrects only groups that would teach nothing, and correction.scope=one one "
            "response of each group that has none right"
            if self._scope == "all"
            else "correction.scope=one corrects one response of each group that has none right"
        )
        return [
            f"step {step}: correction made every response right in {made} of {total} groups of the last {STEPS} steps "
            f"(correction.scope={self._scope}): equal rewards teach nothing; {remedy}"
        ]
