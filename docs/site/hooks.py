"""What the site adds to docs/: MathML, pages of the root, pages of linked code, a link to the repository."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).parent))
from text import ROOT_PAGES, abbreviations, linked_paths, site_links, site_page, source_page, web_address

ROOT = Path(__file__).parents[2]
SOURCES = {page: source for source, page in ROOT_PAGES.items()}


def formula(source: str, language: str, css_class: str, options: Any, md: Any, **more: Any) -> str:
    """Return a ``math`` block as MathML, which browsers draw without a script."""
    return f'<div class="{css_class}">{latex2mathml.converter.convert(source, display="block")}</div>'


def on_config(config: Any) -> Any:
    """Lay the folders out under their import name, register ``math`` blocks, link the repository and its editor."""
    subprocess.run(["bash", str(ROOT / ".ci" / "links")], check=True)
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences["custom_fences"] = [{"name": "math", "class": "math", "format": formula}]
    remote = subprocess.run(["git", "-C", str(ROOT), "remote", "get-url", "origin"], capture_output=True, text=True)
    if url := web_address(remote.stdout.strip()):
        config.repo_url, config.repo_name, config.edit_uri = url, url.rpartition("/")[2], "edit/main/docs/"
        config.theme["features"].append("content.action.edit")
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie in the root of the repository, and a page for every file of code that a page links."""
    for source, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    pages = {file.src_uri: file.content_string for file in files.documentation_pages()}
    linked = {path for page, text in pages.items() for path in linked_paths(text, SOURCES.get(page, f"docs/{page}"))}
    folders = {path for path in linked if (ROOT / path).is_dir()}
    linked |= {str(file.relative_to(ROOT)) for path in folders for file in (ROOT / path).rglob("*.py")}
    linked |= {str(file.relative_to(ROOT)) for path in folders for file in (ROOT / path).rglob("*.ipynb")}
    for path in sorted(path for path in linked if site_page(path).startswith("source/")):
        files.append(File.generated(config, site_page(path), content=source_page(ROOT / path, path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links of a page, but for those of code, which lead where they should."""
    uri = page.file.src_uri
    if uri in SOURCES and config.repo_url:
        page.edit_url = f"{config.repo_url}/edit/main/{SOURCES[uri]}"
    if uri.startswith("source/"):
        return markdown
    words = "" if uri == "glossary.md" else abbreviations((ROOT / "docs" / "glossary.md").read_text("utf-8"))
    return f"{site_links(markdown, SOURCES.get(uri, f'docs/{uri}'), uri)}\n\n{words}\n"
