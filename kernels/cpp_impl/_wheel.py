"""Commands of setuptools that put prebuilt C++ kernels into a wheel; ``pyproject.toml`` names them.

They do something only where ``LEANSTEP_PREBUILD=1`` is set and the package is not installed as editable. Setuptools
imports this file by its path, from an environment that has neither torch nor leanstep.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HOME = Path(__file__).parent


def is_requested() -> bool:
    """Whether wheels are to carry kernels."""
    return os.environ.get("LEANSTEP_PREBUILD", "0") not in ("", "0")


def _prebuilt() -> ModuleType:
    """The file beside this one, which cannot be imported by its name."""
    spec = importlib.util.spec_from_file_location("leanstep_prebuilt", HOME / "_prebuilt.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _commands(target: Path) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the commands that compile and link each library."""
    prebuilt = _prebuilt()
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    levels = prebuilt.LEVELS.get(platform.machine(), ())
    if not levels:
        raise SystemExit(f"LEANSTEP_PREBUILD: expected one of {', '.join(prebuilt.LEVELS)}, got {platform.machine()}")
    home = target / prebuilt.folder().relative_to(HOME)
    for level in levels:
        (home / level.name).mkdir(parents=True, exist_ok=True)
        for kernel, macros in prebuilt.variants():
            if level.only is None or kernel.startswith(level.only):
                library = home / level.name / prebuilt.file_name(kernel, macros)
                compiled = library.with_suffix(".o")
                flags = (*prebuilt.FLAGS, *level.flags, f"-I{HOME}", *(f"-D{key}={macros[key]}" for key in macros))
                # linked without OpenMP: the library takes the runtime that torch has loaded, whatever its name
                yield (
                    [*compiler, *flags, "-c", str(HOME / f"{kernel}.cpp"), "-o", str(compiled)],
                    [*compiler, "-shared", "-s", "-Wl,-z,noseparate-code", str(compiled), "-o", str(library)],
                )


def build(target: Path) -> int:
    """Build all kernels for all levels of this machine into ``target``; return their number."""

    def run(commands: tuple[list[str], list[str]]) -> None:
        for command in commands:
            ran = subprocess.run(command, capture_output=True, text=True)
            if ran.returncode:
                raise SystemExit(f"{shlex.join(command)} failed:\n{ran.stderr}")
        Path(commands[0][-1]).unlink()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return sum(1 for _ in pool.map(run, _commands(target)))


class BuildWithKernels(build_py):
    """Copies the package, then compiles the kernels into the copy."""

    def run(self) -> None:
        """Run the command."""
        super().run()
        if is_requested() and not self.editable_mode:
            count = build(Path(self.build_lib, "leanstep", "kernels", "cpp_impl"))
            self.announce(f"{count} prebuilt C++ kernels", level=2)


class PlatformWheel(bdist_wheel):
    """A wheel with kernels is for one kind of machine and any Python."""

    def finalize_options(self) -> None:
        """Finish the options."""
        if is_requested():
            # then setuptools installs into the folder for platforms, outside of which auditwheel takes no library
            self.distribution.has_ext_modules = lambda: True
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags of Python, ABI and platform."""
        python, abi, machine = super().get_tag()
        return ("py3", "none", machine) if is_requested() else (python, abi, machine)
