"""Open the models, configurations and tokenizers of Hugging Face folders with transformers.

No code of a folder runs, every weight comes from its files, and all weights are finite; otherwise a ValueError of one
line says what is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanstep._checkpoint.configuration import check_folder, code_files, version_files
from leanstep._checkpoint.files import TensorFile, check_finite, load_pickled, read_json, reason
from leanstep._checkpoint.mapped import Scratch, forget_sources, is_mapped, note_use, release_pages
from leanstep._checkpoint.safetensors import MappedFile
from leanstep._files import gguf_file, is_folder_name, one_line
from leanstep.pruning.cost import Cost, Plan
from leanstep.pruning.folder.files import DTYPE_NAMES, Checkpoint, stored_tensors
from leanstep.sparsity.inference.load import check_declared, named_class, nobody_asked

_FLOATING_DTYPES = tuple(DTYPE_NAMES.values())

# times that the files are read or written, and hashed: copies, checks of values, comparisons with what is stored
READS, _HASHES = 6, 2
# most tokens of a calibration sequence whose length nobody asked for
LONGEST = 512
# the files of a name on the hub that tell what the others are, and of what the library makes classes
_TELLING = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "model.safetensors.index.json",
    "adapter_config.json",
)
_UNLIMITED = 10**30  # transformers' model_max_length of a tokenizer that names none
_SHOWN = 3  # names of tensors in a message


def load_model(checkpoint: Checkpoint, device: str | torch.device = "cpu") -> nn.Module:
    """Load the model of a checkpoint with transformers, in the dtype of its weights and in eval mode.

    Raises:
        ValueError: if transformers cannot open it, if it needs code of its own, if the weights do not fit its
            config.json, or if one holds NaN or infinity.
    """
    model_class = named_class(checkpoint.config.get("architectures"))
    model = open_model(checkpoint.folder, model_class, finite=False, mapped=True)
    _check_finite(checkpoint, model)
    return model.eval().to(device)


def _check_finite(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Check all weights. Reads those that the model has as stored from the files, one in memory at a time."""
    stored = stored_names(checkpoint, model)
    dtypes = {name: dtype for _, name, dtype, _ in stored_tensors(checkpoint.folder)}
    state = model.state_dict()
    as_stored = {
        name: (file, key)
        for name, (file, key) in stored.items()
        if file.endswith(".safetensors") and dtypes.get(key) == DTYPE_NAMES.get(state[name].dtype)
    }
    check_finite(((name, checkpoint.tensor(file, key)) for name, (file, key) in as_stored.items()), checkpoint.folder)
    aliases = {state[name].data_ptr() for name in as_stored}
    others = {name: t for name, t in state.items() if t.data_ptr() not in aliases}
    for name, tensor in others.items():
        check_finite([(name, tensor)], checkpoint.folder)
        if is_mapped(tensor):
            release_pages(tensor.data_ptr(), tensor.nbytes)


