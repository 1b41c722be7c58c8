"""Text on its way to the site: links that leave docs/, files of code, and docstrings. Standard library only."""

import ast
import json
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path

# pages of the site that lie outside docs/
ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}

_LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc):`~?(?P<name>[^`]+)`")
# rows of the glossary whose words also have their usual meaning
_EVERYDAY = {"curve", "defaults", "level", "other rate", "plain", "role", "score", "tuned"}
_EMPTY = {"dict": "{}", "list": "[]", "tuple": "()"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_ARGUMENTS = re.compile(r"^(?P<indent> *)(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)+): (?P<text>.*)$")


def site_page(path: str) -> str:
    """Return the page of the site that shows a file or folder of the repository.

    Args:
        path: path in the repository, such as "docs/code.md", "README.md" or "optimizers/lion.py".
    """
    return ROOT_PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md")


def linked_paths(markdown: str, source: str) -> list[str]:
    """Return the paths in the repository to which a file's relative links lead.

    Args:
        markdown: the text of the file.
        source: path of the file in the repository.
    """
    targets = [match["target"] for match in _LINK.finditer(markdown)]
    return [_joined(source, target) for target in targets if ":" not in target]


def abbreviations(glossary: str) -> str:
    """Return the rows of the glossary's table as Markdown's abbreviations, which show a word's meaning where it stands.

    Words of everyday English are left out: their meaning would show everywhere.
    """
    rows = re.findall(r"^\| (?P<words>[^|]+) \| (?P<meaning>[^|]+) \|$", glossary, re.MULTILINE)[2:]
    entries = [(word, meaning.replace("`", "")) for words, meaning in rows for word in words.split(", ")]
    return "\n".join(f"*[{word}]: {meaning}" for word, meaning in entries if word not in _EVERYDAY)


def _joined(source: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def site_links(markdown: str, source: str, page: str) -> str:
    """Rewrite the relative links and pictures of a file of the repository for its page on the site.

    Args:
        markdown: the text of the file.
        source: path of the file in the repository, such as "docs/code.md".
        page: path of its page on the site, such as "code.md".

    Returns:
        The text. All relative links lead to pages of the site; links with a scheme are left as they are.
    """

    def rewritten(match: re.Match[str]) -> str:
        text, target, anchor = match["text"], match["target"], match["anchor"] or ""
        if ":" in target:
            return match[0]
        destination = site_page(_joined(source, target))
        return f"[{text}]({posixpath.relpath(destination, posixpath.dirname(page) or '.')}{anchor})"

    return _LINK.sub(rewritten, markdown)


def web_address(remote: str) -> str:
    """Return the page of a repository by the address of its remote, without credentials; empty: it has none."""
    match = re.fullmatch(r"(?:https://(?:[^@/]*@)?|ssh://git@|git@)([\w.-]+)[:/]([\w./~-]+?)(?:\.git)?/?", remote)
    return f"https://{match[1]}/{match[2]}" if match else ""


def source_page(file: Path, path: str) -> str:
    """Return the page of a file of code, a notebook with its outputs, or a folder as a list of its files.

    Args:
        file: the file or folder.
        path: its path in the repository.
    """
    if file.is_dir():
        names = sorted(entry.name for entry in file.iterdir() if entry.suffix == ".py")
        names += sorted(str(entry.relative_to(file)) for entry in file.glob("*/*.ipynb"))
        return "\n".join([f"# {path}\n", *(f"- [{name}]({file.name}/{name}.md)" for name in names)])
    if file.suffix == ".ipynb":
        return notebook_page(file.read_text("utf-8"))
    return f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n{_fenced(file.read_text('utf-8'), file.suffix[1:])}"


def notebook_page(text: str) -> str:
    """Return a notebook as Markdown: its cells in order, each with the outputs that the file stores."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else _fenced(source, "python"))
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                continue
            data = {"text/plain": output.get("text", []), **output.get("data", {})}
            if "image/svg+xml" in data:
                parts.append("".join(data["image/svg+xml"]))
            else:
                parts.append(_fenced("".join(data["text/plain"]), "text"))
    return "\n\n".join(parts)


def _fenced(text: str, language: str) -> str:
    language = {"py": "python", "": "text"}.get(language, language)
    return f"~~~~~{{ .{language} }}\n{text.rstrip()}\n~~~~~\n"


def readable_docstring(text: str, addresses: Mapping[str, str]) -> str:
    """Turn a docstring of this package into one that griffe and Markdown read.

    Args:
        text: a docstring in Google's style with reStructuredText's roles. One entry may describe several arguments:
            ``a, b: text``.
        addresses: name of a public object, short or dotted -> its dotted name on the site.

    Returns:
        The docstring with one entry per argument, links instead of roles, indented code after a single colon, and the
        section of examples under the name that griffe knows.
    """

    def link(match: re.Match[str]) -> str:
        name = match["name"]
        address = addresses.get(name)
        return f"[`{name.removeprefix('leanstep.')}`][{address}]" if address else f"`{name}`"

    lines = _ROLE.sub(link, text).split("\n")
    result: list[str] = []
    index = 0
    section = 0  # indentation of the entries of the section of arguments or attributes, 0 outside of one
    while index < len(lines):
        line = lines[index]
        index += 1
        indent = len(line) - len(line.lstrip())
        if line.strip() in ("Args:", "Attributes:"):
            section = indent + 4
        elif line.strip() and indent < section:
            section = 0
        match = _ARGUMENTS.match(line) if section and indent == section else None
        if match is None:
            result.append(re.sub(r"::$", ":", line).replace("Example:", "Examples:"))
            continue
        entry = [match["text"]]
        while index < len(lines) and lines[index].startswith(" " * (section + 1)):
            entry.append(lines[index])
            index += 1
        for name in match["names"].split(", "):
            result += [f"{match['indent']}{name}: {entry[0]}", *entry[1:]]
    return "\n".join(result)


def key_line(name: str, annotation: str, value: str | None) -> str:
    """Return the line of a recipe's key: its type, its default, and its range as a comment.

    Args:
        name: the key.
        annotation: its type, as written in the schema.
        value: its default, which may be a call of pydantic's ``Field``; None: the key has none.
    """
    line = f"{name}: {annotation}"
    if value is None:
        return line
    node = ast.parse(value, mode="eval").body
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Field"):
        return f"{line} = {value}"
    settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg}
    factory = settings.get("default_factory", "")
    default = settings.get("default", _EMPTY.get(factory, f"{factory}()" if factory else ""))
    bounds = " and ".join(f"{word} {settings[key]}" for key, word in _BOUNDS.items() if key in settings)
    return line + (f" = {default}" if default else "") + (f"  # {bounds}" if bounds else "")
