"""What one process has collected for a step, and the same as plain data, which a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from edge_grpo.batching import Sample
from edge_grpo.types import Prompt, Provenance, Response, Reward


@dataclass(frozen=True)
class Collected:
    """One process's samples of a step."""

    samples: list[Sample]
    fallbacks: int = 0  # corrections that did not fit and became a shorter kind or none
    num_truncated: int = 0  # solutions that were cut to fit
    logged: Mapping[str, Sequence[float]] = field(default_factory=dict)  # what reward functions logged, by name
    dropped: tuple[Sample, ...] = ()  # of groups that others have replaced
    rounds: int = 0  # in which groups were replaced
    seconds: Mapping[str, float] = field(default_factory=dict)  # by phase
    staleness: int = 0  # steps that were learnt from between the weights that sampled and those that learn

    def replaced_by(self, again: Collected) -> Collected:
        """Return these samples with the groups of ``again`` in the place of those of the same number."""
        new = {sample.group for sample in again.samples}
        kept = [sample for sample in self.samples if sample.group not in new]
        return replace(
            self,
            samples=sorted([*kept, *again.samples], key=lambda sample: sample.group),
            fallbacks=self.fallbacks + again.fallbacks,
            num_truncated=self.num_truncated + again.num_truncated,
            dropped=self.dropped + tuple(sample for sample in self.samples if sample.group in new),
            rounds=self.rounds + 1,
        )


def to_plain(collected: Collected, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return ``collected`` as JSON can hold it, each prompt as its place in ``prompts`` with its token ids."""
    places = {id(prompt): place for place, prompt in enumerate(prompts)}

    def sample(one: Sample) -> dict[str, Any]:
        is_corrected = one.response is not one.first
        return {
            "prompt": places[id(one.prompt)],
            "prompt_ids": one.prompt.token_ids,
            "group": one.group,
            "first": asdict(one.first),
            "first_reward": asdict(one.first_reward),
            "response": asdict(one.response) if is_corrected else None,
            "reward": asdict(one.reward) if is_corrected else None,
        }

    return {
        "samples": [sample(one) for one in collected.samples],
        "dropped": [sample(one) for one in collected.dropped],
        "fallbacks": collected.fallbacks,
        "num_truncated": collected.num_truncated,
        "logged": {name: list(values) for name, values in collected.logged.items()},
        "rounds": collected.rounds,
        "seconds": dict(collected.seconds),
        "staleness": collected.staleness,
    }


def from_plain(
    trees: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt], *, groups: range, rank: int, processes: int
) -> Collected | None:
    """Return process ``rank``'s part, ``groups``, of what all processes of a run had collected, one tree each.

    The number of processes may have changed; what is counted and logged is dealt out to the new ones. Returns None, on
    all of them, if ``prompts`` are no longer those that were answered.
    """
    everything = [tree for whole in trees for tree in (*whole["samples"], *whole["dropped"])]
    if any(
        tree["prompt"] >= len(prompts) or tuple(tree["prompt_ids"]) != prompts[tree["prompt"]].token_ids
        for tree in everything
    ):
        return None

    def samples(name: str) -> list[Sample]:
        own = [tree for whole in trees for tree in whole[name] if tree["group"] in groups]
        return sorted((_sample(tree, prompts) for tree in own), key=lambda sample: sample.group)

    mine = trees[rank::processes]
    return Collected(
        samples=samples("samples"),
        dropped=tuple(samples("dropped")),
        fallbacks=sum(tree["fallbacks"] for tree in mine),
        num_truncated=sum(tree["num_truncated"] for tree in mine),
        logged={
            name: [value for tree in mine for value in tree["logged"].get(name, ())]
            for name in dict.fromkeys(name for tree in mine for name in tree["logged"])
        },
        rounds=max(tree["rounds"] for tree in trees),
        seconds=trees[rank % len(trees)]["seconds"],
        staleness=trees[0]["staleness"],
    )


def _sample(tree: Mapping[str, Any], prompts: Sequence[Prompt]) -> Sample:
    first, first_reward = _response(tree["first"]), Reward(**tree["first_reward"])
    response = first if tree["response"] is None else _response(tree["response"])
    reward = first_reward if tree["reward"] is None else Reward(**tree["reward"])
    return Sample(prompts[tree["prompt"]], tree["group"], first, first_reward, response, reward)


def _response(tree: Mapping[str, Any]) -> Response:
    of_tokens = {name: tuple(tree[name]) for name in ("token_ids", "logprobs", "entropy")}
    return Response(**{**tree, **of_tokens, "provenance": tuple(map(Provenance, tree["provenance"]))})
