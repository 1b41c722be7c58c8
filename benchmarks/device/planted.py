"""Plant faults in the source of the Triton kernels, and see which check without a GPU finds each.

    python benchmarks device/planted [--barriers] [MODULE ...]

Each fault changes one place of one jitted function, the first that its pattern matches there; a missing barrier is
planted in the PTX. What finds it:

- accesses: in Triton's interpreter, an access outside of the tensors, or programs that meet in one place;
- result: there, if no access does, the operation differs from its definition by more than the kernel promises;
- offsets: an offset that can pass 2^31 has 32 bits;
- compiler: the kernel no longer compiles, which says nothing of the checks;
- barriers: accesses to shared memory by different warps have no barrier between them (`_checks/barriers.py`);
- races: SentryWard finds two accesses that race in the PTX for sm_90 of the first configuration of a kernel. It is
  asked of barriers, and of faults that move accesses if nothing else finds them.

- without effect: the PTX is that of the whole module, or SentryWard's verdict without the barrier is that on the
  whole code, "proved" or "conditional" (see `leanstep audit --prove`). This is no fault; it is counted apart.

"none" is a hole, or a change without effect that nothing shows.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from common import print_table

from leanstep.kernels.triton_impl._checks.operations import MODULES

HELPERS = Path(__file__).parents[2] / "tests" / "helpers"
PACKAGE = "leanstep.kernels.triton_impl"
# modules without kernels of their own, and those that have them
USERS = {"steps.engine": ("steps.lion_step", "steps.lion_int8", "steps.adamw_int8", "steps.average_int8")}
# kind: (what stands there, what is put in its place)
FAULTS = {
    "mask of a load dropped": (r"(tl\.load\([^\n]*?), mask=[^\n]*?, other=[-\w.]+\)", r"\1)"),
    "mask of a store dropped": (r"(tl\.store\([^\n]*), mask=[^\n]*\)\n", r"\1)\n"),
    "offset by one": (r"tl\.store\((?=\w+)", r"tl.store(1 + "),
    "overlapping stores": (r"(tl\.program_id\(0\)(?!\))(?:\.to\(tl\.int64\))?|\(entry & 0xFFFFFFFF\))", r"(\1 // 2)"),
    "swapped stride": (r" \* (stride_m|pitch|inner|columns|n|r)\b(?! =)", r" * (\1 + 1)"),
    "narrow accumulator": (r"(tl\.zeros\([^\n]*dtype=tl\.)float(?:32|64)\)", r"\1float16)"),
    # of what arithmetic follows on
    "32-bit index": (r"\.to\(tl\.int64\)(?=\[| [-+*])", ""),
    "wrong rounding": (r"\b(round_to|rounded_parameter)\((?=\w+, )", r"_truncated_\1("),
}
MOVES = ("offset by one", "overlapping stores", "swapped stride", "mask of a store dropped")
TRUNCATED = """

@triton.jit
def _truncated_round_to(x, DTYPE: tl.constexpr):
    bits = x.to(tl.uint32, bitcast=True) & 0xFFFF0000
    return round_to(bits.to(tl.float32, bitcast=True), DTYPE)


@triton.jit
def _truncated_rounded_parameter(x, random, DTYPE: tl.constexpr, ROUNDING: tl.constexpr):
    bits = x.to(tl.uint32, bitcast=True) & 0xFFFF0000
    return rounded_parameter(bits.to(tl.float32, bitcast=True), random, DTYPE, ROUNDING)
