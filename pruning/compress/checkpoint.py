"""Compress a checkpoint folder to a size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from leanstep.pruning.compress.compress import Size, menu_groups, menu_of, reach_of
from leanstep.pruning.compress.files import bytes_without, check_format, check_writable
from leanstep.pruning.compress.menu import MenuGroup
from leanstep.pruning.config import PruneConfig, read_config, read_fields, takes_fields
from leanstep.pruning.folder.files import DTYPES, Checkpoint, most_common_dtype, open_checkpoint
from leanstep.pruning.folder.loading import empty_model_of
from leanstep.pruning.folder.run import FolderRun, prune_checkpoint
from leanstep.pruning.folder.text import CalibrationText
from leanstep.pruning.planner import targets_of
from leanstep.pruning.result import PruneResult
from leanstep.pruning.score.targets import Group


@takes_fields(Size, FolderRun, PruneConfig)
def compress_checkpoint(
    source: str | Path,
    out: str | Path,
    data: CalibrationText | Any,
    config: PruneConfig | None = None,
    *,
    format: str = "gguf",
    **options: Any,
) -> PruneResult:
    """Compress a Hugging Face checkpoint to a size, as :func:`leanstep.pruning.compress` does, into a new folder.

    ``out`` gets ``model.gguf``, which llama.cpp and engines that read its files open, tokenizer included; or with the
    format ``dense`` a folder for transformers with the same values in the checkpoint's dtype; or with ``sparse``, whose
    levels are zeros with codes of 8 and 4 bits, a folder that :func:`leanstep.sparsity.load_sparse` opens. Besides, as
    from :func:`leanstep.pruning.prune_checkpoint`, ``sparsity.json`` with the format of each matrix, and
    ``report.html``.

    Args:
        source, out, data, config: as for :func:`leanstep.pruning.prune_checkpoint`.
        format: ``gguf``, ``sparse`` or ``dense``.
        **options: one of the fields of :class:`leanstep.pruning.Size`, whose ``size`` and ``bytes`` are of the file,
            header and tokenizer included; of :class:`leanstep.pruning.PruneConfig`, as for
            :func:`leanstep.pruning.compress`; and of :class:`leanstep.pruning.folder.run.FolderRun`.

    Raises:
        ImportError: without the packages of the extra ``gguf``.
        ValueError: as :func:`leanstep.pruning.prune_checkpoint`; for a size out of reach, and an architecture or a
            tokenizer that GGUF files do not hold. Nothing is written then.

    Notes:
        Memory and disk: as for :func:`leanstep.pruning.prune_checkpoint` with SparseGPT, and the bytes of the result.
    """
    size = read_fields(Size, options)
    settings = {name: options.pop(name) for name in list(options) if name in PruneConfig.__dataclass_fields__}
    config = read_config("compress_checkpoint", config or menu_of(format), settings)
    config = sized(open_checkpoint(source), config, size, format)
    return prune_checkpoint(source, out, data, config, format=format, **options)


def sized(checkpoint: Checkpoint, config: PruneConfig, size: Size, format: str) -> PruneConfig:
    """The settings with the bytes that the matrices of a checkpoint may have, so that the result has a size.

    Raises:
        InfeasibleBudget: for a size out of reach; the message gives the range in reach.
        ValueError: for a checkpoint that the format does not hold.
    """
    groups, others = _contents(checkpoint, config, format)
    if format == "dense" and size.bits_per_weight is None:
        raise ValueError(
            "a dense folder has the dense size, whatever its levels: give bits_per_weight (--bits-per-weight)"
        )
    return replace(config, budget=size.budget(groups, others, checkpoint.size))


def reach(checkpoint: Checkpoint, config: PruneConfig, format: str) -> str:
    """The sizes that a result can have, in words."""
    return reach_of(*_contents(checkpoint, config, format))


def _contents(checkpoint: Checkpoint, config: PruneConfig, format: str) -> tuple[list[Group], int]:
    """The matrices of a checkpoint, and the bytes of the result besides them. Refuses what the format does not hold."""
    check_format(format, config.pattern)
    check_writable(checkpoint, format)
    model = empty_model_of(checkpoint, DTYPES[most_common_dtype(checkpoint)])
    groups = menu_groups(targets_of(model, config, empty=True), config)
    levels = {group.targets[0].parameter: group.menu for group in groups if isinstance(group, MenuGroup)}
    return groups, bytes_without(checkpoint, levels, format)
