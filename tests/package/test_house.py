"""The house does not grow: lines, listings, parameters, circles, declarations and calls may only fall.

``python benchmarks house`` prints the numbers, and what is behind them; with ``--write`` it lowers the limits.
"""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMITS = json.loads((Path(__file__).parent / "house.json").read_text("utf-8"))
# whole new capabilities that needed room which nothing else could make: name of the number -> {capability: by how much}
CAPABILITIES: dict[str, dict[str, int]] = {
    "lines of benchmarks/": {
        "QLoRA of 7B merged in the host": 30,
        "why LANTON trails Muon": 3,
        "the ladder as one command, to kernels/": -593,
        "time per launch, reads of the device, whole tiles": 86,
        "what a new user met": 2,
        "missing barriers": 15,
        "SinkGD without a rate, adapters by width": 2,
        "allocation and training crossed": 104,
        "codes by the largest error": 199,
        "a mixture, RMNP, MuonEq, LionMuon": 140,
        "cards of offline models, MiniLM measured": 128,
        "LANTON without a rate": 6,
        "accuracy in the evidence of pruning": 80,
        "NorMuon, to optimizers/": -61,
        "memory and time by model size": 80,
        "the corpus of English text, once of the package": 341,
        "AdamW's rates carried over": 129,
        "local reconstruction": 12,
        "compress": 320,
        "planted faults of kernels": 279,
        "costs of kernels": 210,
        "steps on the host": 120,
        "memory of steps on the host": 24,
        "intermediate code executed": 147,
        "costs for four targets": 2,
    },
    "lines of optimizers/": {
        "the plugin of axolotl, to leanstep/": -40,
        "what a new user met": 23,
        "SinkGD without a rate, adapters by width": 9,
        "LANTON with few launches": 31,
        "where find_lr and Lion start": 4,
        "LANTON without a rate": 30,
        "NorMuon, from benchmarks/": 57,
        "parameters without names": 133,
        "where LANTON starts": 2,
        "optimizers to compare with, from recipes/": 232,
        "AdamW's rates carried over": 127,
        "optimizer_of, axolotl": 90,
        "learning rates by short runs": 269,
    },
    "lines of leanstep/": {
        "the plugin of axolotl, from optimizers/": 40,
        "runs without a model named": 3,
        "speed and errors in cards, the time of a run first": 11,
        "what a new user met": 25,
        "recipe keys": 14,
        "parameters without names": 1,
        "GGUF folders opened": 9,
        "QLoRA": 7,
        "GGUF files": 1196,
        "compress": 14,
        "model cards": 137,
        "learning rates by short runs": 4,
        "leanstep runs": 29,
        "leanstep board": 32,
    },
    "lines of pruning/": {
        "runs without a model named": 2,
        "transformers 5.25": 6,
        "speed and errors in cards, the time of a run first": 42,
        "GGUF folders opened": 3,
        "tasks of prune and compress": 28,
        "local reconstruction": 438,
        "compress": 930,
        "compress to sparse files": 340,
        "embedding models and classifiers": 395,
    },
    "lines of sparsity/": {
        "transformers 5.25": 4,
        "compress to sparse files": 59,
        "model cards": 5,
        "sparse products prepared once": 1,
    },
    "lines of kernels/": {
        "transformers 5.25": 14,
        "the ladder as one command, from benchmarks/": 693,
        "missing barriers": 481,
        "LANTON with few launches": 15,
        "kernel proofs": 232,
        "sparse products prepared once": 58,
        "races excluded": 442,
    },
    "lines of recipes/": {
        "QLoRA of 7B merged in the host": 3,
        "speed and errors in cards, the time of a run first": 42,
        "conversations in eval": 27,
        "what a new user met": 11,
        "standard errors of validation losses, holders of run folders": 25,
        "a failed start leaves no folder": 5,
        "QLoRA": 135,
        "tasks of prune and compress": 79,
        "adapters in generate": 33,
        "recipe keys": 38,
        "optimizers to compare with, to optimizers/": -188,
        "generate --chat": 92,
        "AdamW's rates carried over": 22,
        "local reconstruction": 13,
        "compress": 105,
        "model cards": 42,
        "learning rates by short runs": 203,
        "leanstep runs": 131,
        "leanstep board": 340,
        "trackers by name": 83,
        "tasks": 198,
        "chat recipes": 26,
        "embedding models and classifiers": 156,
    },
    "lines of the package": {
        "runs without a model named": 5,
        "transformers 5.25": 25,
        "QLoRA of 7B merged in the host": 6,
        "the ladder as one command, from benchmarks/": 693,
        "speed and errors in cards, the time of a run first": 119,
        "conversations in eval": 27,
        "what a new user met": 38,
        "missing barriers": 477,
        "SinkGD without a rate, adapters by width": 9,
        "LANTON with few launches": 31,
        "standard errors of held-out losses": 33,
        "LANTON without a rate": 30,
        "a failed start leaves no folder": 5,
        "GGUF folders opened": 3,
        "NorMuon, from benchmarks/": 57,
        "parameters without names": 134,
        "where LANTON starts": 2,
        "QLoRA": 160,
        "tasks of prune and compress": 114,
        "recipe keys": 52,
        "adapters in generate": 33,
        "optimizers to compare with": 43,
        "GGUF files": 1193,
        "generate --chat": 92,
        "AdamW's rates carried over": 149,
        "optimizer_of, axolotl": 56,
        "local reconstruction": 456,
        "compress": 1045,
        "compress to sparse files": 373,
        "model cards": 266,
        "kernel proofs": 188,
        "races excluded": 442,
        "sparse products prepared once": 59,
        "learning rates by short runs": 479,
        "leanstep runs": 159,
        "leanstep board": 372,
        "trackers by name": 83,
        "tasks": 198,
        "chat recipes": 26,
        "embedding models and classifiers": 551,
    },
    "lines of lora/": {"QLoRA of 7B merged in the host": 3, "model cards": 7, "QLoRA": 15},
    "lines of C++": {
        "NEON": 132,
        "products of bit masks by AVX2's byte shuffles": 65,
        "int4 by AVX2's byte shuffles": 39,
    },
    "lines of tests/": {
        "runs without a model named": 8,
        "MiniLM over seeds": 3,
        "numbers of other processors": 8,
        "transformers 5.25": 25,
        "QLoRA of 7B merged in the host": 7,
        "NEON in an emulator": 118,
        "the ladder as one command": 41,
        "speed and errors in cards, the time of a run first": 88,
        "conversations in eval": 13,
        "what a new user met": 40,
        "missing barriers": 50,
        "SinkGD without a rate, adapters by width": 26,
        "codes by the largest error": 34,
        "allocation and training crossed": 23,
        "one format for all": 20,
        "faults that no test noticed": 24,
        "a mixture, RMNP, MuonEq, LionMuon": 47,
        "where find_lr and Lion start": 49,
        "LANTON with few launches": 36,
        "intermediate code executed": 56,
        "entries of this table, once more": 31,
        "standard errors of validation losses, MiniLM measured": 53,
        "LANTON without a rate": 24,
        "steps declared once": 49,
        "costs of kernels": 45,
        "accuracy in the evidence of pruning": 22,
        "NorMuon, from benchmarks/": 11,
        "parameters without names": 74,
        "full state of M-FAC": 6,
        "entries of this table, again": 13,
        "26 more architectures": 22,
        "QLoRA": 103,
        "entries of this table": 52,
        "tasks of prune and compress": 32,
        "recipe keys": 50,
        "adapters in generate": 67,
        "optimizers to compare with": 39,
        "GGUF files": 573,
        "English text": 24,
        "generate --chat": 61,
        "AdamW's rates carried over": 136,
        "local reconstruction": 226,
        "compress": 545,
        "compress to sparse files": 75,
        "sparse products prepared once": 48,
        "model cards": 103,
        "kernel proofs": 81,
        "races excluded": 334,
        "steps on the host": 35,
        "learning rates by short runs": 249,
        "leanstep runs": 104,
        "leanstep board": 430,
        "trackers by name": 71,
        "tasks": 167,
        "chat recipes": 22,
        "embedding models and classifiers": 232,
    },
}


