"""What the ops return: named tuples of tensors, so that ``torch.compile`` and checkpointing see nothing unusual."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenStats(NamedTuple):
    """Per-token statistics, in nats: float32 (float64 for float64 inputs), in the shape of the targets."""

    logprobs: Tensor
    entropy: Tensor
    logsumexp: Tensor


class GRPOLossOutput(NamedTuple):
    """A loss and what it was made of. Only ``loss`` carries a gradient.

    ``loss``        scalar.
    ``logprobs``    (B, T), detached; 0 where no loss is taken.
    ``entropy``     (B, T), detached, nats; 0 where no loss is taken.
    ``advantages``  (B,) or (B, T), as used.
    ``metrics``     scalars that combine over micro-batches and ranks: names ending in ``_max`` by the maximum, all
                    others by addition. Divide a sum by ``tokens`` for its mean.
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    advantages: Tensor
    metrics: dict[str, Tensor]
