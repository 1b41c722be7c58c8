"""Kernels that a wheel carries: which processors take which, what is listed, and what happens where one is missing."""

import platform
import shutil
import subprocess
import warnings
from collections import defaultdict

import pytest
import torch
from covering import covering

from leanstep import Lion, SinkGD, cli
from leanstep.kernels import BackendError, _backend, use_backend
from leanstep.kernels._backend import choose
from leanstep.kernels.cpp_impl import _build, _prebuilt
from leanstep.kernels.steps import engine

CPU = torch.device("cpu")
V3 = "avx avx2 fma bmi1 bmi2 f16c abm movbe"
V4 = f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"


@pytest.mark.parametrize(
    ("machine", "features", "names"),
    [
        ("x86_64", "sse2 avx", []),
        ("x86_64", V3, ["x86-64-v3"]),
        ("x86_64", V4.replace(" f16c", ""), []),
        ("x86_64", V4, ["x86-64-v4", "x86-64-v3"]),
        (
            "x86_64",
            f"{V4} avx512vbmi avx512_vbmi2 avx512_vnni avx512_bf16",
            ["x86-64-v4-bf16", "x86-64-v4", "x86-64-v3"],
        ),
        ("aarch64", "fp asimd", ["armv8-a"]),
        ("riscv64", V4, []),
    ],
)
def test_levels_of_a_processor(machine, features, names):
    key = "Features" if machine == "aarch64" else "flags"
    lines = ["model name\t: some", f"{key}\t\t: {features}", "", f"{key}\t\t: other"]
    assert [level.name for level in _prebuilt.levels_of(machine, lines)] == names


def test_torchs_switch_holds_the_levels_too():
    lines = [f"flags\t\t: {V4} avx512vbmi avx512_vbmi2 avx512_vnni avx512_bf16 amx_tile"]
    names = lambda held: [level.name for level in _prebuilt.levels_of("x86_64", lines, held)]  # noqa: E731
    assert names("avx2") == ["x86-64-v3"] and names("default") == []


@pytest.mark.parametrize(
    ("op", "level"),
    [
        ("bitmask_linear", "x86-64-v4-bf16"),
        ("few_token_linear", "x86-64-v4-bf16"),
        ("lion_step_int8", "x86-64-v4-bf16"),
        ("average_step_int8", "x86-64-v4-bf16"),
        ("lion_step", "x86-64-v4"),
        ("nm_matmul", "x86-64-v4"),
    ],
)
def test_the_reason_names_the_level_that_runs(op, level, monkeypatch):
    levels = _prebuilt.LEVELS["x86_64"]
    monkeypatch.delenv("LEANSTEP_PREBUILT", raising=False)
    monkeypatch.setattr(_prebuilt, "levels", lambda: levels)
    monkeypatch.setattr(_prebuilt, "installed_levels", lambda: [(level.name, 1) for level in levels])
    monkeypatch.setattr(_backend, "why_not_cpp", lambda: None)
    assert choose(op, CPU, torch.float32) == ("cpp", f"CPU, prebuilt for {level}")


def test_every_listed_kernel_exists_and_is_listed_once():
    listed = [(kernel, _prebuilt.file_name(kernel, macros)) for kernel, macros in _prebuilt.variants()]
    assert len(set(listed)) == len(listed) > 100
    sources = {p.relative_to(_prebuilt.SOURCES).with_suffix("").as_posix() for p in _prebuilt.SOURCES.rglob("*.cpp")}
    assert {kernel for kernel, _ in listed} == sources, "every kernel has a line in prebuilt.json"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("level", _prebuilt.LEVELS.get(platform.machine(), ()), ids=lambda level: level.name)