"""
PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("modules", nargs="*", metavar="MODULE", help="modules of kernels, such as lora.swiglu")
PARSER.add_argument("--barriers", action="store_true", help="plant missing barriers alone")
PARSER.add_argument("--interpret", action="store_true", help=argparse.SUPPRESS)
Fault = tuple[str, str, int]
# the compiled code is the same, or SentryWard proves the code without the barrier, as it does the whole
WITHOUT = "without effect"


def main() -> int:
    """Plant, check, and print the table."""
    options = PARSER.parse_args()
    sys.path.insert(0, str(HELPERS))
    if options.interpret:
        print(json.dumps(interpreted(*options.modules)))
        return 0
    found: dict[str, dict[str, list[str]]] = {}
    for name in options.modules or [*USERS, *MODULES]:
        others = () if options.barriers else compiled(name, in_interpreter(name))
        for (function, kind, _), rungs in [*others, *barriers(name)]:
            label = f"{name.partition('.')[2]}.{function}"
            found.setdefault(label, {}).setdefault(kind, []).append("+".join(rungs) or "none")
            print(f"{label}, {kind}: {found[label][kind][-1]}", file=sys.stderr, flush=True)
    kinds = [*FAULTS, "missing barrier"]
    print_table(
        ["function", *kinds], ([label, *(" / ".join(row.get(k, ["-"])) for k in kinds)] for label, row in found.items())
    )
    answers = [answer for row in found.values() for cell in row.values() for answer in cell]
    names = ("none", "compiler", WITHOUT)
    none, broken, without = (answers.count(name) for name in names)
    real = len(answers) - broken - without
    print(f"{real} faults: {real - none} found, {none} by none; {broken} do not compile, {without} have no effect")
    return 0


def in_interpreter(name: str) -> list[str]:
    """The answers of `interpreted`, from a process of its own."""
    command = [sys.executable, "-P", str(Path(__file__).parents[1]), "device/planted", "--interpret", name]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return json.loads(answer.splitlines()[-1])


def faults(module: ModuleType) -> Iterator[Fault]:
    """(function, kind, count in the file) of the first place of each kind in each function."""
    from planted import occurrences

    for kind, (pattern, _) in FAULTS.items():
        seen = set()
        for function, count in occurrences(module, pattern):
            if function not in seen:
                seen.add(function)
                yield function, kind, count


def plant(name: str, fault: Fault, folder: Path) -> dict[str, ModuleType]:
    """A module with the fault, and those that use it, which use the changed one."""
    from planted import planted

    module = importlib.import_module(f"{PACKAGE}.{name}")
    pattern, replacement = FAULTS[fault[1]]
    if fault[1] == "wrong rounding":
        with_function = folder / f"{module.__name__.rpartition('.')[2]}_with_truncation.py"
        with_function.write_text(Path(str(module.__file__)).read_text("utf-8") + TRUNCATED)
        module = load(with_function)
    modules = {name: planted(module, pattern, replacement, fault[2], folder)}
    for user in USERS.get(name, ()):
        source = Path(str(importlib.import_module(f"{PACKAGE}.{user}").__file__)).read_text("utf-8")
        path = folder / f"{modules[name].__name__}_{user.partition('.')[2]}.py"
        path.write_text(source.replace(f"from {PACKAGE}.{name} import", f"from {modules[name].__name__} import"))
        modules[user] = load(path)
    return modules


def recorded(modules: dict[str, ModuleType]) -> list[Any]:
    """The cases of the kernels of modules."""
    from leanstep.kernels.triton_impl import _compile

    launchers = [module.audit_launches for module in modules.values() if hasattr(module, "audit_launches")]
    return [case for launch_all in launchers for case in _compile.recorded_cases(launch_all)]


def load(path: Path) -> ModuleType:
    """A module from a file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


# -- in the interpreter -----------------------------------------------------------------------------------------------


def interpreted(name: str) -> list[str]:
    """Which of "accesses" and "result" finds each fault of a module; empty for neither."""
    import interpreter_accesses

    interpreter_accesses.watch()
    module = importlib.import_module(f"{PACKAGE}.{name}")
    changing = {user: importlib.import_module(f"{PACKAGE}.{user}") for user in users(name)}
    functions = {
        user: {key: value for key, value in vars(each).items() if type(value).__name__ == "InterpretedFunction"}
        for user, each in changing.items()
    }
    answers = []
    if judged(name):
        raise SystemExit(f"{name} fails without a fault")
    with tempfile.TemporaryDirectory() as folder:
        for fault in faults(module):
            for user, changed in plant(name, fault, Path(folder)).items():
                vars(changing[user]).update({key: vars(changed)[key] for key in functions[user]})
            answers.append(judged(name))
            for user, names in functions.items():
                vars(changing[user]).update(names)
    return answers


