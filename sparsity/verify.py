"""Checks tensor by tensor whether a model or checkpoint is N:M sparse."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from leanstep._checkpoint.files import TensorFile, load_pickled, read_json, reason, shards
from leanstep._files import one_line
from leanstep.sparsity.files import is_compressed, load_compressed
from leanstep.sparsity.inference.load import check_declared
from leanstep.sparsity.inference.reader import SparseFiles, is_sparse_file
from leanstep.sparsity.patterns import NM, match_patterns
from leanstep.sparsity.squash import plain_state_dict
from leanstep.sparsity.training.masks import group_dims, pattern_of, violations

# optional file of a checkpoint folder: {"NAME": {"pattern": "1:8", "dim": 1}}
PATTERNS_FILE = "sparsity.json"
# a matrix with fewer zeros counts as dense
_UNSTRUCTURED = 0.01
# the pattern of sparse tensor cores
_HARDWARE = NM(2, 4)
_INNER = ("final", "last/hf", "hf")


@dataclass(frozen=True)
class TensorReport:
    """The sparsity of one tensor.

    Attributes:
        name, shape, dtype: as stored.
        sparsity: fraction of zeros.
        pattern: the N:M that the tensor obeys, and not by chance, with M at most 128; or ``expected`` if it obeys that.
            None: dense or unstructured.
        dim: dimension along which the groups of ``pattern`` (or of ``expected``) lie.
        expected: the pattern that the tensor should have, if known.
        violations: number of groups of ``expected`` with more than N nonzeros.
        note: a remark for the reader.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    sparsity: float
    pattern: str | None
    dim: int | None
    expected: str | None = None
    violations: int = 0
    note: str = ""

    @property
    def ok(self) -> bool | None:
        """Whether the tensor obeys ``expected``; None without ``expected``."""
        return None if self.expected is None else self.violations == 0


