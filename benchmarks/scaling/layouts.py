"""How a model is spread over GPUs: who holds parameters, who samples, in which precision; what there is to choose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.scaling.cluster import SHEET, Links
from benchmarks.scaling.job import Job
from benchmarks.scaling.transformer import Transformer
from edge_grpo.config.rollout import splits_over

LORA_RANK = 32


@dataclass(frozen=True)
class Precision:
    """Bytes of a parameter at rest, of its gradient, of Adam's two moments, and of an element as it is computed."""

    name: str
    weight: int
    gradient: int
    moments: int
    in_autocast: bool = False  # 16-bit copies of weights beside them
    trains_all: bool = True  # else adapters alone, in float32


MIXED = Precision("float32, computed in bfloat16", 4, 4, 8, in_autocast=True)
BFLOAT16 = Precision("bfloat16", 2, 2, 4)
LORA = Precision(f"bfloat16 with LoRA of rank {LORA_RANK}", 2, 0, 0, trains_all=False)


@dataclass(frozen=True)
class Layout:
    """How training is spread. The trainer runs those that are ``offered``; others need a loop of one's own."""

    name: str
    precision: Precision
    offered: bool = True
    is_sharded: bool = False  # FSDP2; else every process holds everything
    gathers_rounded: bool = False  # FSDP2 casts to bfloat16 before it gathers; else autocast does afterwards
    stays_in_node: bool = False  # each node's processes hold everything together, and nodes are replicas
    splits_vocabulary: bool = False  # the head's weight over the processes of a node


ALONE = (
    Layout("one process", MIXED),
    Layout("one process, bfloat16", BFLOAT16),
    Layout("one process, LoRA", LORA),
)
DDP = Layout("DDP", MIXED)
DDP_LORA = Layout("DDP, LoRA", LORA)
FSDP = Layout("FSDP2", MIXED, is_sharded=True)
FSDP_LORA = Layout("FSDP2, LoRA", LORA, is_sharded=True)
ROUNDED = Layout("FSDP2, gathered in bfloat16", MIXED, offered=False, is_sharded=True, gathers_rounded=True)
HYBRID = Layout("FSDP2 in each node", MIXED, offered=False, is_sharded=True, stays_in_node=True)
VOCABULARY = Layout("FSDP2, vocabulary split", MIXED, offered=False, is_sharded=True, splits_vocabulary=True)


@dataclass(frozen=True)
class Sampling:
    """Where vLLM runs: in the trainer's processes in turns with training, or on GPUs of its own."""

    server_share: float = 0.0  # of the GPUs
    tensor_parallel: int = 1  # GPUs of one engine
    ahead: int = 0  # 1: the next step is sampled while this one is trained

    @property
    def name(self) -> str:
        engine = "" if self.tensor_parallel == 1 else f", tensor parallel {self.tensor_parallel}"
        if not self.server_share:
            return f"colocated{engine}"
        return f"servers on {self.server_share:.0%}{engine}, ahead {self.ahead}".replace("%", " %")


@dataclass(frozen=True)
class Setup:
    """All that a step's cost depends on."""

    model: Transformer
    gpus: int
    layout: Layout
    sampling: Sampling
    job: Job

    @property
    def servers(self) -> int:
        return round(self.gpus * self.sampling.server_share)

    @property
    def trainers(self) -> int:
        return self.gpus - self.servers

    @property
    def cache_parts(self) -> int:
        """GPUs over which an engine's keys and values are split."""
        return min(self.sampling.tensor_parallel, self.model.kv_heads)

    @property
    def shards(self) -> int:
        """Processes over which a parameter is split."""
        if not self.layout.is_sharded:
            return 1
        return min(self.trainers, self.trainers_of_node) if self.layout.stays_in_node else self.trainers

    @property
    def trainers_of_node(self) -> int:
        """Servers have nodes of their own, or in a single node some of its GPUs."""
        return min(self.trainers, SHEET.gpus_per_node)

    @property
    def vocabulary_shards(self) -> int:
        return self.trainers_of_node if self.layout.splits_vocabulary else 1

    @property
    def is_cast_late(self) -> bool:
        """Whether autocast makes 16-bit copies of whole float32 weights where they are used."""
        return self.layout.precision.in_autocast and not self.layout.gathers_rounded

    @property
    def gathered_itemsize(self) -> int:
        """Bytes of an element of the weights that a layer computes with, before autocast copies them."""
        return self.layout.precision.weight if self.is_cast_late else 2

    def links(self, processes: int) -> Links:
        """Of neighbouring trainer processes."""
        return Links(processes, -(-processes // self.trainers_of_node))

    @property
    def replicas(self) -> int:
        """Groups of trainer processes each of which holds all parameters."""
        return self.trainers // self.shards

    @property
    def sequences(self) -> int:
        """Responses that one trainer process learns from."""
        return -(-self.job.responses // self.trainers)

    @property
    def micro_batch_size(self) -> int:
        return min(self.job.micro_batch_size, self.sequences)

    @property
    def micro_batches(self) -> int:
        """Of one process and step."""
        return -(-self.sequences // self.micro_batch_size)


def layouts(model: Transformer, gpus: int) -> Iterator[Layout]:
    if gpus == 1:
        yield from ALONE
        return
    yield from (DDP, DDP_LORA, FSDP, FSDP_LORA, ROUNDED)
    if gpus > SHEET.gpus_per_node:
        yield HYBRID
    if not model.is_tied:  # a tied head is the embedding, which every process looks up whole
        yield VOCABULARY


def samplings(model: Transformer, gpus: int) -> Iterator[Sampling]:
    """Yield all that the trainer runs, colocated ones first."""
    most = min(gpus, SHEET.gpus_per_node)
    sizes = [size for size in (1, 2, 4, 8) if size <= most and splits_over(size, model.heads, model.kv_heads)]
    yield from (Sampling(tensor_parallel=size) for size in sizes)
    for share in (0.25, 0.5):
        for size in sizes:
            if size <= share * gpus:
                yield from (Sampling(share, size, ahead) for ahead in (0, 1))
