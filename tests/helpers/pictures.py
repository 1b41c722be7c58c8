"""Pictures of reports for the documentation: what each shows, and the layout that its file says it has."""

import json
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from browser import Browser, Screen

WIDTH = 1040
KEYWORD = b"layout"
# what one sees of a page: the texts that templates write, where its boxes begin and how wide they are, its colours
_LAYOUT = """((heading, height) => {
    const top = e => e.getBoundingClientRect().top + scrollY;
    const first = [...document.querySelectorAll('h2')].find(e => e.textContent.trim() == heading);
    const start = first ? Math.round(top(first)) - 14 : 0;
    const isIn = e => top(e) >= start && top(e) < start + height;
    const shown = names => [...document.querySelectorAll(names)].filter(isIn);
    const boxes = shown('.tile, .card, figure').map(e => [e.tagName + '.' + e.className,
        Math.round(e.getBoundingClientRect().left), Math.round(e.getBoundingClientRect().width)].join(' '));
    return {start: start, texts: shown('.tile span, h2, h3, thead th').map(e => e.textContent.trim()).filter(t => t),
        boxes: [...new Set(boxes)].sort(),
        colours: ['backgroundColor', 'color'].map(name => getComputedStyle(document.body)[name])};
})(%r, %d)"""


class Picture(NamedTuple):
    """A picture of ``height`` pixels of a report.

    Attributes:
        page: the kind of the report: a file of real numbers, and a page that a test makes of made-up ones.
        height: in pixels.
        heading: where the picture begins; empty: at the top.
        scheme: of colours.
    """

    page: str
    height: int
    heading: str = ""
    scheme: str = "light"

    @property
    def screen(self) -> Screen:
        """What it is taken on."""
        return Screen(WIDTH, 800, scheme=self.scheme)


def layout(tab: Browser, page: Path, picture: Picture) -> dict[str, Any]:
    """Show a report as a picture does; return its layout, and the pixels above the picture as ``start``."""
    tab.open(page, picture.screen)
    return dict(tab.evaluate(_LAYOUT % (picture.heading, picture.height)))


def take(tab: Browser, page: Path, picture: Picture, out: Path) -> None:
    """Write a picture of a report; the layout stands inside the file."""
    shown = layout(tab, page, picture)
    text = json.dumps(shown, separators=(",", ":"), sort_keys=True)
    tab.screenshot(out, height=picture.height, top=shown["start"])
    content = out.read_bytes()
    # after the signature and the first chunk, IHDR
    out.write_bytes(content[:33] + _chunk(b"tEXt", KEYWORD + b"\0" + text.encode()) + content[33:])


def stored_layout(path: Path) -> dict[str, Any]:
    """The layout inside a picture."""
    chunk = next(data for kind, data in _chunks(path.read_bytes()) if kind == b"tEXt" and data.startswith(KEYWORD))
    return dict(json.loads(chunk.partition(b"\0")[2]))


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of a PNG in pixels, after a check of every chunk."""
    kind, data = next(_chunks(path.read_bytes()))
    assert kind == b"IHDR"
    return struct.unpack(">II", data[:8])


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _chunks(content: bytes) -> Any:
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    start = 8
    while start < len(content):
        (length,) = struct.unpack(">I", content[start : start + 4])
        kind, data = content[start + 4 : start + 8], content[start + 8 : start + 8 + length]
        assert zlib.crc32(kind + data) == struct.unpack(">I", content[start + 8 + length : start + 12 + length])[0]
        yield kind, data
        start += 12 + length
