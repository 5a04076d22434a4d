"""What test_distributed.py runs in several processes at once, forked from one that has imported everything.

``processes.py SAMPLES UNTIED OUT`` checks what vLLM gets, updates and checkpoints, and computes the gradient of every
layout; UNTIED is the folder of a model.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["ACCELERATE_USE_CPU"] = "true"

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent))
from forked import alone, together
from training import LOSSES

from edge_grpo.batching import Sample
from edge_grpo.config import ModelConfig, OptimConfig, TrainConfig
from edge_grpo.learning.learner import Learner
from edge_grpo.learning.totals import LossTotals
from edge_grpo.policy.adapters import lora_weights, save_lora
from edge_grpo.policy.loading import eos_token_ids, load_model
from edge_grpo.policy.model import PolicyModel
from edge_grpo.policy.sharding import is_empty, layers_of, shard, whole
from edge_grpo.rollout.transformers import TransformersEngine
from edge_grpo.rollout.wire import compare, host_weights, probe
from edge_grpo.run import checkpoint
from edge_grpo.types import Response, RolloutError
from edge_kernels import GRPOLossConfig

PAD = 0
LORA: dict[str, Any] = {"rank": 4, "targets": "q_proj,v_proj"}


@dataclass(frozen=True)
class Layout:
    """How a gradient is computed: where, and on what. ``reference`` names what one process computes of the same."""

    name: str  # a row of the table in docs/distributed.md, with ``where`` as its columns
    processes: int
    sharding: str = "none"
    case: str = "all learn"
    loss: str = "dapo"
    micro_batch_size: int = 8
    reduce_each: bool = False
    checkpointing: bool = False
    precision: str = "float32"
    lora: bool = False
    packing: bool = False  # the reference never packs
    path: str = ModelConfig().path  # the shipped model's head is tied

    @property
    def where(self) -> str:
        return f"{'FSDP2' if self.sharding == 'fsdp2' else 'DDP'}, {self.processes}"

    @property
    def reference(self) -> str:
        return "/".join([self.case, self.loss, self.precision, str(self.lora), self.path])

    def config(self) -> TrainConfig:
        model = ModelConfig(
            path=self.path,
            sharding=self.sharding,  # type: ignore[arg-type]
            precision=self.precision,  # type: ignore[arg-type]
            gradient_checkpointing=self.checkpointing,
            lora=LORA if self.lora else {},
        )
        optim = OptimConfig(
            micro_batch_size=self.micro_batch_size, reduce_each_micro_batch=self.reduce_each, packing=self.packing
        )
        return TrainConfig(model=model, optim=optim, loss=LOSSES[self.loss])


CASES = {  # of the second process: what it is called in a layout's name
    "one is skipped": "every response of one process skipped",
    "one has collapsed": "the groups of one process collapsed",
    "one has none": "one process without prompts",
}


def layouts(untied: str) -> list[Layout]:
    """Sizes: two processes have four responses each and four have two, so that micro-batches of 3 and 1 are uneven."""
    own = Layout("plain", 1)
    packed = replace(own, packing=True, micro_batch_size=3)
    rows = [
        own,
        replace(own, name="activation checkpointing", checkpointing=True),
        replace(own, name="a head of its own", path=untied),
        replace(own, name="micro-batches of 3", micro_batch_size=3),
        replace(own, name="micro-batches of 1, reduced once", micro_batch_size=1),
        replace(own, name="micro-batches of 1, each reduced", micro_batch_size=1, reduce_each=True),
        *(replace(own, name=name, case=case) for case, name in CASES.items()),
        replace(own, name="one process without prompts, a KL term", loss="kl", case="one has none"),
        replace(own, name="a quantile of the entropy", loss="entropy quantile"),
        replace(own, name="LoRA", lora=True),
        replace(packed, name="packed, micro-batches of 3"),
        replace(packed, name="packed, one process without prompts", case="one has none"),
        replace(packed, name="packed, LoRA, activation checkpointing", lora=True, checkpointing=True),
        replace(own, name="LoRA on bfloat16 weights", precision="bfloat16", lora=True),
        replace(own, name="`model.precision: mixed`", precision="mixed"),
    ]
    return [
        replace(row, processes=processes, sharding=sharding)
        for row in rows
        for processes in (2, 4)
        for sharding in ("none", "fsdp2")
        if sharding == "fsdp2" or not row.reduce_each
    ]


def share_of(samples: list[Sample], case: str, rank: int, processes: int) -> list[Sample]:
    """One process's samples: the second of ``processes`` is the one that has nothing to learn from."""
    samples = copy.deepcopy(samples)
    size = len(samples) // processes
    starved = range(size, 2 * size) if case.startswith("one") else range(0 if case == "all learn" else len(samples))
    for place in starved:
        if "collapsed" in case:
            samples[place].advantage = 0.0
        else:
            samples[place].reward = replace(samples[place].reward, skipped=True)
            samples[place].advantage = 0.0
    own = range(rank * size, (rank + 1) * size)
    return [samples[place] for place in own if case != "one has none" or place not in starved]


