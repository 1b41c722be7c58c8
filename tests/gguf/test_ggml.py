"""The formats of ggml: sizes, values against the package gguf's own reader, refusals."""

import ctypes
import sys

import pytest
import torch

gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp_py_sync")
from leanstep._gguf import ggml  # noqa: E402
from leanstep._gguf.ggml import TYPES, bytes_of, dequantize, legal_or_larger, legal_types, quantize  # noqa: E402


def weights(rows: int = 24, columns: int = 512) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.distributions.StudentT(5.0).sample((rows, columns)) * 0.02


# ggml makes tables for these, once a process
SLOW = {"IQ2_S", "IQ2_XS", "IQ2_XXS"}
TRIED = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in TYPES]


@pytest.mark.sample(len(TYPES))
@pytest.mark.parametrize("name", TRIED)
def test_values_are_those_of_the_other_reader_and_near_the_weights(name, monkeypatch):
    monkeypatch.setattr(ggml, "_PIECE", 2048)  # pieces of several threads
    matrix, importance = weights(), torch.rand(512) + 0.1
    data = quantize(matrix, name, importance)
    assert data.dtype == torch.uint8 and data.shape == (24, bytes_of(name, 1, 512))
    assert data.numel() == bytes_of(name, 24, 512) == 24 * 512 * TYPES[name].bits / 8
    values = dequantize(data, name, 512)
    other = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name])
    assert torch.equal(values, torch.from_numpy(other.copy()))
    error = ((values - matrix).square() * importance).sum() / (matrix.square() * importance).sum()
    # measured: at most 6.5, and 186 for F16 and 11797 for BF16, where bits are of an exponent too
    assert error <= {"F16": 200, "BF16": 12000}.get(name, 7) * 4.0 ** -TYPES[name].bits
    assert torch.equal(quantize(matrix.to(torch.float64), name, importance), data)


def test_formats_need_an_importance_where_ggml_says_so():
    requires = ggml.ggml_library().ggml_quantize_requires_imatrix
    requires.restype, requires.argtypes = ctypes.c_bool, [ctypes.c_int]
    assert [name for name, type in TYPES.items() if type.needs_importance] == [
        name for name in TYPES if requires(gguf.GGMLQuantizationType[name].value)
    ]


def test_important_columns_come_nearer():
    matrix, importance = weights(), torch.ones(512)
    importance[::4] = 1e4
    plain, weighted = (dequantize(quantize(matrix, "Q4_K", one), "Q4_K", 512) for one in (None, importance))
    assert ((weighted - matrix)[:, ::4]).square().sum() < 0.9 * ((plain - matrix)[:, ::4]).square().sum()


@pytest.mark.parametrize("name", ["IQ3_S", "Q4_0", "Q6_K"])
@pytest.mark.parametrize("scale", [0.0, 2.0**-140, 2.0**126])
def test_any_scale_of_the_importance_will_do(name, scale):
    """ggml ends the process at large ones, and writes zeros where all are zero."""
    matrix = weights(4)
    assert torch.equal(quantize(matrix, name, torch.full((512,), scale)), quantize(matrix, name, torch.ones(512)))


def test_columns_that_calibration_never_saw_keep_their_values():
    matrix, importance = weights(4), torch.ones(512)
    importance[:256] = 0
    values = dequantize(quantize(matrix, "Q4_K", importance), "Q4_K", 512)
    assert (values - matrix).square().sum() < 0.02 * matrix.square().sum()


def test_formats_of_a_shape():
    assert [type.name for type in legal_types(576)] == [type.name for type in TYPES.values() if type.block <= 32]
    assert legal_types(512) == tuple(TYPES.values())
    assert [type.name for type in legal_types(33)] == ["F32", "F16", "BF16"]
    bits = [type.bits for type in TYPES.values()]
    assert bits == sorted(bits, reverse=True)
    larger = {"Q4_K": "IQ4_NL", "Q6_K": "Q8_0", "Q5_K": "Q5_0", "IQ2_XXS": "IQ4_NL", "Q8_0": "Q8_0"}
    assert {name: legal_or_larger(name, 576).name for name in larger} == larger
    assert legal_or_larger("Q4_0", 33).name == "F16" and legal_or_larger("IQ2_XXS", 256).name == "IQ2_XXS"


BAD = {
    "type": (lambda: quantize(weights(), "Q9_K"), "unknown type 'Q9_K': expected one of F32, F16"),
    "columns": (lambda: bytes_of("Q4_K", 2, 576), "Q4_K needs rows of a multiple of 256 values, got 576"),
    "NaN": (lambda: quantize(weights().index_fill(1, torch.tensor(3), torch.nan), "Q8_0"), "not finite as Q8_0"),
    "infinity": (lambda: quantize(weights() / 0, "F32"), "not finite as F32"),
    "range": (lambda: quantize(weights() * 1e9, "Q4_0"), "Q4_0 holds values up to 65504"),
    "vector": (lambda: quantize(torch.ones(32), "F16"), "expected a floating-point matrix"),
    "integers": (lambda: quantize(torch.ones(2, 32, dtype=torch.int8), "F16"), "expected a floating-point matrix"),
    "no importance": (lambda: quantize(weights(), "IQ2_XS"), "IQ2_XS needs the importance of each column"),
    "importance's shape": (lambda: quantize(weights(), "Q4_K", torch.ones(24)), "each of 512 columns, got shape (24,)"),
    "importance's sign": (lambda: quantize(weights(), "Q4_K", -torch.ones(512)), "finite and not negative"),
    "bytes": (lambda: dequantize(torch.zeros(2, 3, dtype=torch.uint8), "Q8_0", 32), "uint8 rows of 34 bytes"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(case):
    call, text = BAD[case]
    with pytest.raises(ValueError) as error:
        call()
    assert text in str(error.value) and "\n" not in str(error.value)


def test_empty_matrices():
    data = quantize(torch.empty(0, 256), "Q4_K")
    assert data.shape == (0, 144) and dequantize(data, "Q4_K", 256).shape == (0, 256)


@pytest.mark.parametrize("package", ["gguf", "llama_cpp_py_sync"])
def test_a_missing_package_is_named_with_what_to_install(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "leanstep._gguf.ggml")
    with pytest.raises(ImportError, match=package.replace("_", "-") + r".*pip install \"leanstep\[gguf\]\""):
        from leanstep._gguf.ggml import ggml_library

        ggml_library()


def test_a_library_without_a_function_is_told(monkeypatch):
    monkeypatch.setitem(ggml._FUNCTIONS, "ggml_not_there", (None, []))
    with pytest.raises(ValueError, match="has no function ggml_not_there"):
        ggml.ggml_library.__wrapped__()
