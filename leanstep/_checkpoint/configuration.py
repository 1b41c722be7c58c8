"""Check the configurations of a checkpoint folder that somebody else wrote, before a library acts on them.

A library runs the code, fetches the kernels, builds the layers and opens the files that a configuration names.
"""

import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from leanstep._checkpoint.files import TEMPLATES, checked_file, files_in, index_files, plain_name, read_json

# files whose values transformers hands to classes and functions; it also reads config.VERSION.json and the like
_CONFIGURATION = re.compile(
    r"config\.(.*\.)?json|special_tokens_map\.json"
    r"|(tokenizer|processor|preprocessor|video_preprocessor|audio_tokenizer|generation)_config\.json"
)
_TOKENIZER = re.compile(r".*tokenizer\.(.*\.)?json")
_VERSIONS = ("configuration_files", "fast_tokenizer_files")  # keys that list such files
_MOST_LAYERS = 1000  # of a configuration; each is a module to build
_MOST_EXPERTS = 1_000_000  # in all layers; each may be a module
# keys of such numbers, and not of sizes such as shared_expert_intermediate_size
_COUNTS = {"layer": re.compile(r"(^|_)layers?$"), "expert": re.compile(r"(^|_)experts?(_num)?$")}


def check_folder(folder: Path, *, tokenizer: bool = False) -> None:
    """Check a checkpoint folder before a library reads it, with the folders in it that have configurations.

    Args:
        tokenizer: also check the values of tokenizer.json, which may be large.

    Raises:
        ValueError: as :func:`~leanstep._checkpoint.files.checked_file` for any of its files; for an index that names
            files elsewhere; for a configuration that names anything outside of the folder, weights elsewhere, or code
            to fetch and run, or has more than 1,000 layers, or 1,000,000 experts in all of them; for JSON that cannot
            be read.
    """
    _check_files(folder, folder, tokenizer)
    for inner in sorted(folder.iterdir()):
        if _has_configuration(inner):  # tokenizers of several parts, as RAG's, open folders in theirs
            if not inner.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{inner} is a link to a folder outside, with a configuration; copy it there")
            _check_files(inner, folder, tokenizer)
    templates = folder / TEMPLATES
    if templates.is_symlink():
        raise ValueError(f"{templates} is a link; expected a folder inside the checkpoint")
    if templates.is_dir():
        files_in(templates)


def _has_configuration(folder: Path) -> bool:
    try:
        return folder.is_dir() and any(map(_CONFIGURATION.fullmatch, os.listdir(folder)))
    except OSError:  # nobody may list it
        return False


def _check_files(folder: Path, root: Path, tokenizer: bool) -> None:
    for file in files_in(folder):
        if file.name.endswith((".safetensors.index.json", ".bin.index.json")):
            index_files(file)
        elif _TOKENIZER.fullmatch(file.name):
            if tokenizer:
                _check_paths(read_json(file), file, root)
        elif _CONFIGURATION.fullmatch(file.name):
            content = read_json(file)
            _check_names(content, file)
            _check_counts(content, file)
            _check_paths(content, file, root)


def _check_names(content: Mapping[str, Any], file: Path) -> None:
    """Check the keys of a configuration by which transformers opens other files, or fetches kernels from the hub."""
    for key in ("transformers_weights", *_VERSIONS):
        for name in _listed(content.get(key)):
            plain_name(name, f"{file}: {key}")
    for key, value in _entries(content):
        if key.endswith("_implementation") and any("/" in str(name) for name in _listed(value)):
            raise ValueError(f"{file}: {key} names code to fetch and run ({value!r}), which is never run here")
    if file.name == "special_tokens_map.json":
        for key, value in content.items():
            # in place of a path, Python takes a number for an open file, such as the standard input
            if isinstance(value, (int, float)):
                raise ValueError(f"{file}: {key} is {value}, expected a token")