def checkpoint_values(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors under the checkpoint's names and in its shapes.

    Undoes the renaming and fusing that transformers does on loading, for instance of a mixture's experts. Leaves out
    tensors that the model computes itself, such as tables of sines, if no file has them.

    Raises:
        ValueError: if the checkpoint has neither another tensor of the model nor one tied to it.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict()
    values = dict(revert_weight_conversion(model, state)) if hasattr(model, "config") else state
    names = checkpoint.names
    written = {tensor.data_ptr() for name, tensor in values.items() if name in names}
    absent = [n for n, t in values.items() if n not in names and t.numel() and t.data_ptr() not in written]
    names_by_address = {tensor.data_ptr(): name for name, tensor in state.items()}
    absent = [n for n in absent if not _is_computed(model, names_by_address.get(values[n].data_ptr(), n))]
    if absent:
        raise ValueError(
            f"{checkpoint.folder}: no file has the model's tensor {absent[0]}, so that it cannot be written; open the "
            "model with transformers, save it with save_pretrained, and prune that"
        )
    return {name: tensor for name, tensor in values.items() if name in names}


def _is_computed(model: nn.Module, name: str) -> bool:
    """Whether a model of transformers makes a tensor itself, always with the same values, if no file has it."""
    missing = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    unsaved = getattr(model, "_keys_to_ignore_on_save", None) or ()
    if name not in unsaved and not any(re.search(pattern, name) for pattern in missing):
        return False
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    tensor = getattr(owner, leaf).detach()
    if bool((tensor == tensor.flatten()[0]).all()):  # a bias of zeros
        return True
    if next(owner.children(), None) is not None:  # to make it again would copy them
        return False
    again = deepcopy(owner)
    made = getattr(again, leaf).detach().zero_()
    with torch.random.fork_rng(devices=[]):
        model._init_weights(again)  # type: ignore[operator]
    return torch.equal(made, tensor)


def stored_parameters(
    checkpoint: Checkpoint, model: nn.Module, scratch: Scratch | None = None
) -> Callable[[str], Tensor | None]:
    """Make a function from a parameter's name to its values in the checkpoint's safetensors files.

    The function returns None for parameters in files of ``torch.save``, and for those that transformers fused. With
    ``scratch``, it copies the fused ones that are mapped into files there.
    """
    names = stored_names(checkpoint, model)
    copies = (
        {}
        if scratch is None
        else {
            name: scratch.store(note_use(parameter).detach())
            for name, parameter in model.named_parameters()
            if name not in names and is_mapped(parameter)
        }
    )

    def stored(parameter: str) -> Tensor | None:
        if parameter in copies:
            copy: Tensor = copies[parameter].open()
            return copy
        file, name = names.get(parameter, ("", ""))
        return checkpoint.tensor(file, name) if file.endswith(".safetensors") else None

    return stored


def stored_names(checkpoint: Checkpoint, model: nn.Module) -> dict[str, tuple[str, str]]:
    """Weight file and stored name of each parameter that transformers neither fused nor cut on loading."""
    files = {name: file for file, names in checkpoint.files.items() for name in names}
    # the shape tells the first expert from the fused parameter, which begins at the same address
    named = {(tensor.data_ptr(), tensor.shape): name for name, tensor in checkpoint_values(checkpoint, model).items()}
    by_parameter = {name: named.get((value.data_ptr(), value.shape)) for name, value in model.named_parameters()}
    return {parameter: (files[name], name) for parameter, name in by_parameter.items() if name is not None}


def open_config(source: str | Path) -> Any:
    """Configuration in a folder, or of a model on the hub. Raises ValueError for one that cannot be opened."""
    from transformers import AutoConfig

    with _opening("configuration", source) as path:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def empty_model(source: str | Path, dtype: torch.dtype) -> nn.Module:
    """Model of a configuration, on torch's default device with new weights; ValueError if it cannot be built."""
    config = open_config(source)
    with _opening("model", source):
        return _class(None).from_config(config, dtype=dtype, trust_remote_code=False)


def empty_model_of(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """The model of a checkpoint on the meta device, without values; ValueError if it cannot be built."""
    config = open_config(checkpoint.folder)
    model_class = named_class(checkpoint.config.get("architectures"))
    with _opening("model", checkpoint.folder), torch.device("meta"):
        if model_class is None:
            return _class(None).from_config(config, dtype=dtype, trust_remote_code=False)
        return model_class._from_config(config, dtype=dtype)


def open_tokenizer(source: str | Path) -> Any:
    """Tokenizer in a folder, or by name from the hub. Raises ValueError for one that cannot be opened or encode "a"."""
    from transformers import AutoTokenizer

    folder = Path(source).expanduser()
    files = ("*token*", "vocab*", "*.model")
    if folder.is_dir() and not _gguf(folder) and not any(any(folder.glob(name)) for name in files):
        raise ValueError(
            f"{source} holds no tokenizer (no tokenizer.json); save the model's own there by save_pretrained"
        )
    with _opening("tokenizer", source) as path:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **_gguf(folder))
        longest = tokenizer.model_max_length
        if isinstance(longest, bool) or not isinstance(longest, (int, float)) or not longest >= 1:
            raise ValueError(f"its model_max_length is {one_line(longest)}, expected a number of tokens")
        tokenizer.model_max_length = int(min(longest, _UNLIMITED))
        tokenizer.all_special_ids  # noqa: B018  # an unknown-token that is no token recurses without end
    with encoding(source):
        tokenizer("a", add_special_tokens=False)
    return tokenizer


@lru_cache(maxsize=1)  # callers ask again for every text
def begin_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that a tokenizer puts before a text: the begin of text for Llama 3 and Gemma, mostly none.

    A model that was trained with them expects them.
    """
    return special_tokens(tokenizer)[0]


def special_tokens(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that a tokenizer puts before a text and after it."""
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = range(len(whole) - len(plain) + 1)
    begin = next((start for start in starts if whole[start : start + len(plain)] == plain), 0)
    return tuple(whole[:begin]), tuple(whole[begin + len(plain) :])


@contextmanager
def encoding(source: str | Path) -> Iterator[None]:
    """Context manager: any error of a tokenizer that encodes becomes a ValueError of one line about ``source``."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizer in {source} could not encode the text: {reason(error)}") from error


def position_count(config: Mapping[str, Any], source: str | Path) -> int | None:
    """Positions of a model by its config.json; None if it names none.

    Raises:
        ValueError: for anything but a whole number above 0.
    """
    count = config.get("max_position_embeddings") or config.get("n_positions")
    if count is None or (type(count) is int and count > 0):
        return count
    raise ValueError(f"{source}: config.json has {one_line(count)} positions, expected a whole number above 0")


def open_model(
    source: str | Path,
    model_class: Any = None,
    *,
    dtype: torch.dtype | str = "auto",
    new_heads: Iterable[str] = (),
    finite: bool = True,
    mapped: bool = False,
) -> nn.Module:
    """Load a model whose weights fit its configuration.

    Args:
        source: a folder, or the name of a model on the hub. A GGUF file in a folder without other weights is
            dequantised.
        model_class: a class of transformers; None: ``AutoModelForCausalLM``.
        dtype: of the weights; "auto": as stored, fp32 for GGUF.
        new_heads: see :func:`check_weights`.
        finite: read all weights and refuse NaN and infinity.
        mapped: open safetensors files by :class:`MappedFile`, not only those larger than the memory. What
            :class:`CopiesInFiles` joins then leaves the memory.

    Raises:
        ValueError: as :func:`check_weights`, and for a weight with NaN or infinity.
    """
    new_heads = tuple(new_heads)
    check_weights(source, model_class, new_heads=new_heads)
    with _opening("model", source) as path, _quiet(reports=True), _mapping_files(always=mapped):
        model = _class(model_class).from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=False,
            use_kernels=False,
            ignore_mismatched_sizes=bool(new_heads),
            **_gguf(Path(path)),
        )
    if finite:
        check_finite(model.state_dict().items(), source)
    return model


def check_weights(source: str | Path, model_class: Any = None, *, new_heads: Iterable[str] = ()) -> None:
    """Compare the tensors of a checkpoint with the model of its configuration. Reads and allocates no weight.

    Args:
        source, model_class: as for :func:`open_model`.
        new_heads: wildcards over modules whose weights are drawn anew where the checkpoint has none, or has them in
            another shape.

    Raises:
        ValueError: for a folder that cannot be opened, needs code of its own or has an adapter; for missing tensors,
            except tied ones; for tensors of another shape, or weights that are not floating-point; for an entry of
            ``new_heads`` that selects no such tensor.
    """
    with _opening("model", source) as path, _quiet(), _mapping_files(always=True):
        _, info = _class(model_class).from_pretrained(
            path,
            dtype="auto",
            device_map="meta",
            trust_remote_code=False,
            use_kernels=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **_gguf(Path(path)),
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
        if Path(path).is_dir():
            check_declared(Path(path), read_json(Path(path) / "config.json"))
        raise ValueError(_misfit(source, missing, mismatched, sorted(map(str, info["unexpected_keys"]))))
    config = Path(path) / "config.json"
    if config.is_file() and not read_json(config).get("quantization_config"):
        _check_dtypes(Path(path))


def check_values(folder: Path) -> None:
    """Read all weights of a folder, one in memory at a time. Raises ValueError for NaN and infinity."""
    for file in dict.fromkeys(file for file, *_ in stored_tensors(folder)):
        if file.suffix == ".bin":
            check_finite(((str(n), t) for n, t in load_pickled(file).items() if isinstance(t, Tensor)), file)
            continue
        with TensorFile(file) as opened:
            check_finite(((name, opened.tensor(name)) for name in opened.names), file)


def _check_dtypes(folder: Path) -> None:
    """Refuse weights and biases that are not floating-point, which transformers would convert without a word."""
    for file, name, dtype, shape in stored_tensors(folder):
        # GPT-2's attn.bias is a mask of four dimensions
        if dtype not in _FLOATING_DTYPES and (name.endswith(".weight") or (name.endswith(".bias") and len(shape) == 1)):
            raise ValueError(
                f"{file}: {one_line(name)} is of dtype {dtype}: expected floating-point weights "
                f"({', '.join(_FLOATING_DTYPES)})"
            )


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


def _gguf(folder: Path) -> dict[str, str]:
    """The argument by which transformers opens the GGUF file of a folder without other weights."""
    file = gguf_file(folder)
    return {} if file is None else {"gguf_file": file.name}


@contextmanager
def _opening(kind: str, source: str | Path) -> Iterator[str]:
    """Context manager: yields a checked path or name for transformers; any error becomes a ValueError of one line."""
    folder = Path(source).expanduser()
    try:
        if folder.is_dir():
            check_folder(folder, tokenizer=kind == "tokenizer")
        else:
            if is_folder_name(str(source)) and not folder.exists():
                raise ValueError(
                    f"the folder {source} does not exist: expected a Hugging Face folder, or a name on the hub"
                )
            folder = _snapshot(str(source)) or folder
        if kind == "model" and (folder / "adapter_config.json").exists():
            # transformers would add the adapter where peft is installed, or take another model for its base
            raise ValueError(
                f"{source} has an adapter (adapter_config.json): expected a model alone; merge the adapter into it, or "
                "remove adapter_config.json"
            )
    except ValueError as error:
        raise ValueError(one_line(error)) from None
    try:
        with nobody_asked():
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

    folder = None
    for listed in (False, True):
        wanted = _TELLING if not listed else version_files(folder) if folder else ()
        try:
            files = [cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in wanted]
        except Exception:  # transformers says it better when it opens the name
            return None
        for folder in {Path(file).parent for file in files if file is not None}:
            check_folder(folder, tokenizer=True)
    return folder


@contextmanager
def _mapping_files(*, always: bool = False) -> Iterator[None]:
    """Context manager: transformers opens safetensors files larger than the memory, or all, by :class:`MappedFile`."""
    from transformers import modeling_utils

    safe_open = getattr(modeling_utils, "safe_open", None)
    if safe_open is None:  # a version that opens files elsewhere: such a file is refused, as safetensors does
        yield
        return

    def open_file(path: Any, *args: Any, **options: Any) -> Any:
        if not always or options.get("backend") == "pread":  # where transformers asks for no mapping, as on Windows
            try:
                return safe_open(path, *args, **options)
            except RuntimeError as error:
                if "Cannot allocate memory" not in str(error):
                    raise
        return MappedFile(Path(path), writable=True, is_source=True)

    modeling_utils.safe_open = open_file
    try:
        yield
    finally:
        modeling_utils.safe_open = safe_open
        forget_sources()


@contextmanager
def _quiet(*, reports: bool = False) -> Iterator[None]:
    """Context manager: no bars of transformers, and no reports unless asked for."""
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    shown, level, bar = logging.is_progress_bar_enabled(), logging.get_verbosity(), gguf.tqdm
    logging.disable_progress_bar()
    gguf.tqdm = lambda tensors, **_: tensors  # not one of logging's
    if not reports:
        logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        gguf.tqdm = bar
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def load_cost(plan: Plan) -> Cost:
    """What it takes to read, check and write the files, and to hold the weights that were used last."""
    shapes, rates = plan.shapes, plan.rates
    resident = plan.workload.resident + shapes.largest_block * shapes.itemsize
    return Cost(
        {"files": shapes.size * (READS * rates.copied + _HASHES * rates.hashed)},
        memory={"weights": min(resident, shapes.size), "experts, fused": shapes.fused_bytes},
    )
