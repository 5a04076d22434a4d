"""The keys of what the published code does otherwise than the paper, for comparisons; all are off by default."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedConfig:
    """Faults of the published code that change what is learned (docs/training.md has the list of all deviations).

    Other deviations are values of ordinary keys: ``eda.mean_over``, ``eda.clip``, ``correction.max_prompt_length``.
    """

    # average a response's entropy also over the padding behind it, up to the length of the longest response of the step
    padding_entropy: bool = False
    entropy_gradient: bool = False  # let a gradient flow through the entropy that divides the advantage
    drop_eos: bool = False  # with correction: train on all responses, right ones too, without their end of sequence
    reencode: bool = False  # with correction: decode each response, and encode prompt and response again
