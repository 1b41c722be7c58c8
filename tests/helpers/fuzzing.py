"""Strategies and checks of tests/fuzz: damaged and hostile input is refused in one line, or read as what it says.

``guarded`` watches one example by an audit hook, which sees every file that Python opens to write, every process, every
unpickled name and every executed code object, also those of libraries. ``judged`` and ``told`` count what they saw, and
tests/fuzz/conftest.py prints the counts.
"""

import contextlib
import copy
import io
import json
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from leanstep.cli import main

# seconds of processor time, and of waiting (for a pipe, say), after which an example hangs
_MOST_WORK, _MOST_WAITING = 10.0, 120.0
# bytes that an example may take on top of what the process has
_MOST_MEMORY = 4 << 30


def fuzz(examples: int) -> settings:
    """Settings of a test: so many examples in the normal run, and in proportion in others (see tests/conftest.py)."""
    scale = settings.default.max_examples / 100
    return settings(max_examples=max(1, round(examples * scale)), suppress_health_check=list(HealthCheck))


# where commands keep tokenised text
CACHE = Path(os.environ["LEANSTEP_TEST_CACHE"])


# ---- strategies

WORDS = (
    "", " ", ".", "..", "../outside/file", "/etc/hostname", "a\nb", "\x1b[31m", "\x00", "\ud800", "${", "${oc.env:X}",
    "__class__", "null", "NaN", "1e999", "-1", "9" * 400, "x" * 5000, "auto", "cpu", "meta", "float64", "bogus-name",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 3, 7, 255, 256, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.5, 1e-320, 1e308)
NUMBERS += (float("nan"), float("inf"), -float("inf"))
_LEAVES = st.sampled_from((None, True, False, *NUMBERS, *WORDS)) | st.integers() | st.floats() | st.text(max_size=8)
VALUES = _LEAVES | st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
_INSERTS = (
    *(b"\x00", b"\xff", b'"', b"{", b"}", b"[", b",", b":", b"\n", b"#", b"'", b"&a ", b"*a", b"!!", b"${", b"9" * 30),
    *(b"-1", b"1e999", b"\\ud800", b"NaN", b"null", b"../", b"[" * 3000, b"\xed\xa0\x80", b"\xef\xbb\xbf"),
)


def _paths(value: Any, above: tuple = ()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, inner in items for path in ((*above, key), *_paths(inner, (*above, key)))]


@st.composite
def edits(draw: Any, content: Any, values: st.SearchStrategy = VALUES) -> Any:
    """A copy of nested content with one to three entries replaced, removed, renamed, added or doubled."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        paths = _paths(content)
        if not paths:
            break
        *above, key = draw(st.sampled_from(paths))
        owner = content
        for step in above:
            owner = owner[step]
        action = draw(st.sampled_from(("replace", "replace", "replace", "remove", "rename", "add", "double")))
        if action == "replace":
            owner[key] = draw(values)
        elif action == "remove":
            del owner[key]
        elif isinstance(owner, list):
            owner.insert(key, draw(values) if action == "add" else copy.deepcopy(owner[key]))
        elif action == "add":
            owner[draw(st.sampled_from(WORDS) | st.text(max_size=8))] = draw(values)
        else:
            value = owner[key] if action == "double" else owner.pop(key)
            owner[draw(st.sampled_from([path[-1] for path in paths if isinstance(path[-1], str)] or ["x"]))] = value
    return content


@st.composite
def damaged(draw: Any, data: bytes) -> bytes:
    """A file with one to three bits flipped, bytes inserted, removed, doubled or cut off, most of them in its head."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        size = max(1, len(changed))
        place = draw(st.integers(0, min(size, 4000) - 1) | st.integers(0, size - 1))
        action = draw(st.sampled_from(("flip", "flip", "insert", "insert", "remove", "double", "cut")))
        if action == "flip" and changed:
            changed[place] ^= 1 << draw(st.integers(0, 7))
        elif action == "insert":
            changed[place:place] = draw(st.sampled_from(_INSERTS) | st.binary(max_size=6))
        elif action == "remove":
            del changed[place : place + draw(st.integers(1, 40))]
        elif action == "double":
            changed[place:place] = changed[max(0, place - 40) : place]
        elif action == "cut":
            del changed[place:]
    return bytes(changed)


def _nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


_JSON_VALUES = VALUES | st.sampled_from((70, 400)).map(_nested)


