"""What the site adds to the pages: formulas as MathML, three pages of the root, links to sources, links for griffe."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).parent))
from text import ROOT_PAGES, site_links

ROOT = Path(__file__).parents[2]
SOURCES = {page: source for source, page in ROOT_PAGES.items()}


def formula(source: str, language: str, css_class: str, options: Any, md: Any, **more: Any) -> str:
    """Return a ``math`` block as MathML, which browsers draw without a script."""
    return f'<div class="{css_class}">{latex2mathml.converter.convert(source, display="block")}</div>'


def on_config(config: Any) -> Any:
    """Lay the folders out under their import name, where mkdocstrings finds them, and register the ``math`` block."""
    subprocess.run(["bash", str(ROOT / ".ci" / "links")], check=True)
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences["custom_fences"] = [{"name": "math", "class": "math", "format": formula}]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie in the root of the repository, where visitors of a repository look for them."""
    for source, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite links that leave docs/."""
    uri = page.file.src_uri
    repository = f"{config.repo_url.rstrip('/')}/blob/main" if config.repo_url else ""
    return site_links(markdown, SOURCES.get(uri, f"docs/{uri}"), uri, repository)