def own_samples(samples: list[Sample], case: str, starved_of: int) -> list[Sample]:
    """This process's samples. A single process has those of ``starved_of`` processes."""
    rank, processes = PartialState().process_index, PartialState().num_processes
    if processes > 1:
        return share_of(samples, case, rank, processes)
    return [sample for rank in range(starved_of) for sample in share_of(samples, case, rank, starved_of)]


def learner_of(config: TrainConfig) -> Learner:
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator(mixed_precision="bf16" if config.model.precision == "mixed" else "no")
    return Learner(config, adapted(config.model)[0], accelerator, pad_token_id=PAD)


def gradient_of(layout: Layout, samples: list[Sample], *, starved_of: int = 0) -> torch.Tensor:
    """The gradient of one optimizer step's loss. A single process has the samples of ``starved_of`` processes."""
    own = own_samples(samples, layout.case, starved_of)
    learner = learner_of(layout.config())
    learner.score(own)
    for sample in own:
        if sample.ref_logprobs is not None:
            sample.ref_logprobs = sample.ref_logprobs - 0.3
    learner.model.train()
    learner.accumulate_gradient(own, LossTotals())
    return torch.cat([whole(p.grad).flatten() for p in learner.policy.parameters() if p.grad is not None])


def gradients(samples: list[Sample], untied: str, out: Path) -> None:
    """Write, for every layout, the largest error of the gradient relative to its largest entry on one process."""
    references: dict[tuple[str, int], torch.Tensor] = {}
    errors: dict[str, dict[str, float]] = {}  # by name and where
    for processes in (2, 4):
        own = [layout for layout in layouts(untied) if layout.processes == processes]
        for layout in own:
            if (key := (layout.reference, processes)) not in references:
                plain = Layout("", 1, case=layout.case, loss=layout.loss, precision=layout.precision, lora=layout.lora)
                plain = replace(plain, path=layout.path)
                references[key] = alone(
                    partial(gradient_of, plain, samples, starved_of=processes), out.with_suffix(".pt")
                )

        def compute(own: list[Layout] = own) -> None:
            for layout in own:
                got = gradient_of(layout, samples)
                if PartialState().is_main_process:
                    expected = references[layout.reference, layout.processes]
                    error = float((got - expected).abs().max() / expected.abs().max())
                    errors.setdefault(layout.name, {})[layout.where] = error
                    out.with_suffix(f".{layout.processes}").write_text(json.dumps(errors))

        together(processes, compute)
    parts = [json.loads(out.with_suffix(f".{processes}").read_text()) for processes in (2, 4)]
    out.write_text(json.dumps({name: parts[0][name] | parts[1][name] for name in parts[0]}))


def adapted(config: ModelConfig) -> tuple[Any, Any]:
    """A model and its tokenizer; adapters add something. Where it is to be split, one process alone has weights."""
    empty = config.sharding == "fsdp2" and not PartialState().is_main_process
    torch.manual_seed(int(empty))  # what is drawn there is not used
    model, tokenizer = load_model(config, empty=empty)
    for name, value in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(value, std=0.02)
    return model, tokenizer