@st.composite
def _named_twice(draw: Any, content: Any) -> bytes:
    """JSON in which an object has a name twice, with two values."""
    text = json.dumps(content)
    places = [at for at, sign in enumerate(text) if sign == '"' and text[at - 1] in "{ " and text[at - 2 : at] != ": "]
    at = draw(st.sampled_from(places))
    name = json.JSONDecoder().raw_decode(text[at:])[0]
    return (text[:at] + f"{json.dumps(name)}: {json.dumps(draw(VALUES))}, " + text[at:]).encode()


def json_files(data: bytes, values: st.SearchStrategy = _JSON_VALUES) -> st.SearchStrategy[bytes]:
    """JSON with other bytes, or well-formed with other values, or with a name twice."""
    content = json.loads(data)
    edited = edits(content, values).map(lambda edited: json.dumps(edited).encode())
    return damaged(data) | edited | (_named_twice(content) if content else edited)


def safetensors_files(data: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file with other bytes, or with another header before the same tensors."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]

    def joined(content: Any) -> bytes:
        text = json.dumps(content).encode()
        return struct.pack("<Q", len(text)) + text + body

    return damaged(data) | edits(header).map(joined)


# what may stand in place of a file
ENTRIES = ("link outside", "link to itself", "dangling link", "link to a device", "pipe", "folder", "nothing")


def plant(path: Path, entry: str, outside: Path) -> None:
    """Put something else in place of a file: an entry of :data:`ENTRIES`. The link outside leads to a copy of it."""
    if entry == "link outside":
        shutil.copyfile(path, outside)
    path.unlink()
    targets = {"link outside": outside, "link to itself": path, "dangling link": path.with_name("nowhere")}
    if entry == "pipe":
        os.mkfifo(path)
    elif entry == "folder":
        path.mkdir()
    elif entry != "nothing":
        path.symlink_to(targets.get(entry, Path("/dev/zero")))


# ---- checks of one example


class Hang(BaseException):
    """An example takes too long. No handler of the code under test catches it."""


class _Watch:
    """The folders that may be written, and what went against the rules."""

    def __init__(self, folders: tuple[Path, ...]) -> None:
        self.folders = tuple(os.path.realpath(folder) for folder in folders)
        self.offences: list[str] = []

    def may_write(self, path: object, folder: int | None = None, *, follow: bool = True) -> bool:
        """Whether ``path``, relative to the folder of a descriptor if there is one, may be written.

        ``follow``: whether the call follows a link as the last name.
        """
        if not isinstance(path, (str, bytes, os.PathLike)):  # a descriptor, opened before under its name
            return True
        base = "" if folder in (None, -1) else os.readlink(f"/proc/self/fd/{folder}")
        text = os.path.join(base, os.fsdecode(path))
        above, last = os.path.split(text)
        text = os.path.realpath(text) if follow else os.path.join(os.path.realpath(above), last)
        return (
            text == os.devnull
            or "__pycache__" in text
            or any(text == folder or text.startswith(folder + os.sep) for folder in self.folders)
        )


_PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty")
# arguments that are paths -> those that are descriptors of their folders
_CHANGES: dict[str, dict[int, int | None]] = {
    "os.remove": {0: 1}, "os.rename": {0: 2, 1: 3}, "os.mkdir": {0: 2}, "os.rmdir": {0: 1}, "os.chmod": {0: 2},
    "os.truncate": {0: None},
}  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_watches: list[_Watch] = []


def _audit(event: str, arguments: tuple) -> None:
    if not _watches:
        return
    watch = _watches[-1]
    if event in _PROCESSES or event in ("pickle.find_class", "socket.connect"):
        watch.offences.append(f"{event} {arguments[:2]!r}")
    elif event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
        if not watch.may_write(arguments[0]):
            watch.offences.append(f"open {arguments[0]!r} to write")
    elif event in _CHANGES:
        written = ((arguments[at], None if fd is None else arguments[fd]) for at, fd in _CHANGES[event].items())
        follow = event in ("os.chmod", "os.truncate")
        if not all(watch.may_write(path, folder, follow=follow) for path, folder in written):
            watch.offences.append(f"{event} {arguments!r}")
    elif event in ("os.symlink", "os.link") and not watch.may_write(arguments[1], follow=False):
        watch.offences.append(f"{event} {arguments!r}")
    elif event == "exec":
        file = getattr(arguments[0], "co_filename", "")
        if any(file.startswith(folder) for folder in watch.folders):
            watch.offences.append(f"exec of code of {file}")


sys.addaudithook(_audit)


def listing(folder: Path) -> list[tuple]:
    """Every entry below a folder, with what a write changes."""
    facts = ((path, path.lstat()) for path in sorted(folder.rglob("*")))
    return [(str(path), stat.st_mode, stat.st_size, stat.st_mtime_ns) for path, stat in facts]


@contextlib.contextmanager
def guarded(*folders: Path, outside: Path | None = None) -> Iterator[None]:
    """Fail if the block runs code or a process, writes outside ``folders``, changes ``outside``, or takes too long.

    The block gets a MemoryError when it takes gigabytes.

    Libraries that write in other languages are seen by the listing of ``outside`` alone.
    """

    def hang(number: int, frame: object) -> None:
        raise Hang(f"an example took more than {_MOST_WORK:g} s of processor time or {_MOST_WAITING:g} s")

    before = listing(outside) if outside else []
    handlers = [signal.signal(number, hang) for number in (signal.SIGPROF, signal.SIGALRM)]
    watch = _Watch(folders)
    _watches.append(watch)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _MOST_MEMORY, limits[1]))
    signal.setitimer(signal.ITIMER_PROF, _MOST_WORK)
    signal.setitimer(signal.ITIMER_REAL, _MOST_WAITING)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        _watches.pop()
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), handlers, strict=True):
            signal.signal(number, handler)
    assert not watch.offences, watch.offences
    assert not outside or listing(outside) == before