def _check_paths(content: Mapping[str, Any], file: Path, root: Path) -> None:
    """Refuse every text that names something outside of the folder, whatever its key: classes open what they get."""
    # the lists of tokenizer.json are pieces and merges by the hundred thousand, and "/" may be a token
    is_tokenizer = _TOKENIZER.fullmatch(file.name) is not None
    for key, text in _texts(content, lists=not is_tokenizer):
        outside = _named_outside(text, file.parent, root)
        may_be_folder = is_tokenizer or key.endswith("name_or_path")  # of the model from which this one was made
        if outside is not None and not (may_be_folder and outside.is_dir()):
            raise ValueError(
                f"{file}: {key} names {outside}, which is outside of the folder, and a library may open it: copy it "
                "into the folder, or take the key away; if it is no path, rename what has that name"
            )


def _texts(content: Any, *, lists: bool) -> Iterator[tuple[str, str]]:
    """Every (key, text) of nested JSON that can be an argument: keys such as "0" are of labels and added tokens."""
    waiting: list[tuple[str, Any]] = [("", content)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(name, one) for name, one in value.items() if name.isidentifier()]
        elif isinstance(value, list):
            waiting += [(key, one) for one in value if lists or isinstance(one, dict)]
        elif isinstance(value, str):
            yield key, value


def _named_outside(text: str, folder: Path, root: Path) -> Path | None:
    """What a text names outside of ``root``, seen from ``folder`` in it, ``root`` or the working folder, or None.

    Folders count only by an absolute path or ``..``: "gpt2" is a kind of model, also beside a folder of that name.

    Raises:
        ValueError: as :func:`~leanstep._checkpoint.files.checked_file` for a file inside.
    """
    name = Path(os.path.expanduser(text))
    for path in (folder / name, root / name, name):
        try:
            mode, parent = path.stat().st_mode, path.parent.resolve()
        except (OSError, ValueError):  # no such file, or text that can be no name
            continue
        is_folder = stat.S_ISDIR(mode)
        if is_folder and not name.is_absolute() and ".." not in name.parts:
            continue
        if not (path.resolve() if is_folder else parent).is_relative_to(root.resolve()):
            return path
        if not is_folder:
            checked_file(path)
    return None


def _check_counts(content: Mapping[str, Any], file: Path) -> None:
    """Check the numbers of layers and of experts in each, all of which the model's class would build."""
    most = {"layer": ("", 1), "expert": ("", 1)}
    for key, value in _entries(content):
        kind = next((kind for kind, pattern in _COUNTS.items() if pattern.search(key)), None)
        if kind and type(value) is int and value > most[kind][1]:
            most[kind] = key, value
    (layer_key, layers), (expert_key, experts) = most.values()
    if layers > _MOST_LAYERS:
        raise ValueError(f"{file}: {layer_key} is {layers:,}, expected at most {_MOST_LAYERS:,}")
    if layers * experts > _MOST_EXPERTS:
        raise ValueError(
            f"{file}: {expert_key} is {experts:,}, in each of {layers:,} layers; expected at most {_MOST_EXPERTS:,} in "
            "all layers"
        )


def _listed(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else [] if value is None else [value]


def _entries(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every (key, value) of nested JSON, without the names of classes that are keys of ``label2id``."""
    waiting: list[Any] = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            value = {key: one for key, one in value.items() if key != "label2id"}
            yield from value.items()
        if isinstance(value, (dict, list)):
            waiting += _listed(value)


def version_files(folder: Path) -> list[str]:
    """Files for one version of transformers that the checked configurations of a folder list."""
    contents = [read_json(file) for file in files_in(folder) if _CONFIGURATION.fullmatch(file.name)]
    return [name for content in contents for key in _VERSIONS for name in _listed(content.get(key))]


def code_files(folder: Path) -> list[str]:
    """Files of code that the configurations of a folder name in ``auto_map``, such as ``modeling_x.py``."""
    names = set()
    for file in files_in(folder):
        if _CONFIGURATION.fullmatch(file.name):
            for reference in _listed(read_json(file).get("auto_map")):
                names |= {f"{str(one).rpartition('.')[0]}.py" for one in _listed(reference) if one}
    return sorted(names)
