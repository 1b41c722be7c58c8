"""Call C++ kernels of other processors: those of ARM in an emulator (Debian: qemu-user, g++-aarch64-linux-gnu)."""

import ctypes
import functools
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from leanstep.kernels.cpp_impl._build import FLAGS, SOURCES
from leanstep.kernels.cpp_impl._prebuilt import LEVELS
from leanstep.kernels.cpp_impl.sparse import linear as cpp

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]

# reads the arguments from a file, calls the function, and writes the bytes behind all addresses to standard output;
# around these bytes lie others, which are NaN as floats of 16 and 32 bits
PROGRAM = """
#include "{kernel}.cpp"
#include <cstdio>
#include <cstdlib>

struct Address {{
    char* to;
    int64_t size;
    template <typename T> operator T*() const {{ return reinterpret_cast<T*>(to); }}
}};
template <typename T> T number() {{
    T value;
    if (std::fread(&value, sizeof value, 1, stdin) != 1) std::abort();
    return value;
}}
Address bytes() {{
    const int64_t size = number<int64_t>(), room = 4096, length = size + 2 * room;
    if (size < 0) return {{nullptr, 0}};
    char* memory = static_cast<char*>(std::malloc(length));
    std::memset(memory, 0xFF, length);
    if (std::fread(memory + room, 1, size, stdin) != static_cast<size_t>(size)) std::abort();
    return {{memory + room, size}};
}}
int main() {{
    {reads}
    {function}({names}, 1);
    for (const Address& a : std::initializer_list<Address>{{ {addresses} }}) std::fwrite(a.to, 1, a.size, stdout);
}}
"""


def call(kernel, function, macros, *arguments):
    """As ``leanstep.kernels.cpp_impl._build.call``, with one thread. Tensors are contiguous."""
    kinds = "".join({int: "i", float: "f"}.get(type(a), "p") for a in arguments)
    sent, tensors = [], [a for a in arguments if isinstance(a, torch.Tensor)]
    for kind, argument in zip(kinds, arguments, strict=True):
        if argument is None:
            sent.append(struct.pack("<q", -1))
        elif kind == "p":
            assert argument.is_contiguous()
            sent += [struct.pack("<q", argument.nbytes), ctypes.string_at(argument.data_ptr(), argument.nbytes)]
        else:
            sent.append(struct.pack({"f": "<f", "i": "<q"}[kind], argument))
    program = _program(kernel, function, tuple(macros.items()), kinds)
    written = subprocess.run([EMULATOR, program], input=b"".join(sent), capture_output=True, check=True).stdout
    assert len(written) == sum(tensor.nbytes for tensor in tensors)
    for tensor in tensors:
        ctypes.memmove(tensor.data_ptr(), written[: tensor.nbytes], tensor.nbytes)
        written = written[tensor.nbytes :]


@functools.cache
def _folder():
    return tempfile.TemporaryDirectory()


@functools.cache
def _program(kernel, function, macros, kinds):
    types = {"p": "Address", "f": "float", "i": "int64_t"}
    values = {"p": "bytes()", "f": "number<float>()", "i": "number<int64_t>()"}
    text = PROGRAM.format(
        kernel=kernel,
        function=function,
        reads="\n    ".join(f"const {types[kind]} a{i} = {values[kind]};" for i, kind in enumerate(kinds)),
        names=", ".join(f"a{i}" for i in range(len(kinds))),
        addresses=", ".join(f"a{i}" for i, kind in enumerate(kinds) if kind == "p"),
    )
    folder = Path(tempfile.mkdtemp(dir=_folder().name))
    (folder / "main.cpp").write_text(text)
    (level,) = LEVELS["aarch64"]
    # -O1: optimizing as for a wheel takes three times as long
    flags = [*(flag for flag in FLAGS if flag != "-fopenmp"), "-O1", *level.flags, "-static", f"-I{SOURCES}"]
    flags += [f"-D{key}={value}" for key, value in macros]
    subprocess.run([COMPILER, *flags, folder / "main.cpp", "-o", folder / "main"], check=True)
    return folder / "main"


def compute_with(instructions, monkeypatch):
    """Hold products with bit masks and of few tokens to instructions, NEON in the emulator. Skip what is not here.

    Args:
        instructions: one of ``cpp.INSTRUCTIONS``.
        monkeypatch: of the test.
    """
    isa, here, macros = cpp.INSTRUCTIONS.index(instructions), cpp.instructions(), cpp._macros
    monkeypatch.setattr(cpp, "runs_on_blas", lambda x: isa not in (cpp.AVX512, cpp.BF16))
    if instructions == "NEON" and here != "NEON":
        if MISSING:
            pytest.skip(f"needs {' and '.join(MISSING)} on the PATH (Debian: qemu-user, g++-aarch64-linux-gnu)")
        monkeypatch.setattr(cpp, "call", call)
    elif instructions != here:
        if here == "NEON" or isa > cpp.INSTRUCTIONS.index(here):
            pytest.skip("this processor has no such instructions")
        monkeypatch.setattr(cpp, "_macros", lambda x, values: macros(x, values) | {"ISA": isa})
