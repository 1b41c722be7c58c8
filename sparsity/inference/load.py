"""Open a sparse checkpoint as a model of transformers whose weights stay compressed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from leanstep._checkpoint.files import reason
from leanstep._files import one_line
from leanstep.sparsity.inference.export import QUANT_METHOD
from leanstep.sparsity.inference.linear import why_slow
from leanstep.sparsity.inference.reader import is_sparse_file, read_config, weight_files

_LOG = logging.getLogger(__name__)


def load_sparse(
    folder: str | Path,
    model_class: Any = None,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = "cpu",
) -> nn.Module:
    """Load a folder of :func:`~leanstep.sparsity.inference.export_folder` into a model of transformers.

    Linear layers become :class:`~leanstep.sparsity.inference.SparseLinear`, which computes from the compressed weight.
    Other sparse weights (embeddings, heads tied to them, experts) become dense. ``from_pretrained``
    of the model's class loads the same after ``import leanstep``; this function also refuses a class whose head the
    files lack.

    Args:
        folder: with sparse files.
        model_class: a class of transformers; None: the one that config.json names in ``architectures``, else
            ``AutoModelForCausalLM``.
        dtype: of the model; "auto": as stored. Values of another dtype are converted once.
        device_map: as for ``from_pretrained``.

    Returns:
        The model, in evaluation mode. ``generate``, static and dynamic caches, batches and adapters work.

    Raises:
        ValueError: for a folder without sparse files, or a damaged or incomplete one; the message names the file or the
            tensor.

    Notes:
        Logs a warning where a token takes longer than with dense weights on this processor, and why.

        Memory: the stored values, one bit per weight and 8 bytes per row; and, while loading, one dense weight.
    """
    import transformers

    folder = Path(folder).expanduser()
    weight_files(folder)
    config = read_config(folder)
    quantization = config.get("quantization_config")
    check_declared(folder, config)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != QUANT_METHOD:
        raise ValueError(
            f"{folder} is no sparse checkpoint: quant_method in config.json is {one_line(method)}, expected "
            f"{QUANT_METHOD}; `leanstep export --format sparse` writes such a folder"
        )
    if model_class is None:
        model_class = named_class(config.get("architectures")) or transformers.AutoModelForCausalLM
    try:
        with nobody_asked():
            model, info = model_class.from_pretrained(
                str(folder),
                dtype=dtype,
                device_map=device_map,
                trust_remote_code=False,
                use_kernels=False,
                output_loading_info=True,
            )
    except Exception as error:  # transformers and safetensors raise many types for a damaged file
        raise ValueError(f"{folder} cannot be loaded: {reason(error)}") from error
    missing = [*sorted(map(str, info["missing_keys"])), *sorted(str(row[0]) for row in info["mismatched_keys"])]
    if missing:
        raise ValueError(f"{folder}: the files lack the weight {one_line(missing[0])} of the model in config.json")
    if (slow := why_slow(model)) is not None:
        _LOG.warning(
            "%s: a token takes longer here than with dense weights: %s; `leanstep export --format dense` writes those",
            folder,
            slow,
        )
    return model


@contextmanager
def nobody_asked() -> Iterator[None]:
    """Context manager: code that a folder brings is refused, and nobody is asked whether to run it.

    ``trust_remote_code=False`` does not reach the parts of a model or tokenizer, which transformers opens by its own
    calls; these ask on the standard input.
    """
    from transformers import dynamic_module_utils

    seconds = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds


def named_class(architectures: Any) -> Any:
    """The first class of transformers among the names in a config.json; None if there is none."""
    import transformers

    names = architectures if isinstance(architectures, list) else []
    classes = [getattr(transformers, name, None) for name in names if isinstance(name, str)]
    models = (cls for cls in classes if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel))
    return next(models, None)


def check_declared(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ValueError for sparse weight files beside a config.json without ``quantization_config``.

    transformers reads such a folder as a dense one, and draws the weights that it does not find at random.
    """
    if not config.get("quantization_config") and any(map(is_sparse_file, sorted(folder.glob("*.safetensors")))):
        raise ValueError(
            f"{folder} has sparse weight files, and its config.json has no quantization_config: copy the config.json "
            f'that `leanstep export` wrote, or add "quantization_config": {{"quant_method": "{QUANT_METHOD}"}} to it'
        )
