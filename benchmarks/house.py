"""How large the code is, and how often it says one thing: numbers that may only fall (tests/package/test_house.py).

    python benchmarks house --write

``--write`` lowers the limits in ``tests/package/house.json`` to what is counted now. It raises none.
"""

from __future__ import annotations

import ast
import functools
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common import command_line, print_table

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ("kernels", "leanstep", "lora", "optimizers", "pruning", "recipes", "sparsity")
LIMITS = ROOT / "tests" / "package" / "house.json"
LONGEST_LISTING, MOST_PARAMETERS = 12, 8
# settings of pruning
SETTINGS = ("pattern", "levels", "budget", "processes", "score")
PARSER = command_line(__doc__, write=(False, "lower the limits to what is counted"))


def counts() -> dict[str, int]:
    """Return every number that may only fall, by its name."""
    numbers = {f"lines of {folder}/": _lines(ROOT / folder, ".py") for folder in (*PACKAGE, "tests", "benchmarks")}
    numbers["lines of the package"] = sum(numbers[f"lines of {folder}/"] for folder in PACKAGE)
    numbers["lines of C++"] = _lines(ROOT / "kernels", ".cpp", ".h")
    numbers[f"folders of the package with more than {LONGEST_LISTING} names"] = len(long_listings())
    numbers[f"functions with more than {MOST_PARAMETERS} parameters, without Triton's"] = len(wide_functions())
    numbers["files in circles of imports, those for types included"] = sum(map(len, circles(imports())))
    for setting in SETTINGS:
        numbers[f"declarations of {setting} in pruning/"] = len(declarations(setting))
    for name in ("lion", "sinkgd", "mfac", "lanton"):
        numbers[f"Python calls of a step of {name} for one more tensor"] = calls_per_tensor(name)
    return numbers


@functools.cache
def sources() -> dict[str, ast.Module]:
    """Return the syntax trees of the package's files by their paths."""
    files = (path for folder in PACKAGE for path in sorted((ROOT / folder).rglob("*.py")))
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text("utf-8")) for path in files}


def _lines(folder: Path, *endings: str) -> int:
    return sum(len(path.read_text("utf-8").splitlines()) for path in folder.rglob("*.*") if path.suffix in endings)


def long_listings() -> dict[str, int]:
    """Return folders of the package with more names than fit a glance, and how many they have."""
    folders = {path.parent for folder in PACKAGE for path in (ROOT / folder).rglob("*.py")}
    listings = {
        folder.relative_to(ROOT).as_posix(): sum(
            entry.name != "__init__.py" and (entry.suffix == ".py" or (entry.is_dir() and any(entry.rglob("*.py"))))
            for entry in folder.iterdir()
        )
        for folder in folders
    }
    return {folder: names for folder, names in sorted(listings.items()) if names > LONGEST_LISTING}


def wide_functions() -> list[str]:
    """Return the functions with too many parameters; kernels and launchers of Triton have one for each tensor."""
    return [
        f"{path}:{node.name}"
        for path, tree in sources().items()
        if not path.startswith("kernels/triton_impl/")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and len(_parameters(node)) > MOST_PARAMETERS
    ]


def _parameters(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    return [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def declarations(setting: str) -> list[str]:
    """Return the functions of pruning that have a parameter, and its classes that have a field, of this name."""
    places = []
    for path, tree in sources().items():
        for node in ast.walk(tree) if path.startswith("pruning/") else ():
            if isinstance(node, ast.FunctionDef) and setting in _parameters(node):
                places.append(f"{path}:{node.name}")
            elif isinstance(node, ast.ClassDef):
                fields = (one.target for one in node.body if isinstance(one, ast.AnnAssign))
                if any(isinstance(field, ast.Name) and field.id == setting for field in fields):
                    places.append(f"{path}:{node.name}")
    return places


def imports() -> dict[str, set[str]]:
    """Return the files of the package that each of its files imports at the top, those for type checkers included."""
    trees = sources()
    modules = {
        f"leanstep.{path.removeprefix('leanstep/').removesuffix('.py').replace('/', '.')}": path for path in trees
    }
    graph = {}
    for path, tree in trees.items():
        names = set()
        for node in _top_level(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        graph[path] = {modules[name] for name in names if name in modules} - {path}
    return graph


def _top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    for node in tree.body:
        yield from node.body if isinstance(node, ast.If) else [node]


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the groups of files that import each other, directly or through others."""
    reached = {path: _reachable(graph, path) for path in graph}
    groups = {
        tuple(sorted({path} | {other for other in reached[path] if path in reached[other]}))
        for path in graph
        if path in reached[path]
    }
    return [list(group) for group in sorted(groups)]


def _reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    seen, waiting = set[str](), [start]
    while waiting:
        for path in graph[waiting.pop()] - seen:
            seen.add(path)
            waiting.append(path)
    return seen


def calls_per_tensor(name: str) -> int:
    """Return how many more functions of the package an optimizer's step calls if it has one more matrix."""
    few, many = 8, 24
    return round((_step_calls(name, many) - _step_calls(name, few)) / (many - few))


def _step_calls(name: str, tensors: int) -> int:
    import torch

    from leanstep.optimizers import create

    model = torch.nn.ModuleList(torch.nn.Linear(16, 16, bias=False) for _ in range(tensors))
    optimizer = create(model, name, lr=1e-3, say=None)
    calls = 0

    def count(frame: Any, event: str, _: object) -> None:
        nonlocal calls
        calls += event == "call" and Path(frame.f_code.co_filename).is_relative_to(ROOT)

    for step in range(4):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, step + 1.0)
        previous = sys.getprofile()
        sys.setprofile(count if step == 3 else None)  # the first steps make state and compile kernels
        try:
            optimizer.step()
        finally:
            sys.setprofile(previous)
    return calls


def room() -> dict[str, int]:
    """Return what whole new capabilities add to each limit: CAPABILITIES of the test, which is not imported."""
    statements = ast.parse(LIMITS.with_name("test_house.py").read_text("utf-8")).body
    given = next(s for s in statements if isinstance(s, ast.AnnAssign) and ast.unparse(s.target) == "CAPABILITIES")
    return {name: sum(by.values()) for name, by in ast.literal_eval(ast.unparse(given.value)).items()}


def main() -> None:
    """Print what is counted beside its limit; with ``--write`` lower the limits."""
    options = PARSER.parse_args()
    numbers, limits, more = counts(), json.loads(LIMITS.read_text("utf-8")), room()
    most = {name: limits.get(name, now) + more.get(name, 0) for name, now in numbers.items()}
    print_table(["what may only fall", "now", "limit"], ([name, now, most[name]] for name, now in numbers.items()))
    for folder, names in long_listings().items():
        print(f"{folder}/ has {names} names")
    for group in circles(imports()):
        print("a circle:", ", ".join(group))
    if options.write:
        lowered = {name: min(now, most[name]) - more.get(name, 0) for name, now in numbers.items()}
        LIMITS.write_text(json.dumps(lowered, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
