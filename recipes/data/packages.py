"""Fetch packages by pip and apt, and read the files in them without unpacking."""

import gzip
import hashlib
import io
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from leanstep._files import partial_folder

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
