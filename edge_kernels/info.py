"""``edge-kernels info``: what is installed, what this machine offers, and which backend serves which op and why.

Nothing is computed and nothing decided here: the decisions are ``backend.py``'s.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "transformers", "trl", "vllm")


def version_of(package: str) -> str | None:
    """Return an installed package's version, None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Return the model name of the processor, or its architecture where that is not known."""
    try:
        with Path("/proc/cpuinfo").open() as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _or_error(read: Callable[[], Any]) -> tuple[Any, str | None]:
    """Return the result of ``read`` and None, or None and the error: a broken part must not end the report."""
    try:
        return read(), None
    except (ImportError, RuntimeError, ValueError) as error:
        return None, str(error)


def collect() -> dict[str, Any]:
    """Return everything that ``edge-kernels info`` shows, ready for JSON."""
    import torch

    from edge_kernels import _extension, backend

    extension, extension_error = _or_error(_extension.load)
    instruction_set, instruction_set_error = _or_error(extension.instruction_set) if extension else (None, None)
    services, services_error = _or_error(backend.services)
    return {
        "edge_kernels": version_of("edge-grpo"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "extension": {
            "path": extension.__file__ if extension else None,
            "error": extension_error,
            **(extension.built_with() if extension else {}),
        },
        "cpu": {
            "name": cpu_name(),
            "features": extension.cpu_features() if extension else {},
            "instruction_sets": extension.instruction_sets() if extension else [],
            "instruction_set": instruction_set,
            "error": instruction_set_error,
            "threads": torch.get_num_threads(),
            "openmp": _extension.openmp_runtimes(),
        },
        "cuda": {
            **(extension.cuda_versions() if extension else {"driver": None, "runtime": None}),
            "torch": torch.version.cuda,
            "devices": extension.cuda_devices() if extension else [],
        },
        "services": [service._asdict() for service in services or []],
        "services_error": services_error,
    }


def _table(services: Sequence[dict[str, Any]]) -> list[str]:
    """Lines that say for each device which backend serves which ops, and why each other backend does not."""
    same: dict[tuple[str, str | None, tuple[tuple[str, str], ...]], list[str]] = {}
    for service in services:
        key = (service["device"], service["backend"], tuple(service["why_not"].items()))
        same.setdefault(key, []).append(service["op"])
    lines = []
    shown = None
    for (device, backend, why_not), ops in same.items():
        if device != shown:
            lines.append(f"\n{device} tensors")
            shown = device
        lines.append(f"  {backend or 'none'}: {', '.join(ops)}")
        names: dict[str, list[str]] = {}
        for name, reason in why_not:
            names.setdefault(reason, []).append(name)
        lines += [f"    not {', '.join(those)}: {reason}" for reason, those in names.items()]
    return lines


def describe(info: dict[str, Any]) -> str:
    """Return ``collect()``'s answer as text for a terminal."""
    extension, cpu, cuda = info["extension"], info["cpu"], info["cuda"]
    packages = ", ".join(f"{name} {version or 'absent'}" for name, version in info["packages"].items())
    lines = [
        f"edge_kernels {info['edge_kernels']}, Python {info['python']}, {info['platform']}",
        packages,
        f"extension: {extension['path']}, {extension['compiler']}"
        if extension["path"]
        else f"extension: {extension['error']}",
        "",
        f"CPU: {cpu['name']}, {cpu['threads']} threads",
        f"  features: {' '.join(name for name, present in cpu['features'].items() if present) or 'none known'}",
        f"  instruction set: {cpu['instruction_set'] or cpu['error'] or 'none'}"
        + (f" (of {', '.join(cpu['instruction_sets'])}; EDGE_KERNELS_ISA lowers it)" if cpu["instruction_set"] else ""),
        f"  OpenMP: {', '.join(cpu['openmp']) or 'none'}",
        "",
    ]
    built = extension.get("cuda")
    architectures = ", ".join(extension.get("cuda_architectures", []))
    lines += [
        f"CUDA: {f'built with {built} for {architectures}' if built else 'not in this build'}; "
        f"driver supports {cuda['driver'] or 'nothing (no driver)'}; torch has {cuda['torch'] or 'none'}",
        *(
            f"  {device['index']}: {device['name']}, sm_{device['capability'][0]}{device['capability'][1]}, "
            f"{device['memory_bytes'] / 2**30:.0f} GiB, {device['multiprocessors']} multiprocessors"
            for device in cuda["devices"]
        ),
    ]
    if not cuda["devices"]:
        lines.append("  no devices")
    lines += [f"\nbackends: {info['services_error']}"] if info["services_error"] else _table(info["services"])
    return "\n".join(lines)


def reader_has_gone() -> int:
    """Drop what is still to be printed, of which ``head`` has seen enough; return the status that SIGPIPE gives."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + 13


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``edge-kernels``; returns the exit status, 1 where the extension or the choice of backend is broken."""
    parser = argparse.ArgumentParser(prog="edge-kernels", description="Fused kernels for EDGE-GRPO.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="versions, devices, and which backend serves which op and why")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    info = collect()
    try:
        print(json.dumps(info, indent=2) if options.json else describe(info), flush=True)
    except BrokenPipeError:
        return reader_has_gone()
    broken = info["extension"]["error"] or info["cpu"]["error"] or info["services_error"]
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