def write_adapter(base: str, folder: Path) -> None:
    model, _ = adapted(ModelConfig(path=base, lora=LORA))
    save_lora(model, dict(lora_weights(model)), folder)


def check_weights(folder: Path) -> None:
    """What goes to vLLM from split parameters, adapters merged, is what went from whole ones; so are the logprobs."""

    def whole_weights_and_words(lora: dict[str, Any]) -> tuple[dict[str, torch.Tensor], Response]:
        model, tokenizer = adapted(ModelConfig(lora=lora))
        eos = eos_token_ids(model, tokenizer)
        engine = TransformersEngine(model, eos_token_ids=eos, pad_token_id=PAD, batch_size=1)
        return host_weights(model, keep=True), probe(engine, model, seed=0)

    for lora in ({}, LORA):
        expected, said = alone(partial(whole_weights_and_words, lora), folder / "weights.pt")

        def check(lora: Any = lora, expected: Any = expected, said: Any = said) -> None:
            model, _ = adapted(ModelConfig(lora=lora, sharding="fsdp2"))
            policy = PolicyModel(model)
            assert is_empty(policy) != PartialState().is_main_process
            shard(policy, processes=2, device=torch.device("cpu"))
            compare(said, policy)
            with pytest.raises(RolloutError, match="differ from the trainer's"):
                compare(replace(said, logprobs=tuple(value - 1 for value in said.logprobs)), policy)
            assert all(isinstance(parameter, DTensor) for parameter in policy.parameters())
            is_main = PartialState().is_main_process
            got = host_weights(model, keep=is_main)
            assert got.keys() == (expected.keys() if is_main else set())
            for name, value in got.items():
                torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)

        together(2, check)


def state_of(learner: Learner) -> dict[str, torch.Tensor]:
    """The trained weights and what the optimizer has accumulated of them, whole."""
    found = {}
    for name, value in learner.model.named_parameters():
        if value.requires_grad:
            found[name] = whole(value).clone()
            found |= {f"{part} of {name}": whole(own) for part, own in learner.optimizer.state.get(value, {}).items()}
    return found


def updated(config: TrainConfig, samples: list[Sample]) -> tuple[Learner, list[dict[str, float]]]:
    """The metrics of three updates: the second of two processes has no sample, then nothing to learn, then both."""
    learner = learner_of(config)
    metrics = []
    for step, case in enumerate(("one has none", "one has collapsed", "all have collapsed"), 1):
        own = own_samples(samples, case, 2)
        learner.score(own)
        metrics.append(learner.update(own, step))
        assert "drift/logprob_mean" in metrics[-1]
    learner.check_finite(own)
    return learner, metrics