@dataclass(frozen=True)
class Verification:
    """The result of :func:`verify`, tensor by tensor."""

    source: str
    tensors: tuple[TensorReport, ...]

    @property
    def ok(self) -> bool | None:
        """Whether every tensor with an expected pattern obeys it; None if there is no such tensor."""
        results = [report.ok for report in self.tensors if report.ok is not None]
        return all(results) if results else None

    def as_dict(self) -> dict[str, Any]:
        """The result as plain dicts, for JSON."""
        rows = [{**asdict(report), "ok": report.ok} for report in self.tensors]
        return {"source": self.source, "ok": self.ok, "tensors": rows}

    def __str__(self) -> str:
        header = ("TENSOR", "SHAPE", "SPARSITY", "N:M", "ALONG", "EXPECTED", "")
        rows = [header, *(_cells(report) for report in self.tensors)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        sparse = sum(report.pattern is not None for report in self.tensors)
        verdict = f"{sparse} of {len(self.tensors)} matrices are N:M sparse"
        unstructured = sum(r.pattern is None and r.sparsity >= _UNSTRUCTURED for r in self.tensors)
        if unstructured:
            verdict += f", {unstructured} unstructured"
        results = [report.ok for report in self.tensors if report.ok is not None]
        if results:
            verdict += f"; {sum(results)} of {len(results)} obey the expected pattern"
        return "\n".join([*lines, verdict])


def verify(
    source: str | Path | nn.Module | Mapping[str, Tensor],
    expected: Mapping[str, NM | str] | NM | str | None = None,
) -> Verification:
    """Report the N:M pattern of every matrix and convolution of a checkpoint. Changes nothing.

    Args:
        source: a safetensors file, plain or from :func:`export_compressed`; a file from ``torch.save``; a folder with
            such files (a Hugging Face model, a run); a model, whose masked weights are checked; or a state dict.
        expected: wildcards over layer names -> the pattern they should have, as for :func:`sparsify`; a single pattern
            applies to every matrix. None: the patterns in the folder's sparsity.json, if any.

    Returns:
        :class:`Verification`; print it for a table. sparsity.json names the dimension of the groups. Without it, this
        is 1 (inputs of (out, in) weights, in-channels), 0, or 2 of tensors with three dimensions (inputs of experts),
        whichever fits. A note warns of negative zeros in a 2:4 matrix: a reader that counts set bits finds more than
        two values in a group.

    Raises:
        ValueError: for a path without a checkpoint, a damaged or missing file, an index that names files elsewhere,
            or a rule that matches nothing.
    """
    where, tensors, recorded = _open(source)
    dims: dict[str, int] = {}
    matrices = {name: (t, note) for name, t, note in tensors if t.dim() > 1 and t.is_floating_point()}
    if not matrices:
        raise ValueError(f"verify: {where} holds no matrix of floating dtype")
    patterns: dict[str, NM] = {}
    if expected is not None:
        layers = {name.removesuffix(".weight"): name for name in matrices}
        patterns = {layers[layer]: pattern for layer, pattern in match_patterns(layers, expected).items()}
    elif recorded:
        missing = [name for name in recorded if name not in matrices]
        if missing:
            raise ValueError(f"verify: {where} has no tensor {missing[0]!r}, which its {PATTERNS_FILE} lists")
        patterns = {name: NM.parse(entry["pattern"]) for name, entry in recorded.items()}
        dims = {name: entry["dim"] for name, entry in recorded.items()}
        flat = next((name for name, dim in dims.items() if dim >= matrices[name][0].dim()), None)
        if flat is not None:
            raise ValueError(f"verify: {where}: {PATTERNS_FILE} has groups along dimension 2 of {flat!r}, a matrix")
    reports = []
    for name, matrix in matrices.items():
        try:
            reports.append(_report(name, *matrix, patterns.get(name), dims.get(name)))
        except RuntimeError as error:  # a dtype without arithmetic, or no memory
            kind = str(matrix[0].dtype).removeprefix("torch.")
            raise ValueError(
                f"verify: {where}: {one_line(name)} ({kind}) cannot be examined: {reason(error)}"
            ) from None
    return Verification(where, tuple(reports))


def _report(name: str, tensor: Tensor, note: str, expected: NM | None, dim: int | None) -> TensorReport:
    dims = group_dims(tensor) if dim is None else (dim,)
    patterns = [(pattern, d) for d in dims if (pattern := pattern_of(tensor, d)) is not None]
    pattern, along = min(patterns, key=lambda pair: pair[0].density, default=(None, None))
    violated = 0
    if expected is not None:
        counts = {d: violations(tensor, expected, d) for d in dims}
        along = next((d for d in dims if not counts[d]), dims[0])
        violated = counts[along]
        pattern = expected if pattern is None and not violated else pattern
    if pattern == _HARDWARE and (zeros := _negative_zeros(tensor)):
        warning = f"{zeros:,} negative zeros, which readers of 2:4 files may take for values; add 0.0 to the weight"
        note = "; ".join(filter(None, (note, warning)))
    return TensorReport(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        sparsity=int((tensor == 0).count_nonzero()) / tensor.numel() if tensor.numel() else 0.0,
        pattern=None if pattern is None else str(pattern),
        dim=along,
        expected=None if expected is None else str(expected),
        violations=violated,
        note=note,
    )


def _negative_zeros(tensor: Tensor) -> int:
    return int((tensor.detach().signbit() & (tensor == 0)).count_nonzero())


def _cells(report: TensorReport) -> tuple[str, ...]:
    verdict = {None: "", True: "yes", False: f"NO: {report.violations:,} groups have more"}[report.ok]
    return (
        report.name,
        "x".join(map(str, report.shape)),
        f"{report.sparsity:.4f}",
        report.pattern or ("dense" if report.sparsity < _UNSTRUCTURED else "unstructured"),
        "" if report.dim is None else f"dim {report.dim}",
        report.expected or "",
        "; ".join(filter(None, (verdict, report.note))),
    )


Tensors = Iterator[tuple[str, Tensor, str]]


def _open(source: Any) -> tuple[str, Tensors, dict[str, Any]]:
    """The source's name, its tensors with notes, and its recorded patterns."""
    if isinstance(source, nn.Module):
        return type(source).__name__, _noted(plain_state_dict(source)), {}
    if isinstance(source, Mapping):
        return "the state dict", _noted(source), {}
    path = Path(source).expanduser()
    if path.is_file():
        return str(path), _read_all([path.resolve()]), {}  # a link that the caller names is followed
    if not path.is_dir():
        raise ValueError(f"verify: {path} is not there; expected a checkpoint file or a folder with one")
    for folder in (path, *(path / inner for inner in _INNER)):
        for kind in ("*.safetensors", "*.bin", "*.pt", "*.pth"):
            files = sorted(folder.glob(kind))
            if files:
                _check_indexes(folder, kind)
                _check_config(folder, files)
                return str(folder), _read_all(files), _recorded_patterns(folder)
    raise ValueError(f"verify: {path} holds no checkpoint: no *.safetensors, *.bin or *.pt in it or in its final/")


def _check_indexes(folder: Path, kind: str) -> None:
    """Raise ValueError for an index that names a file elsewhere, or one that is missing."""
    for index in sorted(folder.glob(f"{kind}.index.json")):
        try:
            shards(index)
        except (ValueError, FileNotFoundError) as error:  # a link to nothing
            raise ValueError(f"verify: {one_line(error)}") from None


def _check_config(folder: Path, files: list[Path]) -> None:
    """Raise ValueError for a config.json beside sparse files with which transformers would not read them."""
    if (folder / "config.json").is_file() and any(map(is_sparse_file, files)):
        try:
            check_declared(folder, read_json(folder / "config.json"))
        except ValueError as error:
            raise ValueError(f"verify: {one_line(error)}") from None


def _recorded_patterns(folder: Path) -> dict[str, Any]:
    file = folder / PATTERNS_FILE
    if not os.path.lexists(file):
        return {}
    try:
        content = read_json(file)
        # a pruned model's file has more entries, and matrices without a pattern
        rows = {name: entry for name, entry in content.get("tensors", content).items() if set(entry) != {"sparsity"}}
        recorded = {name: {"pattern": str(NM.parse(row["pattern"])), "dim": row["dim"]} for name, row in rows.items()}
        if any(type(row["dim"]) is not int or row["dim"] not in (0, 1, 2) for row in recorded.values()):
            raise ValueError("expected dim 0, 1 or 2")
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:  # a link to nothing
        raise ValueError(f"verify: {file} is not a patterns file: {one_line(error)}") from None
    return recorded


def _read_all(paths: list[Path]) -> Tensors:
    try:
        # sparse files name weights of each other
        with SparseFiles([path for path in paths if is_sparse_file(path)]) as sparse:
            for path in paths:
                yield from _read(path, sparse)
    except ValueError as error:
        raise ValueError(f"verify: {error}") from None


def _read(path: Path, sparse: SparseFiles) -> Tensors:
    """Read the tensors of a file, one at a time if the format allows it."""
    if path.suffix != ".safetensors":
        content = load_pickled(path)
        state = content.get("state_dict", content.get("model", content)) if isinstance(content, Mapping) else {}
        yield from _noted(state if isinstance(state, Mapping) else {})
    elif is_compressed(path):
        yield from _noted(load_compressed(path))
    elif is_sparse_file(path):
        yield from (row for name, tensor in sparse.stored(path) for row in _noted({name: tensor}))
    else:
        with TensorFile(path) as file:
            for name in file.names:
                yield from _noted({name: file.tensor(name)})


def _noted(state: Mapping[str, Any]) -> Tensors:
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or not isinstance(name, str):
            continue
        module, parametrized, rest = name.partition(".parametrizations.")
        if parametrized and rest.endswith(".original"):
            plain = f"{module}.{rest.removesuffix('.original')}"
            yield plain, tensor, "dense weight of a training checkpoint, without its mask; squash before saving"
        else:
            yield name, tensor, ""
