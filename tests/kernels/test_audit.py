import inspect
import json
from collections import defaultdict

import pytest
import torch
from covering import covering
from planted import occurrences, planted

from leanstep.kernels import StepOptions
from leanstep.kernels.triton_impl import audit

pytest.importorskip("triton")

WIDENED = r"\.to\(tl\.int64\)(?! *\n)"


@pytest.fixture(scope="module")
def cases():
    """Every configuration by its name."""
    from leanstep.kernels.triton_impl import _compile

    named = {f"{case.kernel.__name__} {case.label}": case for case in _compile.cases()}
    assert len(named) == len(_compile.cases()) > 200
    yield named
    _compile.cases.cache_clear()


@pytest.fixture(scope="module")
def measured(cases):
    """Measurements of some configurations of every kernel; ``leanstep audit`` compiles all for all targets.

    Every value of constants and pointers occurs, on sm_90 and gfx942 in turn. Bytes and layouts come from Triton's
    intermediate code, which all targets share, so that the configuration that takes the most registers stands for the
    rest on the others.
    """
    by_kernel = defaultdict(list)
    for name, case in cases.items():
        by_kernel[case.kernel].append((name, {**case.arguments, **case.constants, "": (case.threads, case.fp_fusion)}))
    chosen = defaultdict(set)
    for rows in by_kernel.values():
        for turn, i in enumerate(covering([row for _, row in rows], together=1)):
            chosen[("sm_90", "gfx942")[turn % 2]].add(rows[i][0])
    on_sm_90 = audit.measure(["sm_90"], chosen["sm_90"], all_widths=False)
    largest = {m.kernel: f"{m.kernel} {m.label}" for m in sorted(on_sm_90, key=lambda m: m.registers)}
    others = audit.measure(["sm_80", "sm_100"], largest.values(), all_widths=False)
    return on_sm_90 + others + audit.measure(["gfx942"], chosen["gfx942"] | set(largest.values()), all_widths=False)


@pytest.mark.slow
@pytest.mark.parametrize("target", audit.TARGETS)
def test_no_kernel_spills_or_moves_more_than_promised(measured, cases, target):
    here = [m for m in measured if m.target == target]
    assert {m.kernel for m in here} == {case.kernel.__name__ for case in cases.values()}
    assert {f"{m.kernel} {m.label}": audit.problems(m) for m in here if audit.problems(m)} == {}


def test_the_promises_are_those_of_the_methods(cases):
    def bytes_of(kernel, label):
        return {(case.read, case.written) for name, case in cases.items() if name.startswith(f"{kernel} {label}")}

    # Lion: p, g, m in, p, m out; SinkGD: G once per iteration, then G and p in and p out
    assert bytes_of("lion_step_kernel", "p float32 g float32 m float32 nearest") == {(12, 8)}
    assert bytes_of("lion_step_kernel", "p bfloat16 g bfloat16 m bfloat16 nearest") == {(6, 4)}
    assert bytes_of("lion_step_int8_kernel", "p bfloat16 g bfloat16 nearest") == {(5, 3)}
    assert bytes_of("sinkhorn_tile_kernel", "g bfloat16 aligned") == {(2, 0)}
    assert bytes_of("scaled_step_kernel", "p bfloat16 g bfloat16 nearest aligned") == {(4, 2)}
    # M-FAC: every element of the window once for the dots, once for the combination; a sparse entry with its place
    assert bytes_of("window_dots_kernel", "g float32") == bytes_of("window_combination_kernel", "g float32") == {(4, 0)}
    assert bytes_of("window_dots_kernel", "g bfloat16") == {(2, 0)}
    assert bytes_of("sparse_dots_kernel", "v bfloat16") == {(4, 0)}
    # the sums over sparse rows are fp64
    assert bytes_of("sparse_combination_kernel", "v bfloat16") == {(4, 8)}
    # N:M: scores in, mask out; weight and mask in, masked weight out; a weight with its place
    assert bytes_of("nm_mask_kernel", "s 32 bits m 8") == {(4, 1)}
    assert bytes_of("nm_apply_kernel", "w bfloat16") == {(3, 2)}
    assert bytes_of("nm_matmul_kernel", "x float32 1 rows") == {(5, 0)}
    # bitmask: a value and its bit, of a matrix without zeros; written to a tile where that is asked for
    assert bytes_of("bitmask_linear_kernel", "v bfloat16 out bfloat16 1 rows") == {(2.125, 0)}
    assert bytes_of("bitmask_expand_kernel", "v int8 out bfloat16") == {(1.125, 2)}


