"""The wheel: built from a clean copy, installed away from the repository, and every module of it imported."""

import ast
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from layering import imported_names, package_files
from packaging.requirements import Requirement

from leanstep.kernels.cpp_impl._prebuilt import LEVELS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
OUTSIDE = {"tests", "benchmarks", "docs"}
SKIPPED = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", "build", "dist", "runs", "tests")


def run(*command: object, cwd: Path, **more: str) -> str:
    """Run a command in a folder; return what it printed, or fail with it."""
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTEST_ADDOPTS"}}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment | more, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Folder with the sdist and the wheel, the wheel built from the unpacked sdist."""
    base = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, base / "source", ignore=SKIPPED)
    run(sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", base / "dist", base / "source", cwd=base)
    return base / "dist"


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def clean_python(wheel, tmp_path_factory) -> Path:
    return installed(wheel, tmp_path_factory.mktemp("clean"))


def installed(wheel: Path, base: Path) -> Path:
    """Python of a new environment with the wheel in it and, beneath, the libraries of this one but not its leanstep."""
    venv.create(base / "ve", with_pip=False)
    python = base / "ve" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=base)
    # a folder named in a .pth file is searched, but its own .pth files are not read: the editable install stays out
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=base).strip())
    libraries = {path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")}
    (site / "libraries.pth").write_text("\n".join(sorted(libraries)))
    return python


STEPS = """
import hashlib, torch
from leanstep import Lion, SinkGD, use_backend
for optimizer, options in ((Lion, {}), (SinkGD, {"algorithm": "sinkgd"})):
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(48, 80).to(dtype))
        made = optimizer([param], lr=1e-2, **options)
        for _ in range(3):
            param.grad = torch.randn(48, 80).to(dtype)
            with use_backend("cpp"):
                made.step()
        content = param.detach().view(torch.uint8).numpy().tobytes()
        print(optimizer.__name__, dtype, hashlib.sha256(content).hexdigest())
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler to build the wheel")
@pytest.mark.skipif(platform.machine() not in LEVELS, reason="wheels have no kernels for this machine")
def test_a_wheel_with_kernels_steps_without_a_compiler_as_with_one(tmp_path):
    shutil.copytree(ROOT, tmp_path / "source", ignore=SKIPPED)
    table = tmp_path / "source" / "kernels" / "cpp_impl" / "prebuilt.json"
    listed = json.loads(table.read_text("utf-8"))
    # what these steps need, for all levels; the whole list takes minutes
    needed = {name: listed[name] for name in ("steps/nonfinite_flags", "steps/adamw_step", "sparse/instructions")}
    wanted = ("float", "bf16", "NEAREST")  # and of a flag, the first value
    for name in ("steps/lion_step", "steps/sinkhorn_step"):
        needed[name] = [
            {key: [v for v in vs if v in wanted] or vs[:1] for key, vs in block.items()}
            for block in listed[name]
            if 0 in block.get("CAUTIOUS", [0]) and 0 in block["ALIGNED"]
        ]
    table.write_text(json.dumps(needed), "utf-8")
    command = (sys.executable, "-P", "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, "source")
    run(*command, cwd=tmp_path, LEANSTEP_PREBUILD="1")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.split("-")[2:4] == ["py3", "none"] and wheel.stem.endswith(platform.machine())
    metadata = zipfile.ZipFile(wheel).read(f"{'-'.join(wheel.name.split('-')[:2])}.dist-info/WHEEL").decode()
    assert "Root-Is-Purelib: false" in metadata
    libraries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert libraries and all(name.startswith("leanstep/kernels/cpp_impl/prebuilt/") for name in libraries)
    python = installed(wheel, tmp_path)
    alone = {"PATH": str(python.parent), "CXX": "", "LEANSTEP_CACHE": str(tmp_path / "cache")}
    prebuilt = run(python, "-P", "-W", "error", "-c", STEPS, cwd=tmp_path, **alone)
    assert not (tmp_path / "cache").exists(), "nothing was built"
    assert prebuilt == run(sys.executable, "-P", "-c", STEPS, cwd=tmp_path)
    printed = run(python, "-P", "-m", "leanstep", "info", cwd=tmp_path, **alone)
    assert "prebuilt for " in printed and "C++ compiler for the CPU kernels: none" in printed


def test_the_workflow_builds_wheels_for_every_machine_that_has_levels():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text("utf-8"))
    for job in workflow["jobs"].values():
        assert {row["machine"] for row in job["strategy"]["matrix"]["include"]} == set(LEVELS)
    settings = PROJECT["tool"]["cibuildwheel"]
    assert settings["environment"] == {"LEANSTEP_PREBUILD": "1"}
    assert all(settings[f"manylinux-{machine}-image"] for machine in LEVELS)


def folder_of(package: str) -> str:
    """The folder of a package: leanstep.kernels.nm is kernels/nm, private ones are in leanstep/."""
    name = package if package.startswith("leanstep._") else package.removeprefix("leanstep.")
    return name.replace(".", "/")


def modules_of(wheel: Path) -> list[str]:
    """Dotted names of all Python modules in the wheel."""
    names = [Path(name) for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")]
    return sorted(".".join(p.parent.parts if p.name == "__init__.py" else p.with_suffix("").parts) for p in names)


def test_in_the_root_of_a_clone_transformers_gets_hugging_faces_kernels(monkeypatch):
    """`python -c` puts the working folder on the path, in which a folder has the package's name."""
    pytest.importorskip("kernels", reason="transformers 5.25 brings it")
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    code = "import kernels, leanstep.kernels, transformers.activations; print(kernels.__version__, leanstep.kernels)"
    printed = run(sys.executable, "-c", code, cwd=ROOT)
    assert printed.startswith(version("kernels")) and str(ROOT) in printed


def test_every_package_folder_is_listed():
    folders = {
        path.parent.relative_to(ROOT).as_posix()
        for path in ROOT.glob("**/__init__.py")
        if path.relative_to(ROOT).parts[0] not in OUTSIDE | {"build"}
        and not any(part.startswith(".") or part in {"venv", "site-packages"} for part in path.relative_to(ROOT).parts)
    }
    assert {folder_of(name) for name in SETUPTOOLS["packages"]} == folders
    assert SETUPTOOLS["package-dir"] == {
        name: folder_of(name) for name in SETUPTOOLS["packages"] if "/" not in folder_of(name)
    }


def test_the_wheel_holds_every_file_of_the_packages(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    for name in SETUPTOOLS["packages"]:
        home = name.replace(".", "/")
        for path in (ROOT / folder_of(name)).iterdir():
            if path.is_file() and path.suffix in {".py", ".yaml", ".json", ".html", ".typed", ".cpp", ".h"}:
                assert f"{home}/{path.name}" in inside
    assert "leanstep/py.typed" in inside
    assert any(name.startswith("leanstep/recipes/configs/") and name.endswith(".yaml") for name in inside)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in inside)
    tops = {name.split("/")[0] for name in inside}
    assert all(top == "leanstep" or top.endswith(".dist-info") for top in tops), tops


def test_the_sdist_is_complete(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "recipes/config/loader.py", "kernels/__init__.py"} <= inside


@pytest.mark.slow
def test_every_module_of_the_wheel_imports_in_a_clean_environment(wheel, clean_python, tmp_path):
    modules = [name for name in modules_of(wheel) if not name.endswith("__main__")]
    assert "leanstep.recipes.config.loader" in modules
    assert "leanstep.kernels.reference" in modules
    code = (
        "import importlib, pathlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    module = importlib.import_module(name)\n"
        "    assert pathlib.Path(module.__file__).is_relative_to(sys.prefix), module.__file__\n"
        "import leanstep\n"
        "print(leanstep.__version__)\n"
    )
    printed = run(clean_python, "-P", "-W", "error::SyntaxWarning", "-c", code, *modules, cwd=tmp_path)
    assert printed.strip() == wheel.name.split("-")[1]


def test_the_command_runs_in_a_clean_environment(clean_python, tmp_path):
    command = clean_python.with_name("leanstep")
    assert "usage: leanstep" in run(command, "--help", cwd=tmp_path)
    assert "llama-nano-sinkgd" in run(command, "recipes", "list", cwd=tmp_path)
    assert "usage: leanstep" in run(clean_python, "-P", "-m", "leanstep", "--help", cwd=tmp_path)


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    core = {r.name for r in requirements if r.marker is None or "extra" not in str(r.marker)}
    assert core == {"torch", "triton", "numpy", "safetensors", "psutil", "jinja2", "scipy"}
    extras = {"recipes", "board", "gguf", "prove", "tasks", "demo", "bench", "dev", "docs"}
    assert set(metadata.get_all("Provides-Extra")) == extras
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    for requirement in requirements:
        assert "==" not in str(requirement.specifier), f"{requirement} is a pin; the package gives ranges"
        assert requirement.specifier or requirement.name == "leanstep", f"{requirement} has no lower bound"


@pytest.mark.parametrize("extra", ["", "recipes"])
def test_what_is_declared_is_imported(extra):
    optional = PROJECT["project"]["optional-dependencies"]
    declared = {Requirement(text).name for text in (optional[extra] if extra else PROJECT["project"]["dependencies"])}
    imported = {
        name.partition(".")[0] for path in package_files() for _, name in imported_names(path.read_text("utf-8"))
    }
    unused = declared - imported - {"leanstep"}
    assert not unused, f"{', '.join(unused)} in pyproject.toml and never imported by the package"


@pytest.mark.parametrize(
    "platform", [("linux", "x86_64", True), ("linux", "aarch64", False), ("darwin", "arm64", False)]
)
def test_triton_is_asked_for_where_it_exists(platform):
    system, machine, wanted = platform
    (triton,) = (Requirement(r) for r in PROJECT["project"]["dependencies"] if r.startswith("triton"))
    assert triton.marker.evaluate({"sys_platform": system, "platform_machine": machine}) is wanted


def test_the_source_is_python_3_11():
    oldest = tuple(map(int, PROJECT["project"]["requires-python"].removeprefix(">=").split(".")))
    assert oldest == (3, 11)
    for name in SETUPTOOLS["packages"]:
        for path in (ROOT / folder_of(name)).glob("*.py"):
            ast.parse(path.read_text("utf-8"), str(path), feature_version=oldest)
