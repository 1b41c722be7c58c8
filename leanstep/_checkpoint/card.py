"""Model cards: README.md in a folder that a command wrote, so that ``hf upload`` is all that is left to do."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from leanstep._checkpoint.files import checked_file
from leanstep._files import model_name, one_line, write_text

CARD = "README.md"
_MARK = "<!-- Written by leanstep, and replaced with the model. Without this line, the card stays as it is. -->"
_COMMANDS = {"train", "prune", "compress", "export"}
_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_LICENCE = ("license", "license_name", "license_link")
# the end of a class of transformers -> the hub's name of its task
_TASKS = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
}
_LEGAL = tuple(f"{name}{end}" for name in ("LICENSE", "LICENCE", "NOTICE") for end in ("", ".txt", ".md"))
_LONGEST = 2**20


def write_card(
    folder: Path,
    title: str,
    facts: Mapping[str, str],
    *,
    base: str | None = None,
    relation: str = "finetune",
    tags: Sequence[str] = (),
    replaces: Path | None = None,
) -> None:
    """Write the card of the model in a folder, by huggingface_hub's classes, and copy the base's licence.

    Needs no network.

    Args:
        folder: a complete model; its files say library and task. A card in it that somebody wrote is left.
        facts: rows of the table.
        base: the model that it was made from: a folder, or a name on the hub. Licence and hub name come from its card.
        relation: ``base_model_relation`` of the hub: finetune, adapter, quantized or merge.
        replaces: the folder that ``folder`` will replace, whose card is taken over if somebody wrote it.
    """
    if base is not None:
        _copy_licence(base, folder)
    for old in filter(None, (replaces, folder)):
        if (old / CARD).is_file() and _MARK not in _text(old / CARD):
            if old != folder:
                shutil.copyfile(checked_file(old / CARD), folder / CARD)
            return
    from huggingface_hub import ModelCard, ModelCardData

    fields = _base_fields(base, relation, folder)
    data = ModelCardData(**fields, **_kind(folder), tags=["leanstep", *tags])
    name = fields.get("base_model") or (model_name(base) if base else None)
    rows = {**({"Base model": name} if name else {}), **facts}
    table = "\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items())
    parts = [f"---\n{data.to_yaml()}\n---", _MARK, f"# {_cell(title)}", f"| | |\n|---|---|\n{table}"]
    if command := _command():
        parts.append(f"Made by\n\n```bash\n{command}\n```")
    write_text(folder / CARD, str(ModelCard("\n\n".join(parts) + "\n")))


def _base_fields(base: str | None, relation: str, folder: Path) -> dict[str, Any]:
    """Name on the hub and licence of a base, as far as its folder or the hub's cache says them."""
    if base is None:
        return {}
    from huggingface_hub import try_to_load_from_cache

    path = Path(base).expanduser()
    if path.is_dir():
        source: Any = path / CARD
        cached = next(filter(None, map(_HUB_CACHE.fullmatch, path.resolve().parts)), None)
        name = "/".join(cached.groups()) if cached else None
    else:
        name = base if _HUB_NAME.fullmatch(base) else None
        source = try_to_load_from_cache(name, CARD) if name else None
    known = _metadata(Path(source)) if isinstance(source, str | Path) else {}
    name = name or known.get("base_model")  # of a folder of ours
    fields = {key: known[key] for key in _LICENCE if key in known}
    link = fields.get("license_link", "")
    if link and "://" not in link and not (folder / Path(link).name).is_file():
        del fields["license_link"]
    return fields | ({"base_model": name, "base_model_relation": relation} if name else {})


def _copy_licence(base: str, folder: Path) -> None:
    """Copy the texts of licence and notice of a base to its descendant, which must carry them; those there stay."""
    from huggingface_hub import try_to_load_from_cache

    path = Path(base).expanduser()
    for name in _LEGAL:
        cached = None if path.is_dir() or not _HUB_NAME.fullmatch(base) else try_to_load_from_cache(base, name)
        source = Path(cached) if isinstance(cached, str) else path / name
        if source.is_file() and not (folder / name).exists() and (text := _text(source)):
            write_text(folder / name, text)


def _metadata(path: Path) -> dict[str, str]:
    """The texts among the metadata of a card; of a missing or damaged one none."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        values = (metadata_load(path) or {}) if checked_file(path).stat().st_size <= _LONGEST else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return {key: value for key, value in values.items() if isinstance(value, str)}


def _text(path: Path) -> str:
    try:
        with checked_file(path).open(encoding="utf-8", errors="replace") as file:
            return file.read(_LONGEST)
    except (OSError, ValueError):
        return ""


def _kind(folder: Path) -> dict[str, Any]:
    """Library and task by the files of a folder."""
    if (folder / "adapter_config.json").is_file():
        return {"library_name": "peft", "pipeline_tag": "text-generation"}
    if any(folder.glob("*.gguf")):
        return {"library_name": "gguf", "pipeline_tag": "text-generation"}
    if (folder / "modules.json").is_file():
        return {"library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity"}
    names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    task = next((task for end, task in _TASKS.items() if str(names[0]).endswith(end)), None)
    return {"library_name": "transformers"} | ({"pipeline_tag": task} if task else {})


def _command() -> str | None:
    """The command line of ``leanstep`` that runs in this process; None in another program, also one named train.py."""
    for index, (before, argument) in enumerate(pairwise(sys.orig_argv)):
        module, _, name = argument.rpartition(".")
        if name in _COMMANDS and (module.startswith("leanstep.") or (not module and Path(before).name == "leanstep")):
            return shlex.join(["leanstep", name, *sys.orig_argv[index + 2 :]])
    return None


def _cell(text: str) -> str:
    return one_line(text).replace("|", "\\|")