def test_every_kernel_of_the_package_is_audited(cases):
    from leanstep.kernels.triton_impl import _compile

    names = [name for module in _compile.modules() for name in vars(module) if name.endswith("_kernel")]
    assert set(names) == {case.kernel.__name__ for case in cases.values()}


def test_every_jit_function_is_a_kernel_or_reached_from_one():
    from leanstep.kernels.triton_impl import _common, _compile

    source = "".join(inspect.getsource(m) for m in [*_compile.modules(), _common])
    for module in [*_compile.modules(), _common]:
        for name, value in vars(module).items():
            if type(value).__name__ in ("JITFunction", "InterpretedFunction") and not name.endswith("_kernel"):
                assert source.count(f"{name}(") > 1, f"{module.__name__}.{name} is never called"


SASS = """
.L_x_1:
        /*0850*/                   LDG.E.128 R8, desc[UR14][R26.64] ;
        /*0860*/                   LDG.E.128.CONSTANT R20, desc[UR14][R4.64] ;
        /*0870*/                   STG.E.128 desc[UR14][R26.64], R4 ;
        /*20f0*/               @P4 BRA `(.L_x_1) ;
.L_x_3:
        /*2750*/              @!P6 LDG.E.U16 R46, desc[UR12][R64.64+0x100] ;
        /*2760*/                   LDG.E R46, desc[UR12][R64.64] ;
        /*48a0*/               @P4 BRA `(.L_x_3) ;
"""

AMDGCN = """
.LBB0_4:                                ; %.lr.ph
	global_load_dwordx4 v[10:13], v[18:19], off
	global_load_ushort v33, v5, s[12:13]
	buffer_store_dwordx4 v[2:5], v14, s[0:3], 0 offen
	s_cbranch_scc1 .LBB0_4
	global_store_short v5, v9, s[8:9]
"""

TTIR = """
    %a = tt.load %p : !tt.ptr<i64> loc(#loc1)
    scf.for %t = %c0 to %n step %c1  : i32 {
      %x = tt.load %g : tensor<4x512x!tt.ptr<bf16>> loc(#loc2)
      scf.if %b {
        tt.store %r, %v : tensor<4x!tt.ptr<f32>> loc(#loc3)
      } else {
        tt.store %r, %v : tensor<4x!tt.ptr<f32>> loc(#loc3)
      } loc(#loc4)
    } loc(#loc5)
    tt.store %s, %w : tensor<512x!tt.ptr<f32>> loc(#loc6)
"""


def test_machine_code_is_read_right():
    assert audit._widths(SASS) == {
        "loads": {128: 2, 16: 1, 32: 1},
        "stores": {128: 1},
        "main_loads": {128: 2},
        "main_stores": {128: 1},
    }
    assert audit._widths(AMDGCN) == {
        "loads": {128: 1, 16: 1},
        "stores": {128: 1, 16: 1},
        "main_loads": {128: 1, 16: 1},
        "main_stores": {128: 1},
    }


def test_traffic_counts_what_a_turn_of_the_loop_moves():
    assert audit.loop_traffic(TTIR) == [(4 * 512 * 2, 2 * 4 * 4)]


# Not reported: casts without which the product has 64 bits as well, for its other factor, or fits in 32, and that of
# `_load`, whose configurations are neither the first nor the last.
UNREPORTED = {
    ("window_dots_kernel", 1),
    ("window_combination_kernel", 3),
    ("sparse_dots_kernel", 2),
    ("_load", 1),
    ("lion_agreement_kernel", 0),
    ("lion_agreement_int8_kernel", 0),
    ("scaled_step_kernel", 0),
}


