"""What the tests of ``python benchmarks optimizers/compare`` share: its modules, and settings of tiny runs."""

import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
PARTS = ("protocol", "growth", "methods", "peers", "search", "results", "summary", "tables", "training", "schedule")
TINY = (
    "model.config.hidden_size=16", "model.config.intermediate_size=32", "model.config.num_hidden_layers=1",
    "model.config.num_attention_heads=2", "data.seq_len=32", "data.val_tokens=2000", "batch.tokens_per_step=128",
    "batch.micro_batch_size=2",
)  # fmt: skip
# best learning rates of the tiny runs
STARTS = {"adamw": (0.128, 0.08), "sinkgd": (1.28, 0.08)}


def comparison_modules() -> Iterator[SimpleNamespace]:
    """The modules of ``benchmarks/comparison`` by name; afterwards they can be imported no more."""
    yield from benchmark_modules("comparison", PARTS)


def benchmark_modules(package: str, names: Sequence[str]) -> Iterator[SimpleNamespace]:
    """Modules of a folder of ``benchmarks/`` by name; afterwards they can be imported no more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        before = set(sys.modules)
        yield SimpleNamespace(**{name: importlib.import_module(f"{package}.{name}") for name in names})
        for name in set(sys.modules) - before:
            if name.split(".")[0] in (package, "calibration", "comparison", "common", "digits", "evolution", "models"):
                del sys.modules[name]


def check_page(table: Callable[[Path], str], pattern: str) -> None:
    """Assert that docs/measured/ has the tables of the committed results of a pattern, as they are made now."""
    root = FOLDER.parent / "docs"
    files = sorted((root / "results").glob(pattern))
    pages = [page.read_text("utf-8") for page in (root / "measured").glob("*.md")]
    assert files
    for file in files:
        block = f"<!-- table:{file.stem} -->\n{table(file)}\n<!-- /table:{file.stem} -->"
        assert sum(block in page for page in pages) == 1, file.stem


def comparison(out: Path) -> list[str]:
    """Code that compares tiny runs of AdamW and SinkGD, from starts near their best, and its arguments."""
    code = (
        f"import sys; from dataclasses import replace; sys.path.insert(0, {str(FOLDER)!r})\n"
        "import importlib; from comparison.methods import METHODS\n"
        f"METHODS.update({{name: replace(METHODS[name], start=start) for name, start in {STARTS!r}.items()}})\n"
        "sys.exit(importlib.import_module('optimizers.compare').main())\n"
    )
    settings = "--tune-steps 8 --judge-steps 8 --eval-every 4 --judge-seeds 1 2 --budget 15 --methods adamw sinkgd"
    return [code, *TINY, "--out", str(out), *settings.split()]


def killed(protocol: object, run: object) -> None:
    """In place of a run: what the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)