def check_updates_and_checkpoints(samples: list[Sample], untied: str, folder: Path) -> None:
    """With a process that has no sample, updates are one process's; four processes read what two have written."""
    split = ModelConfig(sharding="fsdp2")
    adapter = folder / "adapter"
    alone(partial(write_adapter, untied, adapter), folder / "nothing.pt")
    models = {
        "DDP": ModelConfig(),
        "FSDP2": split,
        # Of a matrix with one row, or of one for each of two processes, others hold nothing.
        "LoRA of rank 1": replace(split, path=untied, lora={"rank": 1, "targets": "q_proj,lm_head"}),
        "LoRA of rank 2": replace(split, lora={"rank": 2, "targets": "q_proj"}),
        "untied, bfloat16": replace(split, path=untied, precision="bfloat16"),
        "an adapter's folder": replace(split, path=str(adapter)),
    }
    # Adam hides the gradient's scale, but its moments show it. Clipped to this norm, no gradient is as it was.
    optim = OptimConfig(learning_rate=1e-3, micro_batch_size=1, max_grad_norm=0.01)
    configs = {name: TrainConfig(model=model, optim=optim, loss=GRPOLossConfig()) for name, model in models.items()}

    def alone_updated(config: TrainConfig) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
        learner, metrics = updated(replace(config, model=replace(config.model, sharding="none")), samples)
        return state_of(learner), metrics

    expected = alone(lambda: {name: alone_updated(config) for name, config in configs.items()}, folder / "updates.pt")

    def update_and_save() -> None:
        for name, config in configs.items():
            learner, metrics = updated(config, samples)
            state, tolerance = state_of(learner), 0.02 if "bfloat16" in name else 1e-5
            one_process, its_metrics = expected[name]
            for own, other in zip(metrics, its_metrics, strict=True):
                assert other["grad/norm"] > 10 * optim.max_grad_norm or other is its_metrics[-1]
                assert own == pytest.approx(other, rel=tolerance, abs=tolerance, nan_ok=True), name
            assert state.keys() == one_process.keys()
            for key, value in state.items():
                if key.startswith("exp_avg of"):
                    scale = float(one_process[key].abs().max())
                    torch.testing.assert_close(
                        value, one_process[key], rtol=0, atol=tolerance * scale, msg=f"{name}: {key}"
                    )
            is_split = config.model.sharding != "none"
            checkpoint.save(
                learner.accelerator, folder / name, 2, learner.model, learner.optimizer, keep=1, split=is_split
            )
            if PartialState().is_main_process:
                torch.save(state, folder / name / "state.pt")

    def load() -> None:
        for name, config in configs.items():
            learner = learner_of(config)
            checkpoint.load_latest(learner.accelerator, folder / name, learner.model, learner.optimizer)
            saved, state = torch.load(folder / name / "state.pt"), state_of(learner)
            assert state.keys() == saved.keys()
            if "rank 1" in name:
                sizes = {value.to_local().numel() for value in learner.policy.parameters() if value.requires_grad}
                assert (0 in sizes) == (PartialState().process_index > 0)
            for key, value in state.items():
                assert value.dtype == saved[key].dtype
                assert torch.equal(value, saved[key]), (name, key)

    together(2, update_and_save)
    together(4, load)


def check_units_of_accelerate(untied: str) -> None:
    """accelerate's own FSDP2 preparation, which it keeps from a CPU: PolicyModel says what its layers and ends are.

    An untied head is in the final norm's unit, a tied one in the embedding's too.
    """
    ids = torch.arange(5, 25)[None]

    def gradient_by_name(policy: PolicyModel) -> dict[str, torch.Tensor]:
        logits = policy(ids, torch.ones_like(ids), lambda hidden, head: head.logits(hidden))
        logits.logsumexp(-1).sum().backward()
        return {name: whole(value.grad) for name, value in policy.named_parameters() if value.grad is not None}

    def check(path: str) -> None:
        model, _ = load_model(ModelConfig(path=path))
        expected = gradient_by_name(PolicyModel(model))
        model.zero_grad()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
        launched = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin),
            mixed_precision="no",
            torch_device_mesh={("shard",): mesh},
            parallelism_config=SimpleNamespace(fsdp_dim_names=["shard"]),
        )
        layers = layers_of(model)
        policy = fsdp2_prepare_model(launched, PolicyModel(model))
        units = [module for module in policy.modules() if isinstance(module, FSDPModule)]
        assert {id(layer) for layer in layers} < {id(unit) for unit in units}
        assert model.get_output_embeddings() in units
        got = gradient_by_name(policy)
        assert got.keys() == expected.keys()
        for name, value in got.items():
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-6 * scale)

    def check_both() -> None:
        for path in (ModelConfig().path, untied):
            check(path)

    together(2, check_both)


if __name__ == "__main__":
    torch.set_num_threads(1)
    samples, untied, out = torch.load(sys.argv[1], weights_only=False), sys.argv[2], Path(sys.argv[3])
    check_weights(out.parent)
    check_units_of_accelerate(untied)
    check_updates_and_checkpoints(samples, untied, out.parent)
    gradients(samples, untied, out)
