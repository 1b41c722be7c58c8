"""The site: every page is in its menu, every public name on an API page. `mkdocs build --strict` runs in .ci/run."""

import importlib
import json
import re
import sys
from types import ModuleType

import pytest
import yaml
from documentation import PAGES, ROOT

sys.path.insert(0, str(ROOT / "docs" / "site"))
from text import (
    ROOT_PAGES,
    abbreviations,
    key_line,
    notebook_page,
    readable_docstring,
    site_links,
    source_page,
    web_address,
)

AREAS = ("kernels", "lora", "optimizers", "pruning", "recipes", "sparsity")
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))


def directives(area: str) -> list[str]:
    """The dotted names that the API page of an area shows."""
    return re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api" / f"{area}.md").read_text("utf-8"), re.MULTILINE)


def menu(entry: object) -> list[str]:
    """The pages in a part of the menu."""
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in menu(part)]


def test_every_page_is_in_the_menu_once():
    pages = [page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")]
    assert sorted(menu(CONFIG["nav"])) == sorted([*pages, *ROOT_PAGES.values()])


def test_one_page_links_every_page():
    linked = re.findall(r"\]\(([^)#]+\.md)\)", (ROOT / "docs" / "pages.md").read_text("utf-8"))
    pages = [page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")]
    assert sorted(linked) == sorted(set(pages) - {"pages.md"})


def test_the_checks_build_the_site_and_fail_on_a_warning():
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    build = re.search(r"pip install [^\n]*\.\[docs\].*(mkdocs build --strict[^\n]*)", script, re.DOTALL)
    # it silences the warnings that --strict counts
    assert build and "--quiet" not in build[1]
    assert set(CONFIG["validation"].values()) == {"warn"}


@pytest.mark.parametrize("area", AREAS)
def test_what_an_api_page_shows_exists(area):
    names = directives(area)
    assert names and len(set(names)) == len(names)
    for name in names:
        module, _, last = name.rpartition(".")
        value = getattr(importlib.import_module(module), last)
        assert not isinstance(value, ModuleType), f"{name} is a module: name the module that defines {last}"


@pytest.mark.parametrize("area", sorted(set(AREAS) - {"recipes"}))
def test_no_public_name_is_missing_from_the_api_pages(area):
    package = importlib.import_module(f"leanstep.{area}")
    shown = {name.rpartition(".")[2] for name in directives(area)}
    assert [name for name in package.__all__ if name not in shown] == []


def test_every_section_of_a_recipe_is_shown():
    schema = importlib.import_module("leanstep.recipes.config.schema")
    sections = {name for name in vars(schema) if name.endswith("Config")}
    shown = {name.rpartition(".")[2] for name in directives("recipes")}
    assert len(sections) > 10 and sections <= shown


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[a](../measured/lora.md)", "[a](../measured/lora.md)"),
        ("[a](../../SECURITY.md)", "[a](../security.md)"),
        ("[a](../../README.md#methods)", "[a](../index.md#methods)"),
        ("[rule.py](../../optimizers/sinkgd/rule.py)", "[rule.py](../source/optimizers/sinkgd/rule.py.md)"),
        ("[examples](../../examples/)", "[examples](../source/examples.md)"),
        ("[a](https://arxiv.org/abs/1)", "[a](https://arxiv.org/abs/1)"),
        ("[a](#here)", "[a](#here)"),
        ("![a](../x.svg)", "![a](../x.svg)"),
    ],
)
def test_links_lead_to_pages_of_the_site(link, expected):
    assert site_links(link, "docs/methods/lora.md", "methods/lora.md") == expected


def test_links_from_the_root():
    assert site_links("[w](docs/walks.md#a)", "CONTRIBUTING.md", "contributing.md") == "[w](walks.md#a)"
    assert site_links("![x](docs/x.svg)", "README.md", "index.md") == "![x](x.svg)"


def test_code_that_pages_link_stands_on_pages_of_its_own():
    examples = ROOT / "examples"
    listed = source_page(examples, "examples")
    for file in [*examples.glob("*.py"), *examples.glob("*/*.ipynb")]:
        assert f"(examples/{file.relative_to(examples).as_posix()}.md)" in listed
    page = source_page(examples / "trl_sft.py", "examples/trl_sft.py")
    assert "# examples/trl_sft.py" in page and (examples / "trl_sft.py").read_text("utf-8").rstrip() in page


