"""Text on its way to the site: links that leave docs/, and docstrings. Standard library only."""

import ast
import posixpath
import re
from collections.abc import Mapping

# pages of the site that lie outside docs/
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}

_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc):`~?(?P<name>[^`]+)`")
_EMPTY = {"dict": "{}", "list": "[]", "tuple": "()"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_ARGUMENTS = re.compile(r"^(?P<indent> *)(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)+): (?P<text>.*)$")


def site_links(markdown: str, source: str, page: str, repository: str = "") -> str:
    """Rewrite the relative links of a file of the repository for its page on the site.

    Args:
        markdown: the text of the file.
        source: path of the file in the repository, such as "docs/code.md".
        page: path of its page on the site, such as "code.md".
        repository: URL of a file of the repository without its path; empty: a link to a file that is no page becomes
            its text.

    Returns:
        The text. Links between pages of the site stay relative; links with a scheme are left as they are.
    """

    def rewritten(match: re.Match[str]) -> str:
        text, target, anchor = match["text"], match["target"], match["anchor"] or ""
        if ":" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in ROOT_PAGES or path.startswith("docs/"):
            destination = ROOT_PAGES.get(path, path.removeprefix("docs/"))
            return f"[{text}]({posixpath.relpath(destination, posixpath.dirname(page) or '.')}{anchor})"
        return f"[{text}]({repository.rstrip('/')}/{path}{anchor})" if repository else text

    return _LINK.sub(rewritten, markdown)


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
