"""The machine: numbers of its data sheet, and what is assumed of the share that programs reach. All rates per second.

The rates of the head are those of ``edge_kernels.ops.head_plan``.
"""

from __future__ import annotations

from typing import NamedTuple

from edge_kernels.ops.head_plan import RATES


class DataSheet(NamedTuple):
    """An NVIDIA H100 SXM in a node of eight, and the network between nodes: bytes in one direction for each GPU."""

    products: float = 989e12  # flop in bfloat16, without sparsity
    memory: float = 3.35e12  # bytes of HBM3
    memory_bytes: float = 80e9
    nvlink: float = 450e9
    infiniband: float = 50e9  # one 400 Gb/s adapter for each GPU
    gpus_per_node: int = 8


class Assumed(NamedTuple):
    """What programs reach. No GPU has measured these here."""

    layers: float = 0.5  # of the data sheet's products, in forward and backward passes of the layers
    decoding: float = 0.7  # of the data sheet's memory rate, while tokens are sampled
    network: float = 0.75  # of NVLink's and InfiniBand's rate
    layer_seconds: float = 200e-6  # of launching a layer's kernels once, 40 of them; twice that in a backward pass
    collective_seconds: float = 30e-6  # that a collective takes whatever its size, in a node
    collective_seconds_between_nodes: float = 80e-6
    decoding_seconds: float = 3e-3  # of vLLM's scheduler and launches, for each token of a batch
    reserved_bytes: float = 8e9  # CUDA's context, NCCL's buffers, the allocator's gaps
    usable: float = 0.95  # of the memory, by plans that are called fitting
    engine_bytes: float = 2e9  # vLLM's activations and CUDA graphs, beside weights and cache
    engine_share: float = 0.9  # of a server's memory that vLLM takes
    adam_bytes: float = 92  # read and written for each parameter: torch's AdamW by foreach, and clipping


SHEET = DataSheet()
ASSUMED = Assumed()
HEAD_RATES = RATES["sm_90"]

LAYER_PRODUCTS = ASSUMED.layers * SHEET.products
MEMORY = HEAD_RATES.memory
DECODING_MEMORY = ASSUMED.decoding * SHEET.memory


class Links(NamedTuple):
    """What connects the processes of a group, which are spread evenly over ``nodes``."""

    processes: int
    nodes: int

    @property
    def rate(self) -> float:
        """Bytes per second of a ring: within a node NVLink's, between nodes that of all adapters which it passes."""
        if self.nodes == 1:
            return ASSUMED.network * SHEET.nvlink
        adapters = self.processes / self.nodes
        return ASSUMED.network * min(SHEET.nvlink, adapters * SHEET.infiniband)

    @property
    def latency(self) -> float:
        return ASSUMED.collective_seconds if self.nodes == 1 else ASSUMED.collective_seconds_between_nodes
