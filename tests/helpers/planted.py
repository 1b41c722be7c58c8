"""Plant one fault at a time in the source of a Triton kernel, without a change of the package's files."""

import ast
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType


def occurrences(module: ModuleType, pattern: str) -> list[tuple[str, int]]:
    """Where a regular expression occurs in the jitted functions of a module: (function, its count in the file)."""
    source = inspect.getsource(module)
    lines = [0, *(end.end() for end in re.finditer("\n", source))]
    spans = [
        (node.name, lines[node.lineno - 1], lines[node.end_lineno])
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and "triton.jit" in "".join(map(ast.unparse, node.decorator_list))
    ]
    matches = list(re.finditer(pattern, source))
    return [(name, i) for name, first, end in spans for i, m in enumerate(matches) if first <= m.start() < end]


def planted(module: ModuleType, pattern: str, replacement: str, count: int, folder: Path) -> ModuleType:
    """The module with one occurrence changed, loaded from a file in `folder`."""
    source = inspect.getsource(module)
    match = list(re.finditer(pattern, source))[count]
    name = f"planted_{module.__name__.rpartition('.')[2]}_{len(list(folder.iterdir()))}"
    path = folder / f"{name}.py"
    path.write_text(source[: match.start()] + match.expand(replacement) + source[match.end() :])
    spec = importlib.util.spec_from_file_location(name, path)
    changed = importlib.util.module_from_spec(spec)
    sys.modules[name] = changed
    spec.loader.exec_module(changed)
    return changed
