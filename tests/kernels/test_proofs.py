"""Kernels are verified to have no races: a planted race has a witness, and nothing counts as proved that was not."""

import json

import pytest
from planted import planted

from leanstep.kernels.triton_impl import audit
from leanstep.kernels.triton_impl._checks import barriers, races

pytest.importorskip("triton")
pytest.importorskip("sentryward")


@pytest.fixture(autouse=True)
def _uncached():
    from leanstep.kernels.triton_impl import _compile

    yield
    _compile.cases.cache_clear()


def proof(module, kernel, words="", target="sm_90"):
    from leanstep.kernels.triton_impl import _compile

    cases = _compile.recorded_cases(module.audit_launches)
    case = next(c for c in cases if c.kernel.__name__ == kernel and words in c.label)
    return races.prove(case, target, _compile.compile_case(case, target).asm["ptx"])


@pytest.mark.parametrize("target", races.TARGETS)
def test_clean_kernels_are_proved(target):
    from leanstep.kernels.triton_impl.lora import swiglu

    found = proof(swiglu, "swiglu_backward_kernel", "bfloat16", target)
    assert (found.verdict, found.reason) == (races.PROVED, "")


def test_a_kernel_that_reads_pointers_from_a_table_is_proved_within_its_time(monkeypatch):
    from leanstep.kernels.triton_impl.steps import scaled_step

    assert proof(scaled_step, "scaled_step_kernel", "nearest").verdict == races.PROVED
    monkeypatch.setattr(races, "_MOST_TIME", 0)
    assert proof(scaled_step, "scaled_step_kernel", "nearest").verdict == races.NOT_COVERED


# (module, kernel, words of its configuration, verdict): copies; a product in shared memory; a loop, with bytes that
# warps store together; an end that depends on data
BARRIERS = [
    ("matrices.newton_schulz", "symmetric_product_kernel", "wide bfloat16 aligned", races.PROVED),
    ("lora.products", "lora_up_kernel", "up bf16 rank 16", races.PROVED),
    ("nm.matmul", "nm_matmul_kernel", "x bfloat16", races.CONDITIONAL),
    ("steps.scaled_step", "scaled_step_kernel", "nearest", races.PROVED),
]


@pytest.mark.parametrize(("name", "kernel", "words", "verdict"), BARRIERS)
def test_the_first_and_the_last_barrier_are_missed_where_they_are_taken_away(name, kernel, words, verdict):
    import importlib

    from leanstep.kernels.triton_impl import _compile

    module = importlib.import_module(f"leanstep.kernels.triton_impl.{name}")
    cases = _compile.recorded_cases(module.audit_launches)
    case = next(c for c in cases if c.kernel.__name__ == kernel and words in c.label)
    ptx = _compile.compile_case(case, "sm_90").asm["ptx"]
    assert barriers.prove(case, "sm_90", ptx).verdict == verdict
    first, last = ptx.partition("\tbar.sync \t0;"), ptx.rpartition("\tbar.sync \t0;")
    for whole in (first, last):
        proof = barriers.prove(case, "sm_90", whole[0] + whole[2])
        assert proof.verdict == races.RACE and proof.reason.startswith("no barrier between the ")
    unknown = ptx.replace("\tbar.sync \t0;", "\tbarrier.cluster.arrive;", 1)
    assert barriers.prove(case, "sm_90", unknown).verdict == races.NOT_COVERED


# (module, kernel, what stands there, its replacement, the place of both stores)
PLANTED = [
    ("lora.swiglu", "swiglu_kernel", r"tl\.program_id\(0\)\.to\(tl\.int64\) \* BLOCK", "0", "swiglu"),
    ("steps.scaled_step", "scaled_step_kernel", r" \* ROWS\n", " * (ROWS - 1)\n", "scaled_step"),
]


@pytest.mark.parametrize(("name", "kernel", "pattern", "replacement", "place"), PLANTED)
def test_a_planted_overlap_is_found_with_both_accesses(tmp_path, name, kernel, pattern, replacement, place):
    import importlib

    module = importlib.import_module(f"leanstep.kernels.triton_impl.{name}")
    found = proof(planted(module, pattern, replacement, 0, tmp_path), kernel)
    assert found.verdict == races.RACE
    assert "write at planted_" + place in found.reason and "by program 0" in found.reason
    assert "by program 1" in found.reason


def test_the_command_says_what_is_proved_and_what_is_not_covered(capsys, monkeypatch):
    from leanstep.kernels.triton_impl import _compile

    def in_this_process(work, targets, match, processes):
        return [work((i, target)) for i in audit._matching(match) for target in targets]

    monkeypatch.setattr(audit, "_in_processes", in_this_process)
    assert audit.main(["--prove", "--match", "nm_mask_kernel s 32 bits m 2", "--target", "sm_90"]) == 0
    said = capsys.readouterr().out
    assert all(f"nm_mask_kernel  s 32 bits m 2  sm_90   {rung}  proved" in said for rung in ("races   ", "barriers"))
    asked = ["--prove", "--match", "sparse_combination_kernel v float32 64", "--target", "sm_90", "--target", "gfx942"]
    assert audit.main(asked) == 3
    said = capsys.readouterr().out
    assert "not covered  unsupported, dynamic_address_overlap_unresolved" in said
    assert "gfx942: not covered, both rungs read PTX alone" in said
    assert audit.main([*asked, "--json"]) == 3
    rows = json.loads(capsys.readouterr().out)
    assert [(row["rung"], row["verdict"]) for row in rows] == [("races", "not covered"), ("barriers", "proved")]
    assert audit.main(["--prove", "--match", "no such kernel"]) == 1
    cases = _compile.cases()
    assert {cases[i].kernel for i in audit._matching(None)} == {case.kernel for case in cases}


@pytest.mark.parametrize("installed", ["0.2.0", None])
def test_without_the_tool_or_with_another_version_the_command_says_so(monkeypatch, capsys, installed):
    def version(name):
        if installed is None:
            raise races.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(races, "version", version)
    assert audit.main(["--prove"]) == 2
    said = capsys.readouterr().err
    assert f"expected sentryward {races.VERSION}, found {installed or 'none'}" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("result", "checks", "verdict"),
    [
        ("race_free", {"synchronization": "passed", "memory": "passed"}, races.PROVED),
        ("race_free", {"synchronization": "passed", "memory": "incomplete"}, races.NOT_COVERED),
        ("timeout", {"synchronization": "passed", "memory": "passed"}, races.NOT_COVERED),
        ("not_wellsynced", {"synchronization": "failed", "memory": "not_run"}, races.RACE),
    ],
)
def test_only_a_complete_run_is_a_proof(result, checks, verdict):
    assert races._verdict({"result": result, "checks": checks}) == verdict
