"""Messages in the source: long texts are broken where a line is full, and nowhere else."""

import re

from layering import ROOT, package_files

# a line that is one short piece of a text, between two lines of the same text
_CRUMB = re.compile(r'^\s*f?"[^"]*"\n(?P<crumb>\s*f?"[^"{}\\]{1,20} ")\n\s*f?"[^"]', re.MULTILINE)


def crumbs(source: str) -> list[str]:
    """The short pieces that a text is needlessly broken into."""
    return [match["crumb"].strip() for match in _CRUMB.finditer(source)]


def test_no_message_is_broken_into_crumbs():
    found = [
        f"{path.relative_to(ROOT)}: {crumb}" for path in package_files() for crumb in crumbs(path.read_text("utf-8"))
    ]
    assert not found, "\n".join(found)


def test_a_crumb_is_found_and_a_whole_text_is_not():
    assert crumbs('x = (\n    f"{a} cannot be; name a "\n    f"folder on "\n    "another disk"\n)\n') == [
        'f"folder on "'
    ]
    assert (
        crumbs('x = (\n    f"{a} cannot be; name a folder "\n    "on another disk, or make room on this one "\n)\n')
        == []
    )