def test_a_notebook_shows_its_outputs_but_for_the_standard_error():
    cells = [
        {"cell_type": "markdown", "source": ["# Title"]},
        {
            "cell_type": "code",
            "source": ["print(1)\n", "draw()"],
            "outputs": [
                {"output_type": "stream", "name": "stderr", "text": ["warning"]},
                {"output_type": "stream", "name": "stdout", "text": ["1\n"]},
                {"output_type": "display_data", "data": {"image/svg+xml": ["<svg/>"], "text/plain": ["<SVG>"]}},
            ],
        },
    ]
    page = notebook_page(json.dumps({"cells": cells}))
    assert page.startswith("# Title") and page.endswith("<svg/>")
    assert re.findall(r"^~~~~~\{ \.(\w+) \}\n(.*?)\n~~~~~$", page, re.MULTILINE | re.DOTALL) == [
        ("python", "print(1)\ndraw()"),
        ("text", "1"),
    ]


def test_words_of_the_glossary_show_their_meaning():
    rows = "| word | meaning |\n| --- | --- |\n| ATP, ERK | published `rules` |\n| level | one sparsity |\n"
    assert abbreviations(rows) == "*[ATP]: published rules\n*[ERK]: published rules"
    assert "*[joint change]: " in abbreviations((ROOT / "docs" / "glossary.md").read_text("utf-8"))


@pytest.mark.parametrize(
    "word",
    [
        "wandb",
        "Weights & Biases",
        "Trackio",
        "TensorBoard",
        "MLflow",
        "license",
        "FAQ",
        "troubleshooting",
        "QLoRA",
        "out of memory",
        "bitsandbytes",
    ],
)
def test_what_people_search_for_stands_on_a_page(word):
    texts = [(ROOT / page).read_text("utf-8").lower() for page in PAGES]
    assert any(word.lower() in text for text in texts)


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("https://example.org/team/leanstep.git", "https://example.org/team/leanstep"),
        ("https://name:secret@example.org/team/leanstep", "https://example.org/team/leanstep"),
        ("git@example.org:team/leanstep.git", "https://example.org/team/leanstep"),
        ("../leanstep", ""),
        ("", ""),
    ],
)
def test_the_site_links_the_repository_that_was_cloned(remote, address):
    assert web_address(remote) == address


def test_docstrings_become_readable():
    text = (
        "See :func:`prune` and :meth:`close`; the rule::\n\n    x = 1\n\n"
        "Args:\n    a, b: one\n        line more.\n    c: see: d, e: f.\n\n"
        "Raises:\n    A, B: never.\n\nExample:\n    >>> 1"
    )
    assert readable_docstring(text, {"prune": "leanstep.pruning.prune.prune"}) == (
        "See [`prune`][leanstep.pruning.prune.prune] and `close`; the rule:\n\n    x = 1\n\n"
        "Args:\n    a: one\n        line more.\n    b: one\n        line more.\n    c: see: d, e: f.\n\n"
        "Raises:\n    A, B: never.\n\nExamples:\n    >>> 1"
    )


def test_every_entry_of_a_docstring_has_its_names_on_one_line():
    """Or griffe does not read it, and the build of the site fails."""
    sections = re.compile(r"^( *)(?:Args|Attributes):\n((?:\1 +.*\n|\n)+)", re.MULTILINE)
    count = 0
    for path in (path for area in AREAS for path in (ROOT / area).rglob("*.py")):
        for indent, entries in sections.findall(path.read_text("utf-8")):
            names = re.findall(rf"^{indent}    (?! )(.+)$", entries, re.MULTILINE)
            assert all(":" in name for name in names), (path, names)
            count += len(names)
    assert count > 1000


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (None, "k: int"),
        ("3", "k: int = 3"),
        ("Field(default=256, ge=2, le=2 ** 24)", "k: int = 256  # at least 2 and at most 2 ** 24"),
        ("Field(default_factory=dict)", "k: int = {}"),
        ("Field(default_factory=Eval)", "k: int = Eval()"),
        ("Field(gt=0)", "k: int  # above 0"),
    ],
)
def test_keys_of_recipes_are_one_line(value, line):
    assert key_line("k", "int", value) == line