def test_every_listed_kernel_compiles_for_every_level_of_this_machine(level, tmp_path):
    """Every two values of its macros meet, and each meets every level; the workflow of the wheels compiles them all."""
    rows = defaultdict(list)
    for kernel, macros in _prebuilt.variants():
        rows[kernel] += [(one, macros) for one in _prebuilt.LEVELS[platform.machine()] if takes(one, kernel)]

    def run(source, *options):
        command = ["g++", *_prebuilt.FLAGS, *level.flags, f"-I{_prebuilt.SOURCES}", *options, source]
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, f"{source} {options}: {ran.stderr[:1000]}"

    # most of the time goes into these headers: they are parsed once
    (header := tmp_path / "once.h").write_text('#include "common.h"\n#include "instructions.h"\n')
    run(header, "-x", "c++-header")
    for kernel, variants in rows.items():
        for i in covering([{**macros, "": one.name} for one, macros in variants]):
            one, macros = variants[i]
            if one == level:
                options = ("-include", header, *(f"-D{k}={v}" for k, v in macros.items()), "-fsyntax-only")
                run(_prebuilt.SOURCES / f"{kernel}.cpp", *options)


def takes(level, kernel):
    return level.only is None or kernel.startswith(level.only)


@pytest.fixture
def calls(monkeypatch):
    """The libraries that were asked for."""
    asked = set()
    library = _build.library

    def recorded(name, macros):
        asked.add(_prebuilt.file_name(name, macros))
        return library(name, macros)

    monkeypatch.setattr(_build, "library", recorded)
    return asked


def steps(optimizer, *, dtype=torch.float32, count=2, **options):
    """Parameters after some steps on gradients that are always the same."""
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((6, 8), (16, 4), (5,))
    ]
    rules = ("sinkgd", "adamw") if optimizer is SinkGD else (None, None)
    groups = [
        {"params": ps} | ({"algorithm": a} if a else {}) for ps, a in zip((params[:2], params[2:]), rules, strict=True)
    ]
    made = optimizer(groups, lr=1e-2, **options)
    for _ in range(count):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
        made.step()
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("optimizer", [Lion, SinkGD])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.bfloat16},
        *(
            {"dtype": torch.bfloat16, "rounding": name}
            for name in ("nearest", "stochastic", "kahan", "master", "split")
        ),
        {"nonfinite": "raise"},
    ],
    ids=str,
)
def test_ordinary_steps_use_listed_kernels(optimizer, options, calls):
    steps(optimizer, **options)
    listed = {_prebuilt.file_name(kernel, macros) for kernel, macros in _prebuilt.variants()}
    assert calls and calls <= listed


def test_maximizing_adamw_is_listed_because_no_definition_stands_in_for_its_kernel(calls):
    steps(SinkGD, dtype=torch.bfloat16, maximize=True)
    listed = {_prebuilt.file_name(kernel, macros) for kernel, macros in _prebuilt.variants()}
    assert "steps-adamw_step-MAXIMIZE_1.so" in calls & listed