# parser -> inputs by outcome: "refused", "same" as the undamaged input, or "other", a difference that its test allows
COUNTS: defaultdict[str, Counter[str]] = defaultdict(Counter)


def count_table() -> str:
    """The inputs of each parser so far, by outcome."""
    rows = [("parser", "inputs", "answered by an error", "read as before", "read otherwise, as its test allows")]
    rows += [
        (name, *(f"{number:,}" for number in (counts.total(), counts["refused"], counts["same"], counts["other"])))
        for name, counts in sorted(COUNTS.items())
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def said(error: BaseException) -> str:
    """The message of a refusal, checked to be one printable line that gives no advice to run code."""
    text = str(error)
    assert text and text.isprintable(), f"{type(error).__name__}: {text!r}"
    assert "weights_only" not in text and "trust_remote_code" not in text, text
    return text


def same_as(expected: Any) -> Callable[[Any], bool]:
    """For :func:`judged`: what was read must equal what the undamaged input says."""

    def right(value: Any) -> bool:
        assert value == expected
        return True

    return right


def judged(
    parser: str,
    read: Callable[[], Any],
    right: Callable[[Any], bool],
    *folders: Path,
    outside: Path | None = None,
    types: tuple[type[Exception], ...] = (ValueError, OSError),
) -> bool:
    """Call a reader on changed input, watched by :func:`guarded`; returns whether it read it.

    It refuses by one of the documented types in one line, or ``right`` judges what it read: True if that says the same
    as the undamaged input, False for a difference that the test allows. ``right`` asserts that it does.
    """
    try:
        with guarded(*folders, outside=outside), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = read()
    except types as error:
        said(error)
        COUNTS[parser]["refused"] += 1
        return False
    COUNTS[parser]["same" if right(value) else "other"] += 1
    return True


def told(
    parser: str,
    *arguments: object,
    right: Callable[[str], bool],
    folders: tuple[Path, ...] = (),
    outside: Path | None = None,
    failures: tuple[int, ...] = (2,),
) -> bool:
    """Run a command on changed input: one line and a documented exit code, or ``right`` judges its output.

    Returns whether the command succeeded.
    """
    with guarded(*folders, outside=outside), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code, out, error = command_line(*map(str, arguments))
    if code == 0:
        COUNTS[parser]["same" if right(out) else "other"] += 1
        return True
    assert code in failures, (code, out, error)
    last = error.strip().splitlines()[-1:] or [""]
    assert last[0].isprintable() and last[0].strip(), (code, error)
    COUNTS[parser]["refused"] += 1
    return False


def command_line(*arguments: str) -> tuple[int, str, str]:
    """Run a command in this process; returns its exit code, standard output and standard error."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            code = main(arguments)
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 1
    assert "Traceback" not in out.getvalue() + error.getvalue(), error.getvalue()
    return code, out.getvalue(), error.getvalue()


def write(path: Path, content: bytes) -> None:
    """Replace a file, so that maps of the old one stay whole."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)


@contextlib.contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    """Context manager: a file has another content."""
    whole = path.read_bytes()
    write(path, content)
    try:
        yield
    finally:
        write(path, whole)
