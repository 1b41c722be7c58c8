"""Language models that generate on a CPU: transformers with dense, sparse or int8 weights, and llama.cpp."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import psutil
import torch
from common import required
from torch import Tensor, nn

from leanstep.recipes.generate import open_generator
from leanstep.sparsity.inference import SparseLinear, to_few_token_linear

INT8_DYNAMIC, FEW_TOKENS = "int8-dynamic", "few-token-linear"
VARIANTS = ("float32", "bfloat16", INT8_DYNAMIC, FEW_TOKENS)


class Spec(NamedTuple):
    """A model to measure: its name in the table, a folder or a GGUF file, and how a folder is opened."""

    name: str
    path: Path
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Read ``NAME=PATH[@VARIANT]``. Raises ValueError for another text."""
        name, equals, rest = text.partition("=")
        path, _, variant = rest.partition("@")
        if not (name and equals and path) or variant not in ("", *VARIANTS):
            raise ValueError(f"expected NAME=PATH or NAME=PATH@VARIANT, VARIANT of {', '.join(VARIANTS)}; got {text!r}")
        return cls(name, Path(path), variant)


class Engine(Protocol):
    """A model that generates."""

    def generate(self, count: int) -> list[int]:
        """The likeliest tokens after token 1, ``count`` of them."""

    def losses(self, tokens: Sequence[int]) -> Tensor:
        """Negative log-likelihoods (len(tokens) - 1,) of every token after the first."""


def open_engine(spec: Spec, threads: int) -> Engine:
    """Open the model of a spec."""
    if spec.path.suffix == ".gguf":
        return LlamaCpp(spec.path, threads)
    return Transformers(spec)


def file_bytes(spec: Spec) -> int | None:
    """Bytes of the weight files; None for weights that are quantised or converted after loading."""
    if spec.variant not in ("", FEW_TOKENS):
        return None
    return sum(file.stat().st_size for file in [spec.path, *spec.path.glob("*.safetensors")] if file.is_file())


def resident_bytes() -> int:
    """Bytes of this process in memory, after what is free went back to the system."""
    gc.collect()
    # glibc keeps freed memory; other C libraries have no such function
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return psutil.Process().memory_info().rss


class Transformers:
    """A folder in transformers: dense, sparse, converted, by our dense loop, or quantised by torch as it runs."""

    def __init__(self, spec: Spec) -> None:
        model: Any = open_generator(spec.path, "cpu").eval()
        if spec.variant == INT8_DYNAMIC:
            # weights int8 per tensor, inputs int8 by their range at every call
            model = torch.ao.quantization.quantize_dynamic(model.float(), {nn.Linear}, dtype=torch.qint8)
        elif spec.variant == FEW_TOKENS:
            to_few_token_linear(model)
        elif spec.variant:
            model = model.to(getattr(torch, spec.variant))
        self.model = model

    def generate(self, count: int) -> list[int]:
        """The likeliest tokens after token 1."""
        settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": count}
        with torch.inference_mode():
            return self.model.generate(torch.ones(1, 1, dtype=torch.long), **settings)[0, 1:].tolist()

    def losses(self, tokens: Sequence[int]) -> Tensor:
        """Negative log-likelihoods of one sequence."""
        ids = torch.tensor([tokens])
        with torch.inference_mode():
            logits = self.model(ids).logits[0, :-1].float()
        return nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")

    def zeros(self) -> float | None:
        """Fraction of zeros in the compressed weights; None if there is none."""
        layers = [layer for layer in self.model.modules() if isinstance(layer, SparseLinear)]
        total = sum(layer.in_features * layer.out_features for layer in layers)
        # a byte of values may hold two codes
        return 1 - sum(int(layer.weight_offsets[-1]) for layer in layers) / total if total else None


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, path: Path, threads: int) -> None:
        self._path, self._threads = path, threads
        self._model = self._open(512, all_logits=False)

    def _open(self, context: int, *, all_logits: bool) -> Any:
        settings = {"n_threads": self._threads, "n_threads_batch": self._threads, "verbose": False}
        return required("llama_cpp").Llama(str(self._path), n_ctx=context, logits_all=all_logits, **settings)

    def generate(self, count: int) -> list[int]:
        """The likeliest tokens after token 1."""
        return list(islice(self._model.generate([1], temp=0.0, repeat_penalty=1.0), count))

    def losses(self, tokens: Sequence[int]) -> Tensor:
        """Negative log-likelihoods of one sequence."""
        model = self._open(len(tokens), all_logits=True)
        model.eval(list(tokens))
        logits = torch.from_numpy(model.scores[: len(tokens) - 1]).float()
        losses = nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none")
        model.close()
        return losses
