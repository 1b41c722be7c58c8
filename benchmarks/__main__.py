"""Run a benchmark: ``python benchmarks NAME [options]``. Without a name: list them.

Each file has a docstring that says what it measures, ``PARSER`` with its options, and ``main()``.
"""

import ast
import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
# other files beside this one, and folders that are packages, are what benchmarks share
FILES = [path for path in FOLDER.glob("*/*.py") if not (path.parent / "__init__.py").exists()]
FILES += [FOLDER / "faults.py", FOLDER / "gpu.py", FOLDER / "house.py"]
NAMES = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FILES)


def main() -> int | None:
    """Run the benchmark that the command line names; its exit code."""
    name = sys.argv.pop(1).removesuffix(".py") if len(sys.argv) > 1 else ""
    if name in NAMES:
        sys.argv[0] = f"python benchmarks {name}"
        return importlib.import_module(name.replace("/", ".")).main()
    for choice in NAMES:
        documentation = ast.get_docstring(ast.parse((FOLDER / f"{choice}.py").read_text("utf-8"))) or ""
        print(f"{choice:27} {documentation.splitlines()[0]}")
    if name in ("", "-h", "--help"):
        return 0
    print(f"expected one of these benchmarks, got {name!r}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