def judged(name: str) -> str:
    """What the interpreter's checks say of the operations of a module."""
    from leanstep.kernels.triton_impl._checks.results import compare_small

    try:
        for operation in (each for user in users(name) for each in MODULES.get(user, ())):
            if not compare_small(operation)["ok"]:
                return "result"
    except Exception as error:
        return "accesses" if "AccessError" in repr(error) else "result"
    return ""


# -- compiled ---------------------------------------------------------------------------------------------------------


def compiled(name: str, seen: list[str]) -> Iterator[tuple[Fault, list[str]]]:
    """Each fault of a module, and the checks that find it; `seen` are those of the interpreter."""
    from triton.compiler.errors import CompilationError

    from leanstep.kernels.triton_impl import _compile
    from leanstep.kernels.triton_impl._checks.offsets import narrow_offsets

    module = importlib.import_module(f"{PACKAGE}.{name}")
    whole = recorded({user: importlib.import_module(f"{PACKAGE}.{user}") for user in users(name)})
    with tempfile.TemporaryDirectory() as folder:
        for fault, rung in zip(faults(module), seen, strict=True):
            rungs = [rung] if rung else []
            cases = recorded(plant(name, fault, Path(folder)))
            first, last = ({case.kernel: case for case in each} for each in (reversed(cases), cases))
            try:
                codes = [_compile.intermediate_code(case) for case in [*first.values(), *last.values()]]
                if any(map(narrow_offsets, codes)):
                    rungs.append("offsets")
            except CompilationError:
                rungs.append("compiler")
            else:
                if not rungs and fault[1] in MOVES and any(races(case) == "races" for case in first.values()):
                    rungs.append("races")
                if not rungs and code_of(cases) == code_of(whole):
                    rungs.append(WITHOUT)
            yield fault, rungs


def users(name: str) -> tuple[str, ...]:
    """A module, and those that use it."""
    return name, *USERS.get(name, ())


def code_of(cases: list[Any]) -> list[str]:
    """The PTX for sm_90 of the first and the last case of each kernel, without lines and names of files."""
    from leanstep.kernels.triton_impl import _compile

    ends = [case for each in (reversed(cases), cases) for case in {case.kernel: case for case in each}.values()]
    codes = [_compile.compile_case(case, "sm_90").asm["ptx"].partition(".section")[0] for case in ends]
    return sorted(re.sub(r"//.*|\t\.(loc|file)\b.*|\$L__tmp\d+:", "", code) for code in codes)


def barriers(name: str) -> Iterator[tuple[Fault, list[str]]]:
    """The first and the last barrier of each kernel taken away."""
    from leanstep.kernels.triton_impl import _compile

    module = importlib.import_module(f"{PACKAGE}.{name}")
    for case in {c.kernel: c for c in reversed(recorded({name: module}))}.values():
        ptx = _compile.compile_case(case, "sm_90").asm["ptx"]
        places = [match.span() for match in re.finditer(r"\tbar\.sync \t0;", ptx)]
        for begin, end in dict.fromkeys([*places[:1], *places[-1:]]):
            code = ptx[:begin] + ptx[end:]
            answer = "barriers" if unguarded(case, code) else races(case, code)
            yield (case.kernel.__name__, "missing barrier", begin), [answer] if answer else []


def unguarded(case: Any, ptx: str) -> bool:
    """Whether warps meet in shared memory without a barrier."""
    from leanstep.kernels.triton_impl._checks import barriers, races

    return barriers.prove(case, "sm_90", ptx).verdict == races.RACE


def races(case: Any, ptx: str = "") -> str:
    """What SentryWard says: "races", that the code has as few as the whole, or "" where it says neither."""
    from leanstep.kernels.triton_impl import _compile
    from leanstep.kernels.triton_impl._checks import races

    ptx = ptx or _compile.compile_case(case, "sm_90").asm["ptx"]
    verdict = races.prove(case, "sm_90", ptx, seconds=10.0).verdict
    if verdict in (races.RACE, races.NOT_COVERED):
        return "races" * (verdict == races.RACE)
    whole = races.prove(case, "sm_90", _compile.compile_case(case, "sm_90").asm["ptx"], seconds=10.0)
    return WITHOUT if whole.verdict == verdict else ""
