"""Kernels are verified to have no races: a planted race has a witness, and nothing counts as proved that was not."""

import json
from types import SimpleNamespace

import pytest
from planted import planted

from leanstep.kernels.triton_impl import audit
from leanstep.kernels.triton_impl._checks import barriers, execution, races

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


class InThisProcess:
    """Runs the work of a pool here."""

    def __init__(self, processes):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, work, *arguments):
        return SimpleNamespace(result=lambda: work(*arguments))

    def map(self, work, tasks, chunksize=1):
        return map(work, tasks)


def test_the_command_says_what_is_proved_and_what_is_not_covered(capsys, monkeypatch):
    from leanstep.kernels.triton_impl import _compile

    monkeypatch.setattr(audit, "_pool", InThisProcess)
    asked = ["--prove", "races", "barriers", "--target", "sm_90", "--match"]
    assert audit.main([*asked, "nm_mask_kernel s 32 bits m 2"]) == 0
    said = capsys.readouterr().out
    assert all(f"nm_mask_kernel  s 32 bits m 2  sm_90   {rung}  proved" in said for rung in ("races   ", "barriers"))
    asked = [*asked, "sparse_combination_kernel v float32 64", "--target", "gfx942"]
    assert audit.main(asked) == 3
    said = capsys.readouterr().out
    assert "not covered  unsupported, dynamic_address_overlap_unresolved" in said
    assert "gfx942: not covered, no rung takes its code" in said
    assert audit.main([*asked, "--json"]) == 3
    rows = json.loads(capsys.readouterr().out)
    assert [(row["rung"], row["verdict"]) for row in rows] == [("races", "not covered"), ("barriers", "proved")]
    assert audit.main(["--prove", "races", "--match", "no such kernel"]) == 1
    cases = _compile.cases()
    assert {cases[i].kernel for i, *_ in audit._selected(None)} == {case.kernel for case in cases}


@pytest.mark.parametrize("installed", ["0.2.0", None])
def test_a_rung_without_its_tool_or_with_another_version_says_so_and_the_others_run(monkeypatch, capsys, installed):
    def version(name):
        if installed is None:
            raise races.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(races, "version", version)
    monkeypatch.setattr(audit, "_pool", InThisProcess)
    assert audit.main(["--prove", "--target", "sm_90", "--match", "nm_mask_kernel s 32 bits m 2", "--json"]) == 2
    rows = {row["rung"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["barriers"]["verdict"] == "proved"
    for rung, tool in (("races", f"sentryward {races.VERSION}"), ("ttir", f"ttsem {execution.VERSION}")):
        assert rows[rung]["verdict"] == "not covered"
        assert f"expected {tool}, found {installed or 'none'}; pip install" in rows[rung]["reason"]


@pytest.mark.parametrize(("verdict", "code"), [("right", 3), ("wrong", 1)])
def test_a_wrong_result_of_any_configuration_is_told_and_one_that_is_not_launched_is_not_covered(
    monkeypatch, capsys, verdict, code
):
    def executed(name, target):
        proofs = ((case, "right") for case in ("s 32 bits m 2", "s 32 bits m 4")) if name == "nm_mask" else ()
        other = races.Proof(kernel="other", label="", target=target, verdict=verdict, rung="ttir", reason=name)
        names = dict(kernel="nm_mask_kernel", target=target, rung="ttir", reason=name)
        return [other, *(races.Proof(**names, label=label, verdict=said) for label, said in proofs)]

    monkeypatch.setattr(audit, "_pool", InThisProcess)
    monkeypatch.setattr(execution, "missing", lambda: "")
    monkeypatch.setitem(audit.RUNGS, "ttir", lambda: "")
    monkeypatch.setattr(execution, "execute", executed)
    assert audit.main(["--prove", "ttir", "--target", "sm_90", "--match", "nm_mask_kernel s 32", "--json"]) == code
    rows = {(row["kernel"], row["label"]): row for row in json.loads(capsys.readouterr().out)}
    assert rows["nm_mask_kernel", "s 32 bits m 2"]["verdict"] == "right"
    assert rows["nm_mask_kernel", "s 32 bits m 8"]["reason"] == "no operation of the check launches it"
    assert (("other", "") in rows) == (verdict == "wrong")


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
