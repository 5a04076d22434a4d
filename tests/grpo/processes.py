"""What test_distributed.py runs in several processes at once, forked from one that has imported everything.

``processes.py gradients SAMPLES OUT`` checks what vLLM gets and computes the gradient of every layout, ``processes.py
resume FOLDER`` kills a run on four processes and resumes it on two. Both are processes of their own, because what
pytest's has done before (threads, accelerate's state) is not to be inherited.
"""

from __future__ import annotations

import copy
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["ACCELERATE_USE_CPU"] = "true"

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent))
from training import LOSSES

from edge_grpo.batching import Sample
from edge_grpo.config import DataConfig, ModelConfig, OptimConfig, RolloutConfig, TrainConfig
from edge_grpo.learning.learner import Learner
from edge_grpo.learning.totals import LossTotals
from edge_grpo.policy.adapters import merged_weights
from edge_grpo.policy.loading import eos_token_ids, load_model
from edge_grpo.policy.model import PolicyModel
from edge_grpo.policy.sharding import layers_of, shard, whole
from edge_grpo.rollout.transformers import TransformersEngine
from edge_grpo.rollout.wire import compare, host_weights, probe
from edge_grpo.trainer import train
from edge_grpo.types import Response, RolloutError

PAD = 0
LORA: dict[str, Any] = {"rank": 4, "targets": "q_proj,v_proj"}


@dataclass(frozen=True)
class Layout:
    """How a gradient is computed: where, and on what. ``reference`` names what one process computes of the same."""

    name: str
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

    @property
    def reference(self) -> str:
        return "/".join([self.case, self.loss, self.precision, str(self.lora)])

    def config(self) -> TrainConfig:
        model = ModelConfig(
            sharding=self.sharding,  # type: ignore[arg-type]
            precision=self.precision,  # type: ignore[arg-type]
            gradient_checkpointing=self.checkpointing,
            lora=LORA if self.lora else {},
        )
        optim = OptimConfig(
            micro_batch_size=self.micro_batch_size, reduce_each_micro_batch=self.reduce_each, packing=self.packing
        )
        return TrainConfig(model=model, optim=optim, loss=LOSSES[self.loss])


CASES = ("all learn", "one is skipped", "one has collapsed", "one has none")


def layouts() -> list[Layout]:
    """Sizes: two processes have four responses each and four have two, so that micro-batches of 3 and 1 are uneven."""
    found = []
    for processes in (2, 4):
        for sharding in ("none", "fsdp2"):
            name = f"{'FSDP2' if sharding == 'fsdp2' else 'DDP'} on {processes}"
            own = Layout(name, processes, sharding)
            found += [replace(own, name=f"{name}, {case}", case=case) for case in CASES[1:]]
            found += [
                own,
                replace(own, name=f"{name}, micro-batches of 1", micro_batch_size=1),
                replace(own, name=f"{name}, activation checkpointing", checkpointing=True),
            ]
            if processes == 2:  # what does not depend on the number
                found += [
                    replace(own, name=f"{name}, micro-batches of 3", micro_batch_size=3),
                    replace(own, name=f"{name}, KL to a reference", loss="kl", case="one has none"),
                    replace(own, name=f"{name}, entropy quantile", loss="entropy quantile"),
                    replace(own, name=f"{name}, LoRA", lora=True),
                    replace(own, name=f"{name}, packed", packing=True, micro_batch_size=3),
                    replace(own, name=f"{name}, packed, one has none", packing=True, case="one has none"),
                    replace(own, name=f"{name}, packed, LoRA", packing=True, lora=True, checkpointing=True),
                    replace(own, name=f"{name}, mixed precision", precision="mixed"),
                    replace(own, name=f"{name}, LoRA on bfloat16", precision="bfloat16", lora=True),
                ]
        found.append(replace(own, name=f"{name}, each micro-batch of 1 reduced", micro_batch_size=1, reduce_each=True))
    return found