def has_narrow_offsets(module):
    """Whether the first or the last configuration of a kernel of the module has any, or does not compile."""
    from triton.compiler.errors import CompilationError

    from leanstep.kernels.triton_impl import _compile
    from leanstep.kernels.triton_impl._checks.offsets import narrow_offsets

    recorded = _compile.recorded_cases(module.audit_launches)
    first, last = ({case.kernel: case for case in cases} for cases in (reversed(recorded), recorded))
    try:
        codes = [_compile.intermediate_code(case) for case in [*first.values(), *last.values()]]
    except CompilationError:
        return True
    return any(map(narrow_offsets, codes))


def test_a_narrow_index_is_found_wherever_it_is_planted(tmp_path):
    from leanstep.kernels.triton_impl import _compile

    missed = set()
    for module in _compile.modules():
        for function, count in occurrences(module, WIDENED):
            if not has_narrow_offsets(planted(module, WIDENED, "", count, tmp_path)):
                missed.add((function, count))
    assert missed == UNREPORTED


def measurement(**changes):
    values = dict(
        kernel="k", label="l", target="sm_90", threads=256, elements=2048, registers=40, spills=0, stack=0, shared=0,
        loads={128: 1}, stores={128: 1}, main_loads={128: 1}, main_stores={128: 1}, read=2.0, written=2.0,
        promised_read=2, promised_written=2, cached=0, wide=True, flat=True, narrow=[],
    )  # fmt: skip
    return audit.Measurement(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"spills": 1}, "spills 1"),
        ({"stack": 8}, "stack 8"),
        ({"main_loads": {64: 2}}, "128-bit loads cover 0 of 4096"),
        ({"main_stores": {128: 1, 16: 1}}, "narrow stores"),
        ({"read": 3.0}, "reads 3.00"),
        ({"written": 2.5}, "writes 2.50"),
        ({"narrow": ["%at = arith.muli"]}, "32-bit offset can pass 2^31: %at"),
    ],
)
def test_the_audit_complains(changes, complaint):
    assert audit.problems(measurement()) == []
    (problem,) = audit.problems(measurement(**changes))
    assert complaint in problem


@pytest.mark.slow
def test_the_command_prints_json_and_a_table(capsys):
    assert audit.main(["--match", "column_nan", "--target", "sm_90", "--target", "gfx942", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["target"] for row in rows] == ["sm_90", "gfx942"] and all(row["registers"] > 0 for row in rows)
    assert audit.main(["--match", "no such kernel"]) == 1
    assert "0 kernels compiled" in capsys.readouterr().out


def test_without_triton_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(audit, "has_triton", lambda: False)
    assert audit.main([]) == 2
    assert "triton package" in capsys.readouterr().err


def test_cases_are_the_distinct_launches_of_a_launcher():
    """Each is recorded once, as the launcher asked for it, and nothing runs."""
    from leanstep.kernels.triton_impl._compile import recorded_cases
    from leanstep.kernels.triton_impl.steps import lion_step as triton_lion

    counts = []

    def launch_all():
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            grads, momenta = [torch.ones(5, dtype=dtype)], [torch.ones(5)]
            counts.append(triton_lion.lion_agreement([grads, momenta], StepOptions(torch.zeros(6))).item())

        return promises

    def promise(launch):
        return dict(label=str(launch.dtype("G_DTYPE")), elements=7, read=1, written=2)

    promises = {triton_lion.lion_agreement_kernel: promise}
    cases = recorded_cases(launch_all)
    assert [case.label for case in cases] == ["torch.float32", "torch.bfloat16"] and counts == [0, 0, 0]
    pointers = dict.fromkeys(("rows", "programs", "counts"), "*i64")
    assert cases[0].arguments == pointers | {"scalars": "*fp32", "mode": "i32"}
    assert cases[1].constants["BLOCK"] == triton_lion.BLOCK and cases[1].constants["M_DTYPE"].name == "fp32"
    assert (cases[0].threads, cases[0].fp_fusion, cases[0].elements, cases[0].cached) == (256, False, 7, 0)
    promises.clear()
    assert not recorded_cases(launch_all)