@pytest.fixture(scope="module")
def house():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import house

        yield house


@pytest.fixture(scope="module")
def numbers(house):
    return house.counts()


@pytest.mark.parametrize("name", LIMITS)
def test_no_number_rises(name, numbers):
    limit = LIMITS[name] + sum(CAPABILITIES.get(name, {}).values())
    assert numbers[name] <= limit, (
        f"{name}: {numbers[name]}, at most {limit}. Make room first: say a fact once, drop an option that no "
        "measurement and no recipe needs, merge what is the same. A whole new capability gets a line in CAPABILITIES. "
        "What is behind the number: python benchmarks house"
    )


def test_every_number_has_a_limit(numbers):
    assert set(numbers) == set(LIMITS) and set(CAPABILITIES) <= set(LIMITS)


def test_circles_are_found(house):
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"e2"}, "e2": {"e"}}
    assert house.circles(graph) == [["a", "b", "c"], ["e", "e2"]]


def test_every_mutant_can_be_made():
    """``python -P tests/helpers/mutants.py`` makes them, and says which no test notices."""
    for name, entry in json.loads((ROOT / "tests" / "mutants.json").read_text("utf-8")).items():
        text = (ROOT / name).read_text("utf-8")
        assert all(text.count(before) == 1 and before != after for before, after in entry["changes"]), name
        assert all((ROOT / test).is_file() for test in entry["tests"]), name
