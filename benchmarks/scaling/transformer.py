"""A Qwen2 model as numbers: its parameters by unit, the products of a token, the bytes of its activations and cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Shapes = Sequence[tuple[int, ...]]


def size(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)


@dataclass(frozen=True)
class Transformer:
    """The published configuration of a model."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    is_tied: bool
    head_dim: int = 128

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        return self.kv_heads * self.head_dim

    # --- parameters ---------------------------------------------------------------------------------------------------

    def layer_shapes(self) -> list[tuple[int, ...]]:
        """Of one decoder layer, in the order in which they are used."""
        D, Q, K, F = self.hidden, self.query, self.key, self.intermediate
        attention = [(Q, D), (Q,), (K, D), (K,), (K, D), (K,), (D, Q)]
        return [(D,), *attention, (D,), (F, D), (F, D), (D, F)]

    def root_shapes(self, *, has_head: bool = True) -> list[tuple[int, ...]]:
        """Of what is in no layer: embedding, last norm and output head. A tied head is the embedding."""
        embedding, norm = (self.vocab, self.hidden), (self.hidden,)
        return [embedding, norm, embedding] if has_head and not self.is_tied else [embedding, norm]

    def shapes(self) -> list[tuple[int, ...]]:
        """Of all parameters, in the order in which they are used first."""
        embedding, *rest = self.root_shapes()
        return [embedding, *self.layer_shapes() * self.layers, *rest]

    @property
    def parameters(self) -> int:
        return size(self.shapes())

    def matrices(self) -> int:
        """Elements of a layer's matrices, each of which a token multiplies once."""
        return size([shape for shape in self.layer_shapes() if len(shape) == 2])

    # --- products -----------------------------------------------------------------------------------------------------

    def forward_flops(self, lengths: Sequence[float], *, is_causal: bool = True) -> float:
        """Return the flops of the layers' products for whole sequences; a causal kernel leaves half of attention out.

        The head is left out: ``head_plan`` has it.
        """
        attention = sum(length**2 for length in lengths) * (0.5 if is_causal else 1)
        return self.layers * (2.0 * self.matrices() * sum(lengths) + 4 * self.query * attention)

    def backward_flops(self, lengths: Sequence[float], *, is_causal: bool = True, recomputes: bool = False) -> float:
        """Return the flops of their backward pass; ``recomputes``: with the forward pass that checkpointing repeats.

        Each product has two of its size; attention has five for two, since its kernel makes the scores again. Of a
        layer's forward pass the last product is not repeated: nothing needs its result.
        """
        attention = sum(length**2 for length in lengths) * (0.5 if is_causal else 1)
        own = self.layers * (4.0 * self.matrices() * sum(lengths) + 10 * self.query * attention)
        if not recomputes:
            return own
        last = self.layers * 2.0 * self.hidden * self.intermediate * sum(lengths)
        return own + self.forward_flops(lengths, is_causal=is_causal) - last

    # --- bytes --------------------------------------------------------------------------------------------------------

    def cache_bytes(self) -> int:
        """Of keys and values of one token, in bfloat16."""
        return 2 * 2 * self.layers * self.key

    def activation_bytes(self, *, checkpointing: bool, in_autocast: bool) -> int:
        """Return what the layers save of one token, without copies of weights.

        Autocast leaves the embedding and the norms in float32, and so the sum that runs through the layers; with
        bfloat16 parameters all is in 16 bits but what norms compute in float32.
        """
        if checkpointing:
            return self.layers * self.hidden * (4 if in_autocast else 2)
        return self.layers * self.layer_activation_bytes(in_autocast=in_autocast)

    def layer_activation_bytes(self, *, in_autocast: bool) -> int:
        """Of one token: two norms, the attention's inputs and result, and the four products of the other half."""
        per_hidden = 26 if in_autocast else 16
        sums = 4 * self.heads + 8  # float32: a logsumexp of each head, the norms' means
        return per_hidden * self.hidden + 4 * self.query + 4 * self.key + 8 * self.intermediate + sums


QWEN_1_5B = Transformer("Qwen2.5-Math-1.5B", 1536, 28, 12, 2, 8960, 151_936, is_tied=True)
QWEN_7B = Transformer("Qwen2.5-Math-7B", 3584, 28, 28, 4, 18_944, 152_064, is_tied=False)
QWEN_32B = Transformer("Qwen2.5-32B", 5120, 64, 40, 8, 27_648, 152_064, is_tied=False)
MODELS = (QWEN_1_5B, QWEN_7B, QWEN_32B)
