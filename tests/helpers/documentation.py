"""The pages of the documentation and their code blocks, for the tests that run and check them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of every fenced block of a page."""
    return FENCE.findall((ROOT / page).read_text("utf-8"))


def programs(page: str) -> list[str]:
    """Python programs of a page: a block that begins by importing torch or transformers, and those that continue it."""
    runs: list[str] = []
    for code in (code for language, code in blocks(page) if language == "python"):
        if runs and not code.startswith(("import torch\n", "from transformers import")):
            code = f"{runs.pop()}\n{code}"
        runs.append(code)
    return runs


def command_lines(page: str) -> list[str]:
    """Shell lines of a page, those that a backslash continues joined, comments left out."""
    shell = (re.sub(r"\\\n *", "", code) for language, code in blocks(page) if language == "bash")
    lines = [line for code in shell for line in code.splitlines()]
    return [line for line in lines if not line.startswith("#")]


def leanstep_arguments(line: str) -> list[str] | None:
    """The arguments of the leanstep command in a shell line, if there is one."""
    last = line.split(" && ")[-1].split(" | ")[0]
    words = shlex.split(last, comments=True)
    return words[1:] if words and words[0] == "leanstep" else None