def share_of(samples: list[Sample], case: str, rank: int, processes: int) -> list[Sample]:
    """One process's samples: the second of ``processes`` is the one that has nothing to learn from."""
    samples = copy.deepcopy(samples)
    size = len(samples) // processes
    starved = range(size, 2 * size) if case != "all learn" else range(0)
    for place in starved:
        if case == "one has collapsed":
            samples[place].advantage = 0.0
        else:
            samples[place].reward = replace(samples[place].reward, skipped=True)
            samples[place].advantage = 0.0
    own = range(rank * size, (rank + 1) * size)
    return [samples[place] for place in own if case != "one has none" or place not in starved]


def gradient_of(layout: Layout, samples: list[Sample], *, starved_of: int = 0) -> torch.Tensor:
    """The gradient of one optimizer step's loss. A single process has the samples of ``starved_of`` processes."""
    rank, processes = PartialState().process_index, PartialState().num_processes
    if processes == 1:
        shares = [share_of(samples, layout.case, rank, starved_of) for rank in range(starved_of)]
        own = [sample for share in shares for sample in share]
    else:
        own = share_of(samples, layout.case, rank, processes)
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator(mixed_precision="bf16" if layout.precision == "mixed" else "no")
    torch.manual_seed(0)  # LoRA's factors
    model, _ = load_model(layout.config().model)
    if layout.lora:
        for name, value in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(value, std=0.02)
    learner = Learner(layout.config(), model, accelerator, pad_token_id=PAD)
    learner.score(own)
    for sample in own:
        if sample.ref_logprobs is not None:
            sample.ref_logprobs = sample.ref_logprobs - 0.3
    learner.model.train()
    learner.accumulate_gradient(own, LossTotals())
    return torch.cat([whole(p.grad).flatten() for p in learner.policy.parameters() if p.grad is not None])


def gradients(samples: list[Sample], out: Path) -> None:
    """Write, for every layout, the largest error of the gradient relative to its largest entry on one process."""
    references: dict[tuple[str, int], torch.Tensor] = {}
    errors: dict[str, float] = {}
    for processes in (2, 4):
        own = [layout for layout in layouts() if layout.processes == processes]
        for layout in own:
            if (key := (layout.reference, processes)) not in references:
                plain = Layout("", 1, case=layout.case, loss=layout.loss, precision=layout.precision, lora=layout.lora)
                references[key] = alone(
                    partial(gradient_of, plain, samples, starved_of=processes), out.with_suffix(".pt")
                )

        def compute(own: list[Layout] = own) -> None:
            for layout in own:
                got = gradient_of(layout, samples)
                if PartialState().is_main_process:
                    expected = references[layout.reference, layout.processes]
                    errors[layout.name] = float((got - expected).abs().max() / expected.abs().max())
                    out.with_suffix(f".{layout.processes}").write_text(json.dumps(errors))

        together(processes, compute)
    parts = [json.loads(out.with_suffix(f".{processes}").read_text()) for processes in (2, 4)]
    out.write_text(json.dumps(parts[0] | parts[1]))


def adapted(lora: dict[str, Any]) -> tuple[Any, Any]:
    """The shipped model and its tokenizer; adapters add something, the same in every process."""
    torch.manual_seed(0)
    model, tokenizer = load_model(ModelConfig(lora=lora))
    for name, value in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(value, std=0.02)
    return model, tokenizer


def check_weights(folder: Path) -> None:
    """What goes to vLLM from split parameters, adapters merged, is what went from whole ones; so are the logprobs."""

    def whole_weights_and_words(lora: dict[str, Any]) -> tuple[dict[str, torch.Tensor], Response]:
        model, tokenizer = adapted(lora)
        eos = eos_token_ids(model, tokenizer)
        engine = TransformersEngine(model, eos_token_ids=eos, pad_token_id=PAD, batch_size=1)
        return host_weights(model, keep=True), probe(engine, model, seed=0)

    for lora in ({}, LORA):
        expected, said = alone(partial(whole_weights_and_words, lora), folder / "weights.pt")

        def check(lora: Any = lora, expected: Any = expected, said: Any = said) -> None:
            model, _ = adapted(lora)
            policy = PolicyModel(model)
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
            shapes = {name: value.shape for name, value in merged_weights(model, gather=False)}
            assert shapes == {name: value.shape for name, value in expected.items()}

        together(2, check)


