"""Whether the tensors of a model or checkpoint really are N:M sparse, one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from leanstep.sparsity.compressed import is_compressed, load_compressed
from leanstep.sparsity.masks import pattern_of, violations
from leanstep.sparsity.patterns import NM, match_patterns
from leanstep.sparsity.squash import plain_state_dict

# what a checkpoint folder may say of itself: {"NAME": {"pattern": "1:8", "dim": 1}}
PATTERNS_FILE = "sparsity.json"
# from this sparsity on zeros are not those that a dense matrix may have by itself
_SOME = 0.01
_INNER = ("final", "last/hf", "hf")


@dataclass(frozen=True)
class TensorReport:
    """What one tensor is.

    Attributes:
        name, shape, dtype: as stored.
        sparsity: fraction of entries that are zero.
        pattern: the N:M that it obeys and not by chance, M at most 128, or ``expected`` where it obeys that; None: it
            is dense, or its zeros lie anywhere.
        dim: dimension along which the groups of ``pattern`` (or of ``expected``) lie.
        expected: the pattern it should have, if one was asked for.
        violations: groups of ``expected`` that have more than N nonzeros.
        note: what else a reader should know.
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
        """Whether it is what it should be; None where nothing was expected."""
        return None if self.expected is None else self.violations == 0


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found, tensor by tensor."""

    source: str
    tensors: tuple[TensorReport, ...]

    @property
    def ok(self) -> bool | None:
        """Whether every tensor that should be N:M is; None where nothing was expected."""
        judged = [report.ok for report in self.tensors if report.ok is not None]
        return all(judged) if judged else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [{**asdict(report), "ok": report.ok} for report in self.tensors]
        return {"source": self.source, "ok": self.ok, "tensors": rows}

    def __str__(self) -> str:
        header = ("TENSOR", "SHAPE", "SPARSITY", "N:M", "ALONG", "EXPECTED", "")
        rows = [header, *(_cells(report) for report in self.tensors)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        sparse = sum(report.pattern is not None for report in self.tensors)
        verdict = f"{sparse} of {len(self.tensors)} matrices are N:M sparse"
        loose = [report.sparsity for report in self.tensors if report.pattern is None and report.sparsity >= _SOME]
        if loose:
            verdict += f", {len(loose)} unstructured"
        wrong = [report.name for report in self.tensors if report.ok is False]
        if self.ok is not None:
            expected = sum(report.ok is not None for report in self.tensors)
            verdict += f"; {expected - len(wrong)} of the {expected} that should be are"
        return "\n".join([*lines, verdict])


def verify(
    source: str | Path | nn.Module | Mapping[str, Tensor],
    expected: Mapping[str, NM | str] | NM | str | None = None,
    *,
    dim: int | None = None,
) -> Verification:
    """State for every matrix and convolution of a checkpoint whether, and how, it is N:M sparse. Nothing is changed.

    Args:
        source: a safetensors file, plain or of :func:`export_compressed`; a file of ``torch.save``; a folder with such
            files (a Hugging Face model, a run); a model, which is judged by what it computes with; or a state dict.
        expected: wildcards over layer names -> the pattern they should have, as for :func:`sparsify`; one pattern alone
            is for every matrix. None: what a folder's sparsity.json says, if it is there.
        dim: dimension along which groups lie. None: 1 (inputs of (out, in) weights, in-channels) or 0, whichever fits.

    Returns:
        :class:`Verification`; print it for a table.

    Raises:
        ValueError: for a path that holds no checkpoint, a damaged file, or a rule that matches nothing.
    """
    where, tensors, said = _open(source)
    dims: dict[str, int] = {}
    judged = {name: (tensor, note) for name, tensor, note in tensors if tensor.dim() > 1 and tensor.is_floating_point()}
    if not judged:
        raise ValueError(f"verify: {where} holds no matrix of floating dtype")
    wanted: dict[str, NM] = {}
    if expected is not None:
        layers = {name.removesuffix(".weight"): name for name in judged}
        wanted = {layers[layer]: pattern for layer, pattern in match_patterns(layers, expected).items()}
    elif said:
        missing = [name for name in said if name not in judged]
        if missing:
            raise ValueError(f"verify: {where} has no tensor {missing[0]!r}, which its {PATTERNS_FILE} speaks of")
        wanted = {name: NM.parse(entry["pattern"]) for name, entry in said.items()}
        dims = {name: entry["dim"] for name, entry in said.items()}
    reports = [
        _judge(name, tensor, note, wanted.get(name), dims.get(name, dim)) for name, (tensor, note) in judged.items()
    ]
    return Verification(where, tuple(reports))


def _judge(name: str, tensor: Tensor, note: str, expected: NM | None, dim: int | None) -> TensorReport:
    dims = (1, 0) if dim is None else (dim,)
    found = [(pattern, d) for d in dims if (pattern := pattern_of(tensor, d)) is not None]
    pattern, along = min(found, key=lambda pair: pair[0].density, default=(None, None))
    broken = 0
    if expected is not None:
        counts = {d: violations(tensor, expected, d) for d in dims}
        along = next((d for d in dims if not counts[d]), dims[0])
        broken = counts[along]
        pattern = expected if pattern is None and not broken else pattern
    return TensorReport(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        sparsity=float((tensor == 0).double().mean()) if tensor.numel() else 0.0,
        pattern=None if pattern is None else str(pattern),
        dim=along,
        expected=None if expected is None else str(expected),
        violations=broken,
        note=note,
    )


def _cells(report: TensorReport) -> tuple[str, ...]:
    verdict = {None: "", True: "yes", False: f"NO: {report.violations:,} groups have more"}[report.ok]
    return (
        report.name,
        "x".join(map(str, report.shape)),
        f"{report.sparsity:.4f}",
        report.pattern or ("dense" if report.sparsity < _SOME else "unstructured"),
        "" if report.dim is None else f"dim {report.dim}",
        report.expected or "",
        "; ".join(part for part in (verdict, report.note) if part),
    )


Tensors = Iterator[tuple[str, Tensor, str]]


def _open(source: Any) -> tuple[str, Tensors, dict[str, Any]]:
    """Where the tensors are from, the tensors with notes, and what the source says its patterns are."""
    if isinstance(source, nn.Module):
        return type(source).__name__, _noted(plain_state_dict(source)), {}
    if isinstance(source, Mapping):
        return "the state dict", _noted(source), {}
    path = Path(source).expanduser()
    if path.is_file():
        return str(path), _read(path), {}
    if not path.is_dir():
        raise ValueError(f"verify: {path} is not there; expected a checkpoint file or a folder with one")
    for folder in (path, *(path / inner for inner in _INNER)):
        for kind in ("*.safetensors", "*.bin", "*.pt", "*.pth"):
            files = sorted(folder.glob(kind))
            if files:
                return str(folder), (row for file in files for row in _read(file)), _said(folder)
    raise ValueError(f"verify: {path} holds no checkpoint: no *.safetensors, *.bin or *.pt in it or in its final/")


def _said(folder: Path) -> dict[str, Any]:
    file = folder / PATTERNS_FILE
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        # of a pruned model the file says more, and not every matrix has a pattern
        rows = {name: entry for name, entry in content.get("tensors", content).items() if set(entry) != {"sparsity"}}
        return {str(name): {"pattern": entry["pattern"], "dim": int(entry["dim"])} for name, entry in rows.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"verify: {file} cannot be understood: {error}") from None


def _read(path: Path) -> Tensors:
    """Tensors of a file, one at a time where the format allows it."""
    if path.suffix == ".safetensors":
        if is_compressed(path):
            yield from _noted(load_compressed(path))
            return
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    yield from _noted({name: file.get_tensor(name)})
        except SafetensorError as error:
            raise ValueError(f"verify: {path} cannot be read ({error}): it is damaged or no safetensors file") from None
        return
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file
        why = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(
            f"verify: {path} cannot be read ({why}): it is damaged, or neither a safetensors file nor one of torch.save"
        ) from error
    state = content.get("state_dict", content.get("model", content)) if isinstance(content, Mapping) else {}
    yield from _noted({name: value for name, value in state.items() if isinstance(value, Tensor)})


def _noted(state: Mapping[str, Any]) -> Tensors:
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue
        module, parametrized, rest = name.partition(".parametrizations.")
        if parametrized and rest.endswith(".original"):
            plain = f"{module}.{rest.removesuffix('.original')}"
            yield plain, tensor, "dense weight of a training checkpoint, without its mask; squash before saving"
        else:
            yield name, tensor, ""
