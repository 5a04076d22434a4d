"""What a step has to do: the run's keys that decide it, under their names, and what is assumed of data and policy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """One step. Lengths are means in tokens where they are not limits."""

    num_prompts: int
    num_generations: int = 8
    max_completion_length: int = 1024
    micro_batch_size: int = 4
    gradient_checkpointing: bool = True
    reduce_each_micro_batch: bool = False
    memory_budget: int = 0  # of the head; 0: its own default
    correction_max_length: int = 256
    corrected: float = 1.0  # share of the wrong responses that are corrected; 1: correction.scope is "all"
    reflect: float = 0.5  # share of the corrections that the policy continues
    # assumed of data and policy
    prompt_length: int = 150
    mean_share: float = 0.6  # of the longest response's length
    wrong: float = 0.5  # share of responses
    correction_mean_share: float = 0.5  # of correction_max_length

    @property
    def responses(self) -> int:
        return self.num_prompts * self.num_generations

    @property
    def response_length(self) -> float:
        return self.mean_share * self.max_completion_length

    @property
    def corrected_share(self) -> float:
        """Of all responses."""
        return self.wrong * self.corrected

    @property
    def continued_share(self) -> float:
        """Of all responses: those which the policy samples on after a correction."""
        return self.corrected_share * self.reflect

    @property
    def correction_length(self) -> float:
        return self.correction_mean_share * self.correction_max_length

    @property
    def trained_length(self) -> float:
        """Of a sequence as it is trained: prompt, response, and what correction adds on average."""
        return self.prompt_length + self.response_length + self.corrected_share * self.correction_length

    @property
    def longest(self) -> int:
        """Of a sequence that memory must hold."""
        added = self.correction_max_length if self.corrected_share else 0
        return self.prompt_length + self.max_completion_length + added