def check_units_of_accelerate() -> None:
    """accelerate's own FSDP2 preparation, which it keeps from a CPU: PolicyModel says what its layers and ends are."""
    ids = torch.arange(5, 25)[None]

    def gradient_by_name(policy: PolicyModel) -> dict[str, torch.Tensor]:
        logits = policy(ids, torch.ones_like(ids), lambda hidden, head: head.logits(hidden))
        logits.logsumexp(-1).sum().backward()
        return {name: whole(value.grad) for name, value in policy.named_parameters() if value.grad is not None}

    def check() -> None:
        model, _ = load_model(ModelConfig())
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
        got = gradient_by_name(policy)
        assert got.keys() == expected.keys()
        for name, value in got.items():
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-6 * scale)

    together(2, check)


def run_of(output: Path, sharding: str) -> TrainConfig:
    """Three steps of plain GRPO, whose groups differ; a rate at which rounding does not change what is sampled."""
    return TrainConfig(
        method="grpo",
        output=str(output),
        steps=3,
        seed=5,
        save_every=1,
        data=DataConfig(train="arithmetic:1,2"),
        rollout=RolloutConfig(num_prompts=4, num_generations=4, max_completion_length=16),
        optim=OptimConfig(learning_rate=1e-5, micro_batch_size=3, minibatches=1),
        model=ModelConfig(sharding=sharding),  # type: ignore[arg-type]
    )


def resume(folder: Path) -> None:
    """Train on one process; then on four until these are killed, and on two from the checkpoint that they left."""
    together(1, lambda: train(run_of(folder / "whole", "none")))
    parts = folder / "parts"
    record = parts / "checkpoints" / "step-000001" / "trainer_state.json"
    together(4, lambda: train(run_of(parts, "fsdp2")), kill_when=record.is_file)
    (folder / "at_kill.json").write_text(json.dumps(sorted(path.name for path in record.parent.iterdir())))
    together(2, lambda: train(run_of(parts, "fsdp2"), resume=True))


def alone(work: Callable[[], Any], path: Path) -> Any:
    """What ``work`` returns in a process of its own. This one does nothing but fork: what it began might hang later."""
    together(1, lambda: torch.save(work(), path))
    return torch.load(path, weights_only=False)


def together(processes: int, work: Callable[[], object], *, kill_when: Callable[[], bool] | None = None) -> None:
    """Run ``work`` in forked processes of one group. With ``kill_when`` they get SIGKILL as soon as it holds."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]

    def run(rank: int) -> None:
        # Loading a model takes threads, and those race for the thread pool that torch makes anew after a fork.
        torch.set_num_threads(1)
        if processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_PORT": str(port)}
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState(cpu=True)
        work()
        if dist.is_initialized():
            dist.destroy_process_group()

    started = [mp.get_context("fork").Process(target=run, args=(rank,)) for rank in range(processes)]
    for process in started:
        process.start()
    deadline = time.monotonic() + 240
    while any(process.is_alive() for process in started):
        failed = [process.exitcode for process in started if process.exitcode]
        killed = kill_when is not None and kill_when()
        if failed or killed or time.monotonic() > deadline:
            for process in started:
                process.kill()
                process.join()
            if killed and not failed:
                return
            raise SystemExit(f"a process failed or hung; exit codes {[process.exitcode for process in started]}")
        time.sleep(0.02)
    if failed := [process.exitcode for process in started if process.exitcode]:  # since it was last looked at
        raise SystemExit(f"processes failed; exit codes {failed}")
    assert kill_when is None, "the run ended before it was to be killed"


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "gradients":
        check_weights(Path(sys.argv[3]).parent)
        check_units_of_accelerate()
        gradients(torch.load(sys.argv[2], weights_only=False), Path(sys.argv[3]))
    else:
        resume(Path(sys.argv[2]))