# ---- an installation with few prebuilt kernels and without a compiler


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compile a kernel as a wheel has it, once."""
    folder = tmp_path_factory.mktemp("compiled")

    def compile_once(level, kernel, macros):
        path = folder / _prebuilt.file_name(kernel, macros)
        if not path.exists():
            source = [f"-I{_prebuilt.SOURCES}", *(f"-D{k}={v}" for k, v in macros.items())]
            part, file = path.with_suffix(".o"), _prebuilt.SOURCES / f"{kernel}.cpp"
            flags = [*_prebuilt.FLAGS, *level.flags, *source, "-c", file, "-o", part]
            subprocess.run([*_build.cpp_compiler(), *flags], check=True)
            subprocess.run([*_build.cpp_compiler(), "-shared", part, "-o", path], check=True)
        return path

    return compile_once


@pytest.fixture
def installed(tmp_path, monkeypatch, compiled):
    """Install these kernels as a wheel would; ``compiler=False`` takes the compiler away."""
    (level, *_) = [one for one in _prebuilt.levels() if one.only is None] or pytest.skip("no level of this processor")

    def install(*kernels, compiler=False):
        folder = tmp_path / level.name
        folder.mkdir(exist_ok=True)
        for kernel, macros in kernels:
            shutil.copy(compiled(level, kernel, macros), folder)
        forget()
        if not compiler:
            monkeypatch.setenv("CXX", "no-such-compiler")
        return folder

    monkeypatch.setattr(_prebuilt, "folder", lambda: tmp_path)
    yield install
    monkeypatch.undo()
    forget()


def forget():
    for cached in (_build._library, _build._why_it_fails, _prebuilt.installed_levels, engine._tell_once):
        cached.cache_clear()


FLAGS = ("steps/nonfinite_flags", {"TENSOR": "float"})
LION = (
    "steps/lion_step",
    {"PARAM": "float", "GRAD": "float", "AVG": "float", "ROUNDING": "NEAREST"}
    | {"CAUTIOUS": 0, "ALIGNED": 0, "MAXIMIZE": 0, "SKIP": 1},
)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build what the wheel would carry")
class TestWithoutCompiler:
    def test_a_prebuilt_kernel_gives_the_bits_of_a_built_one(self, installed, monkeypatch):
        built = steps(Lion)
        folder = installed(FLAGS, LION)
        with use_backend("cpp"):
            assert all(map(torch.equal, steps(Lion), built))
        assert str(folder) in {p for p in (lib._name.rpartition("/")[0] for lib in [_build.library(*LION)])}
        choice = choose("lion_step", CPU, torch.float32)
        assert choice == ("cpp", f"CPU, prebuilt for {folder.name}")

    def test_where_a_kernel_is_missing_the_definition_runs_and_a_warning_names_it_once(self, installed):
        with use_backend("reference"):
            expected = steps(Lion, maximize=True)
        installed(FLAGS, LION)
        with pytest.warns(UserWarning, match="steps/lion_step with .*MAXIMIZE=1.*apt-get install g") as warned:
            results = steps(Lion, maximize=True)
        assert len(warned) == 1 and all(map(torch.equal, results, expected))
        with use_backend("cpp"), pytest.raises(BackendError, match="no prebuilt steps/lion_step with .*MAXIMIZE=1"):
            steps(Lion, maximize=True)

    def test_sinkgd_runs_its_definition_where_its_kernels_are_missing(self, installed):
        with use_backend("reference"):
            expected = steps(SinkGD)
        installed(FLAGS, ("matrices/sinkhorn", {"MAT": "float"}))
        with pytest.warns(UserWarning, match="no prebuilt steps/scaled_step"):
            results = steps(SinkGD)
        for result, other in zip(results, expected, strict=True):
            torch.testing.assert_close(result, other, rtol=1e-5, atol=1e-6)

    def test_the_compiler_builds_what_is_missing(self, installed):
        expected = steps(Lion, maximize=True)
        installed(FLAGS, compiler=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert all(map(torch.equal, steps(Lion, maximize=True), expected))

    def test_a_damaged_library_is_not_fatal(self, installed):
        folder = installed(FLAGS, compiler=True)
        (folder / _prebuilt.file_name(*FLAGS)).write_bytes(b"\x7fELF")
        assert choose("lion_step", CPU, torch.float32).backend == "cpp", "built by the compiler instead"

    def test_a_library_of_a_lower_level_stands_in_for_a_damaged_one(self, installed, monkeypatch, tmp_path):
        good = installed(FLAGS) / _prebuilt.file_name(*FLAGS)
        (damaged := tmp_path / "damaged.so").write_bytes(b"\x7fELF")
        monkeypatch.setattr(_prebuilt, "find", lambda kernel, macros: [damaged, good])
        assert _build.library(*FLAGS)._name == str(good)

    def test_prebuilt_kernels_can_be_refused(self, installed, monkeypatch):
        installed(FLAGS, LION)
        monkeypatch.setenv("LEANSTEP_PREBUILT", "0")
        assert choose("lion_step", CPU, torch.float32).backend == "reference"

    def test_info_says_which_kernels_there_are(self, installed, capsys):
        folder = installed(FLAGS, LION, ("sparse/instructions", {}))
        assert cli.main(["info"]) == 0
        printed = capsys.readouterr().out
        assert f"prebuilt CPU kernels: 3 for {folder.name}\n" in printed
        assert "none; those that are not prebuilt run as their definitions" in printed
