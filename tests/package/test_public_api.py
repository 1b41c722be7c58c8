"""Public names: exported, documented, and loaded no earlier than needed."""

import ast
import functools
import importlib
import importlib.resources
import inspect
import json
import subprocess
import sys

import pytest

import leanstep

PACKAGES = ("leanstep", *(f"leanstep.{name}" for name in ("kernels", "lora", "optimizers", "pruning", "sparsity")))
HEAVY = ("torch", "numpy", "triton", "transformers", "accelerate", "datasets", "omegaconf", "matplotlib", "rich")
COMPILER = ("torch._dynamo", "torch._inductor", "triton", "transformers", "accelerate", "omegaconf")


def python(code: str) -> str:
    """Run code in a fresh interpreter that does not see the current folder; return what it printed."""
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


@functools.cache
def loaded_after(statement: str) -> set[str]:
    """Names in sys.modules after a statement, in a fresh interpreter."""
    return set(json.loads(python(f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))")))


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_sorted_and_resolve(package):
    module = importlib.import_module(package)
    assert module.__all__, package
    assert list(module.__all__) == sorted(module.__all__, key=lambda name: (not name.isupper(), name))
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_say_what_they_are(package):
    module = importlib.import_module(package)
    assert inspect.getdoc(module)
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert len(inspect.getdoc(value) or "") > 40, f"{package}.{name} has no docstring worth the name"


@pytest.mark.parametrize("package", PACKAGES)
def test_public_signatures_are_annotated(package):
    module = importlib.import_module(package)
    bare = []
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) and "__init__" not in vars(value):
            continue  # exceptions, named tuples
        if inspect.isclass(value) or inspect.isfunction(value):
            signature = inspect.signature(value.__init__ if inspect.isclass(value) else value)
            bare += [
                f"{package}.{name}({parameter.name})"
                for parameter in signature.parameters.values()
                if parameter.name != "self" and parameter.annotation is parameter.empty
            ]
            if signature.return_annotation is signature.empty and inspect.isfunction(value):
                bare.append(f"{package}.{name} -> ?")
    assert not bare


def test_every_optimizer_name_is_a_name_of_leanstep():
    optimizers = importlib.import_module("leanstep.optimizers")
    assert set(optimizers.__all__) <= set(leanstep.__all__)
    for name in optimizers.__all__:
        assert getattr(leanstep, name) is getattr(optimizers, name)


def test_type_checkers_and_the_interpreter_see_the_same_names():
    declared: set[str] = set()
    for node in ast.walk(ast.parse(inspect.getsource(leanstep))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("leanstep."):
            names = [alias.asname or alias.name for alias in node.names]
            declared |= set(importlib.import_module(node.module).__all__ if names == ["*"] else names)
    assert declared | {"__version__"} == set(leanstep.__all__)


def test_unknown_names_are_errors_that_list_the_known_ones():
    with pytest.raises(AttributeError, match="no attribute 'Adam'.*SinkGD"):
        leanstep.Adam  # noqa: B018
    with pytest.raises(ImportError):
        exec("from leanstep import Adam")


def test_subpackages_are_attributes():
    assert python("import leanstep; print(leanstep.recipes.__name__)").strip() == "leanstep.recipes"


def test_importing_leanstep_imports_next_to_nothing():
    before, after = loaded_after("pass"), loaded_after("import leanstep")
    assert not after & set(HEAVY)
    assert len(after - before) < 30, sorted(after - before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "package", [f"leanstep.{name}" for name in ("kernels", "lora", "optimizers", "pruning", "sparsity")]
)
def test_importing_optimizers_imports_torch_but_no_compiler(package):
    # torch itself decides what "import torch" brings; the package adds nothing of this list to it
    allowed = loaded_after("import torch, torch.optim")
    after = loaded_after(f"from {package} import *")
    assert "torch" in after
    assert not (after - allowed) & set(COMPILER)


def test_version_is_the_installed_one():
    from importlib.metadata import version

    assert leanstep.__version__ == version("leanstep")


def test_py_typed_is_there():
    assert (importlib.resources.files("leanstep") / "py.typed").is_file()
