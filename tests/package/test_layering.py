"""torch <- kernels <- optimizers <- recipes, and Triton in one folder only."""

import ast
import re

import pytest
from layering import FOLDERS, ROOT, package_files, problems

GOOD = {
    "kernels/_backend.py": "import torch\nfrom leanstep.kernels.reference import lion_step",
    "kernels/triton_impl/lion_step.py": "import triton\nimport triton.language as tl",
    "kernels/op.py": "from leanstep.kernels.triton_impl import _common",
    "optimizers/lion.py": "from leanstep.kernels import lion_step\nfrom leanstep.optimizers import _state",
    "recipes/build.py": "from leanstep.optimizers import Lion",
    "recipes/checkpoint.py": "from leanstep import __version__",
    "leanstep/__init__.py": "from leanstep.optimizers import Lion",
    "leanstep/cli.py": "def main():\n    from leanstep.recipes import launch",
    "leanstep/__main__.py": "from leanstep.cli import main",
    "leanstep/_torch.py": "import functools\nimport torch\nfrom leanstep._memory import free_memory",
    "kernels/cpp_impl/_build.py": "from leanstep._files import replacing",
}
BAD = {
    "bare import": ("optimizers/x.py", "import kernels"),
    "bare import of a module": ("recipes/x.py", "from optimizers.lion import Lion"),
    "relative import": ("optimizers/x.py", "from . import lion"),
    "upwards": ("kernels/x.py", "from leanstep.optimizers import Lion"),
    "upwards by another form": ("kernels/x.py", "from leanstep import optimizers"),
    "upwards through the root": ("kernels/x.py", "from leanstep import Lion"),
    "upwards, whole root": ("optimizers/x.py", "import leanstep"),
    "upwards, late": ("optimizers/x.py", "def f():\n    import leanstep.recipes.training.train"),
    "upwards, by string": ("optimizers/x.py", "import importlib\nimportlib.import_module('leanstep.recipes')"),
    "recipes from the root": ("leanstep/__init__.py", "from leanstep.recipes import train"),
    "command line from a recipe": ("recipes/x.py", "from leanstep.cli import main"),
    "Triton in an optimizer": ("optimizers/x.py", "import triton"),
    "Triton in a kernel front": ("kernels/x.py", "from triton import language"),
    "a library in a shared file": ("leanstep/_memory.py", "import transformers"),
    "a shared file and the version": ("leanstep/_files.py", "from leanstep import __version__"),
    "a shared file of the root": ("leanstep/_memory.py", "from leanstep.kernels import use_backend"),
    "tests": ("recipes/x.py", "from tests.helpers import cases"),
}


def test_the_package_keeps_its_layers():
    files = package_files()
    assert {path.relative_to(ROOT).parts[0] for path in files} == set(FOLDERS)
    found = [
        problem for path in files for problem in problems(path.relative_to(ROOT).as_posix(), path.read_text("utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", GOOD)
def test_what_the_layers_allow(path):
    assert problems(path, GOOD[path]) == []


@pytest.mark.parametrize("case", BAD)
def test_what_the_layers_forbid(case):
    path, source = BAD[case]
    assert len(problems(path, source)) == 1


def test_the_package_opens_folders_of_others_in_two_places_and_runs_no_code_of_them():
    for path in package_files():
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in {"from_pretrained", "from_config"}:
                assert name in {"pruning/folder/loading.py", "sparsity/inference/load.py"}, (name, node.lineno)
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert keywords.get("trust_remote_code") == "False", (name, node.lineno)
                if "dtype" in keywords and node.func.attr == "from_pretrained":
                    # else transformers 5.25 replaces layers by kernels of the hub
                    assert keywords.get("use_kernels") == "False", (name, node.lineno)


def test_code_to_copy_runs_no_code_of_the_folders_that_it_opens():
    """Without the argument, transformers asks on the standard input whether to run it."""
    files = [file for folder in ("benchmarks", "docs", "examples") for file in (ROOT / folder).rglob("*")]
    texts = {file: file.read_text("utf-8") for file in files if file.suffix in {".py", ".md", ".ipynb"}}
    calls = [
        (file.name, call[0])
        for file, text in texts.items()
        for call in re.finditer(r"Auto\w+\.from_(pretrained|config)\(([^()]|\([^()]*\))*\)", text)
    ]
    assert len(calls) > 10
    assert not [call for call in calls if "trust_remote_code=False" not in call[1]]
