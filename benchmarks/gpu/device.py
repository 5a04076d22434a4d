"""The device of a run: its clock, its memory, its description, and our backends that it has."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import OURS
from edge_kernels import backend as edge_backend
from edge_kernels import info, use_backend

PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "verl")


class Device:
    """The clock and the memory of the device. ``kind`` is "cuda" (ROCm too), or "cpu" for the rehearsal."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._flush = torch.empty(1, device=kind)
        if kind == "cuda":
            cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
            self._flush = torch.empty(2 * cache_bytes // 4, device=kind)

    def milliseconds(self, call: Callable[[], object]) -> float:
        if self.kind == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            self._flush.zero_()
            torch.cuda._sleep(5_000_000)  # about 3 ms, in which the host enqueues the whole call
            start.record()
            result = call()
            end.record()
            torch.cuda.synchronize()
            del result
            return start.elapsed_time(end)
        self._flush.zero_()
        began = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - began
        del result
        return elapsed * 1e3

    def extra_bytes(self, call: Callable[[], object]) -> float:
        """Return the peak of memory in use during the call, less what was in use before; NaN on a CPU."""
        if self.kind != "cuda":
            call()
            return math.nan
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before

    def describe(self) -> dict[str, Any]:
        about = info.collect()
        where: dict[str, Any] = {"device": about["cpu"]["name"], "driver": None}
        if self.kind == "cuda":
            properties = torch.cuda.get_device_properties(0)
            where = {
                "device": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_bytes": properties.total_memory,
                "driver": about["cuda"]["driver"],
                "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
            }
        versions = {package: info.version_of(package) for package in PACKAGES}
        return {**where, "versions": versions, OURS: about["edge_kernels"]}


def backends(device: Device) -> tuple[list[str], dict[str, str]]:
    """Return our available backends, and the reason for each that is missing."""
    names = ("cuda", "triton") if device.kind == "cuda" else ("cpu",)
    reasons = {name: edge_backend.unavailable(name) for name in names}
    missing = {f"{OURS}, {name}": reason for name, reason in reasons.items() if reason is not None}
    return [name for name, reason in reasons.items() if reason is None], missing


def with_backend(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the call with one of our backends; it must contain the backward pass."""

    def run(*arguments: Any) -> Any:
        with use_backend(name):
            return call(*arguments)

    return run
