"""Read imports from source and say which of them the package's layers forbid."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]

# what a folder may import of the package itself, besides its own modules
ALLOWED = {
    "kernels": {"shared"},
    "lora": {"kernels", "shared"},
    "optimizers": {"kernels", "shared"},
    "sparsity": {"kernels", "shared"},
    "pruning": {"gguf", "kernels", "lora", "optimizers", "sparsity", "version", "page", "shared"},
    "recipes": {"kernels", "lora", "optimizers", "pruning", "sparsity", "version", "page", "shared"},
    "leanstep": {"gguf", "kernels", "lora", "optimizers", "pruning", "sparsity", "version", "page", "shared"},
}
# the command line is the one door to the recipes
ALLOWED_TO_FILE = {"leanstep/cli.py": {"recipes"}, "leanstep/__main__.py": {"cli"}}
FOLDERS = tuple(ALLOWED)
# single modules of the import root that others may use
ROOT_MODULES = {
    "__version__": "version", "cli": "cli", "_gguf": "gguf", "_pages": "page",
    "_arguments": "shared", "_checkpoint": "shared", "_files": "shared", "_memory": "shared",
    "_process": "shared", "_processes": "shared", "_torch": "shared",
}  # fmt: skip
# everything may import these, so they import nothing of the package; one waits for transformers to be imported
_SHARED = {name for name, target in ROOT_MODULES.items() if target == "shared"}
SHARED_FILES = {f"leanstep/{name}.py" for name in _SHARED - {"_checkpoint"}} | {
    f"leanstep/_checkpoint/{name}.py" for name in ("configuration", "files", "mapped", "safetensors")
}
SHARED_IMPORTS = {"torch", "numpy", "psutil", "safetensors", *sys.stdlib_module_names}
TRITON_FOLDER = "kernels/triton_impl/"


def imported_names(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) for each import, also inside functions, and for import_module("literal")."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def layer(name: str) -> str | None:
    """Name the layer a dotted name belongs to; None if it is not of this package."""
    parts = name.split(".")
    if parts[0] != "leanstep":
        return None
    if len(parts) == 1:
        return "leanstep"
    if parts[1] in FOLDERS:
        return parts[1]
    return ROOT_MODULES.get(parts[1], "leanstep")


def problems(path: str, source: str) -> list[str]:
    """List the forbidden imports of one file; ``path`` is relative to the repository, with slashes."""
    home = path.split("/")[0]
    allowed = ALLOWED[home] | ALLOWED_TO_FILE.get(path, set()) | {home} if path not in SHARED_FILES else {"shared"}
    found = []
    for line, name in imported_names(source):
        top = name.split(".")[0]
        target = layer(name)
        if name.startswith("."):
            found.append(f"{path}:{line}: relative import {name!r}; write it from 'leanstep'")
        elif top in FOLDERS and top != "leanstep":
            found.append(f"{path}:{line}: bare import of {name!r}; write 'leanstep.{name}'")
        elif top in {"tests", "benchmarks"}:
            found.append(f"{path}:{line}: {name!r} is not part of the package")
        elif top == "triton" and not path.startswith(TRITON_FOLDER):
            found.append(f"{path}:{line}: only {TRITON_FOLDER} imports Triton, this is {name!r}")
        elif path in SHARED_FILES and target is None and top not in SHARED_IMPORTS:
            found.append(f"{path}:{line}: a shared module imports torch at most, not {name!r}")
        elif target is not None and target not in allowed:
            found.append(f"{path}:{line}: {home} may not import {name!r}")
    return found


def package_files() -> list[Path]:
    """All Python files of the package, the command line included."""
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
