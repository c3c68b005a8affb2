"""The environment in the form a bug report needs: versions, memory, disk, devices. No secrets."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from fissile import __version__
from fissile.run.machine import available_memory, free_disk, processors, total_memory

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "peft",
    "numpy",
    "scipy",
    "pydantic",
    "rich",
    "matplotlib",
    "kernels",
)
_DRIVERS = {
    "nvidia": Path("/proc/driver/nvidia/version"),
    "amd": Path("/sys/module/amdgpu/version"),
}
_VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "TRITON_INTERPRET")


def collect() -> dict[str, Any]:
    """Describe the environment as JSON-able data.

    Devices are read from the driver's files; torch is asked what it was built for, but no device is
    initialised, so this works while a GPU is busy or broken.
    """
    return {
        "fissile": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(),
        "cpu": _cpu(),
        "memory": {"total_bytes": total_memory(), "available_bytes": available_memory()},
        "disk": {"free_bytes": free_disk(Path.cwd())},
        "gpu": _gpu(),
        "torch": _torch(),
        "kernels": kernel_path(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def versions() -> dict[str, str | None]:
    """Installed versions; None for what is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def kernel_path() -> dict[str, str]:
    """Which implementation of the packed products would run here, by width, and why."""
    if importlib.util.find_spec("torch") is None:
        return {"device": "none: torch is not installed"}
    import torch

    from fissile.kernels.dispatch import report

    if not any(_driver(vendor) for vendor in _DRIVERS):
        return {"device": "cpu: no GPU driver", **report(None)}
    if torch.version.cuda is None and torch.version.hip is None:
        return {"device": "cpu: this torch is built without CUDA and ROCm", **report(None)}
    names = _gpu()["devices"]
    gpu = names[0] if names else "GPU"
    return {"device": f"cuda: {gpu}", **report(gpu, capability=_capability())}


def _driver(vendor: str) -> str | None:
    try:
        lines = _DRIVERS[vendor].read_text("utf-8", "replace").splitlines()
    except OSError:
        return None
    return lines[0].strip() if lines else None


def _gpu() -> dict[str, Any]:
    devices = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    names = []
    for path in devices:
        for line in path.read_text("utf-8", "replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "Model":
                names.append(value.strip())
    drivers = {vendor: text for vendor in _DRIVERS if (text := _driver(vendor))}
    return {"drivers": drivers, "devices": names}


def _capability() -> tuple[int, int] | None:
    """Compute capability of the first GPU by NVIDIA's own tool, which initialises no device."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        major, minor = done.stdout.splitlines()[0].strip().split(".")
        return int(major), int(minor)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None  # the report says that it was not read


def _cpu() -> dict[str, Any]:
    model, flags = platform.processor() or platform.machine(), ""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        if key.strip() == "flags":
            flags = value
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile")
    features = [name for name in wanted if name in flags.split()]
    return {"model": model, "usable": processors(), "features": features}


def _torch() -> dict[str, Any]:
    if importlib.util.find_spec("torch") is None:
        return {"installed": False}
    import torch

    return {
        "threads": torch.get_num_threads(),
        "cuda_built": torch.version.cuda,
        "hip_built": torch.version.hip,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
