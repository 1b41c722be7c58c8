"""Open configurations, models and tokenizers of Hugging Face folders with transformers.

No code of a folder runs, every weight comes from its files, and all weights are finite; otherwise a ValueError of one
line says what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from leanstep._checkpoint import check_finite, check_folder, code_files, reason
from leanstep._files import one_line

# the files of a name on the hub that tell what the others are
_TELLING = ("config.json", "tokenizer_config.json", "model.safetensors.index.json")
_SHOWN = 3  # names of tensors in a message


def open_config(source: str | Path) -> Any:
    """Configuration in a folder, or of a model on the hub. Raises ValueError for one that cannot be opened."""
    from transformers import AutoConfig

    with _opening("configuration", source) as path:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def open_tokenizer(source: str | Path) -> Any:
    """Tokenizer in a folder, or by name from the hub. Raises ValueError for one that cannot be opened."""
    from transformers import AutoTokenizer

    with _opening("tokenizer", source) as path:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def open_model(
    source: str | Path, model_class: Any = None, *, dtype: torch.dtype | str = "auto", new_heads: Iterable[str] = ()
) -> nn.Module:
    """Load a model whose weights fit its configuration.

    Args:
        source: a folder, or the name of a model on the hub.
        model_class: a class of transformers; None: ``AutoModelForCausalLM``.
        dtype: of the weights; "auto": as stored.
        new_heads: see :func:`check_weights`.

    Raises:
        ValueError: as :func:`check_weights`, and for a weight with NaN or infinity.
    """
    new_heads = tuple(new_heads)
    check_weights(source, model_class, new_heads=new_heads)
    with _opening("model", source) as path, _quiet(reports=True):
        model = _class(model_class).from_pretrained(
            path, dtype=dtype, trust_remote_code=False, ignore_mismatched_sizes=bool(new_heads)
        )
    check_finite(model.state_dict().items(), source)
    return model


def check_weights(source: str | Path, model_class: Any = None, *, new_heads: Iterable[str] = ()) -> None:
    """Compare the tensors of a checkpoint with the model of its configuration. Reads and allocates no weight.

    Args:
        source, model_class: as for :func:`open_model`.
        new_heads: wildcards over modules whose weights are drawn anew where the checkpoint has none, or has them in
            another shape.

    Raises:
        ValueError: for a folder that cannot be opened or needs code of its own; for missing tensors, except tied ones;
            for tensors of another shape; for an entry of ``new_heads`` that selects no such tensor.
    """
    with _opening("model", source) as path, _quiet():
        _, info = _class(model_class).from_pretrained(
            path,
            dtype="auto",
            device_map="meta",
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    missing = sorted(map(str, info["missing_keys"]))
    mismatched = {str(row[0]): row[1:] for row in info["mismatched_keys"]}
    unused = set(new_heads)
    for name in [*missing, *mismatched]:
        unused -= {head for head in unused if _selects(head, name)}
    if unused:
        raise ValueError(f"new_heads: {', '.join(sorted(unused))} selects no tensor that {source} lacks")
    missing = [name for name in missing if not any(_selects(head, name) for head in new_heads)]
    mismatched = {name: row for name, row in mismatched.items() if not any(_selects(h, name) for h in new_heads)}
    if missing or mismatched:
        raise ValueError(_misfit(source, missing, mismatched, sorted(map(str, info["unexpected_keys"]))))


def _misfit(
    source: str | Path, missing: list[str], mismatched: Mapping[str, Iterable[Any]], unexpected: list[str]
) -> str:
    shapes = [f"{n} {' instead of '.join(str(tuple(shape)) for shape in row)}" for n, row in mismatched.items()]
    kinds = {"missing": missing, "of another shape": shapes, "unexpected": unexpected}
    listed = [
        f"{len(names)} {kind} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for kind, names in kinds.items()
        if names
    ]
    return one_line(f"the weights in {source} do not fit its config.json: {'; '.join(listed)}")


def _selects(head: str, name: str) -> bool:
    """Whether a wildcard selects a tensor's module or one around it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:length]), head) for length in range(1, len(parts) + 1))


def _class(model_class: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM if model_class is None else model_class


@contextmanager
def _opening(kind: str, source: str | Path) -> Iterator[str]:
    """Context manager: yields a checked path or name for transformers; any error becomes a ValueError of one line."""
    folder = Path(source).expanduser()
    try:
        if folder.is_dir():
            check_folder(folder)
        else:
            folder = _snapshot(str(source)) or folder
    except ValueError as error:
        raise ValueError(one_line(error)) from None
    try:
        yield str(folder) if Path(source).expanduser().is_dir() else str(source)
    except BaseException as error:
        # a panic in the Rust code of safetensors or tokenizers is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if "trust_remote_code" in str(error):
            files = ", ".join(code_files(folder)) or "its auto_map"
            raise ValueError(
                f"the {kind} in {source} needs code of its own ({one_line(files)}), which is never run here: expected "
                "a class that transformers has"
            ) from None
        raise ValueError(f"transformers could not open the {kind} in {source}: {reason(error)}") from error


def _snapshot(name: str) -> Path | None:
    """Fetch the files of a name on the hub that refer to others, and check them; None if there are none."""
    from transformers.utils import cached_file

    files = []
    for file in _TELLING:
        try:
            files.append(cached_file(name, file, _raise_exceptions_for_missing_entries=False))
        except Exception:  # transformers says it better when it opens the name
            return None
    folders = {Path(file).parent for file in files if file is not None}
    for folder in folders:
        check_folder(folder)
    return next(iter(folders), None)


@contextmanager
def _quiet(*, reports: bool = False) -> Iterator[None]:
    """Context manager: no bars of transformers, and no reports unless asked for."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    if not reports:
        logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
