"""Runs with a `sparsity:` section: from the recipe's mistakes to a folder that transformers opens."""

import json
from functools import partial

import pytest
import torch
from faults import fsdp2_on_cpu, held_at
from safetensors.torch import load_file
from training import Training, numbers, read_log, run, write_recipe
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from leanstep.cli import main
from leanstep.recipes.check.check import Check
from leanstep.recipes.check.costs import estimate
from leanstep.recipes.config.differences import config_differences
from leanstep.recipes.config.loader import ConfigError, dump, load
from leanstep.recipes.config.schema import RunConfig, SparsityConfig
from leanstep.recipes.methods.sparse import build_controller, run_operations, schedule_of
from leanstep.recipes.report.report import write_report
from leanstep.sparsity import NM, is_nm, nm_mask
from leanstep.sparsity.training.methods import METHODS

SPARSE = "sparsity.patterns={'*.mlp.*': '1:8', '*.attn.c_attn': '2:4'}"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def problems(*overrides):
    with pytest.raises(ConfigError) as caught:
        load("llama-nano-sparse-1of16", overrides)
    return caught.value.problems


def test_mistakes_are_named_before_torch_is_imported():
    assert "got 16; put it in quotes" in problems("sparsity.patterns={'*.mlp.*': 16}")[0]
    assert "keeps 5 of 4; expected 0 < N <= M" in problems("sparsity.patterns={'*': '5:4'}")[0]
    assert "must be 'ste', 'srste'" in problems("sparsity.method=slow")[0]
    assert "did you mean 'sparsity.alpha_end'" in problems("sparsity.alpha_ends=1")[0]
    assert "must be at most 1 together, got 0.6 and 0.5" in problems("sparsity.dense=0.5", "sparsity.finetune=0.6")[0]
    assert "is for the methods with mdgf-linear or mdgf-exponential" in problems("sparsity.method=srste")[0]
    assert problems("sparsity.coarsest=6") == ["override: sparsity.coarsest must be a power of two, got 6"]
    assert (
        "must be greater than 0"
        in problems("sparsity.method=sdgf-geometric+mdgf-exponential", "sparsity.alpha_end=0")[0]
    )
    assert "says the same thing as sparsity.decay" in problems("sparsity.decay=0.1")[0]
    assert "masks cannot be renewed" in "".join(problems("release_gradients=true"))
    ste = ("sparsity.method=s-ste", "sparsity.alpha_end=null")
    assert "does not go with sparsity.method s-ste, got 'decay'" in problems(*ste, "sparsity.grad_flow=decay")[0]


def test_patterns_need_no_quotes():
    # YAML 1.1 reads 1:16 as a number of base sixty
    config = load("llama-nano-adamw", ["sparsity.patterns={'*.mlp.*': 1:16, '*.self_attn.*': 2:4}"])
    assert config.sparsity.patterns == {"*.mlp.*": "1:16", "*.self_attn.*": "2:4"}


def test_the_section_knows_every_method_and_says_nothing_where_it_is_empty():
    for method in METHODS:
        assert SparsityConfig(method=method).method == method
    assert RunConfig().sparsity.patterns == {}
    config = load("llama-nano-adamw")
    # recipes saved before the section existed
    before = {key: value for key, value in json.loads(json.dumps(_tree(config))).items() if key != "sparsity"}
    assert config_differences(before, config) == ([], [])
    changed = load("llama-nano-adamw", ["sparsity.patterns={'*.mlp.*': '2:4'}"])
    forbidden, _ = config_differences(before, changed)
    assert any(line.startswith("sparsity.patterns") for line in forbidden)


def _tree(config):
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.create(dump(config)))


@pytest.mark.slow
def test_check_tells_layers_schedule_and_operations(tmp_path):
    config = load("llama-nano-sparse-1of16", [f"out={tmp_path / 'run'}"])
    section = next(section for section in Check(config).sections() if section.title == "Sparsity")
    text = "\n".join(section.lines)
    assert not section.problems
    assert "mdgf-exponential" in text and "0 steps dense, 540 on the way, 60 at the end" in text
    assert "1:16" in text and "589,824" in text and "model.layers.0.mlp.gate_proj" in text
    wrong = load("llama-nano-sparse-1of16", ["sparsity.patterns={'*.ffn.*': '1:16'}", f"out={tmp_path / 'run'}"])
    found = next(section for section in Check(wrong).sections() if section.title == "Sparsity").problems
    assert "'*.ffn.*'" in found[0] and "model.layers.0.mlp.up_proj" in found[0]
    sparse, dense = estimate(config, 2048), estimate(load("llama-nano-adamw"), 2048)
    assert sparse.sparsity == 589_824 * 5 and dense.sparsity == 0
    assert sparse.peak > dense.peak


def test_transposable_masks_count_in_both_products(tmp_path):
    """Operations for hardware: those of 2:4 layers halve in the forward pass, and in the input's gradient too."""
    saved = []
    for score in ("magnitude", "transposable"):
        changes = ["sparsity.patterns={'*.mlp.*': '2:4'}", "sparsity.method=ste", "sparsity.alpha_end=null"]
        config = load("llama-nano-sparse-1of16", [*changes, f"sparsity.score={score}", f"out={tmp_path / score}"])
        model = LlamaForCausalLM(LlamaConfig(**config.model.config, vocab_size=64))
        controller = build_controller(config, model)
        layer = controller.layers[0]
        assert is_nm(layer.transform.mask, "2:4") and is_nm(layer.transform.mask.mT, "2:4") == (score == "transposable")
        operations = run_operations(config, controller.layers, 10**7)
        saved.append(operations.dense - operations.hardware)
    assert saved[1] == 2 * saved[0]


def test_structure_and_decay_in_one_recipe():
    changes = ["sparsity.method=sdgf-geometric+mdgf-linear", "sparsity.coarsest=4", "sparsity.alpha_end=1e-2"]
    schedule = schedule_of(load("llama-nano-sparse-1of16", changes))
    assert [str(pattern) for pattern in schedule.frames(NM(1, 16))] == ["4:64", "2:32", "1:16"]
    assert 0 < schedule.at(300, NM(1, 16)).alpha < 1


METHOD_CASES = [
    ("srste", []),
    ("sdgf-geometric", ["sparsity.score=gradient", "sparsity.mask_every=2"]),
    (
        "sdgf-stepwise+mdgf-exponential",
        ["sparsity.score=transposable", "sparsity.alpha_end=1e-3", "sparsity.finetune=0.25"],
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "more"), METHOD_CASES, ids=[name for name, _ in METHOD_CASES])
def test_a_killed_run_continues_as_if_it_had_not_been(recipe, tmp_path, method, more):
    # 8 sequences a step: accumulation 2
    options = [SPARSE, f"sparsity.method={method}", *more, "steps=12"]
    straight = run(recipe, options, tmp_path / "straight")
    assert straight.codes == [0], straight.text()
    broken = Training(recipe, options, tmp_path / "broken", prepare=partial(held_at, 8))
    broken.wait_for(lambda training: training.last_step() >= 7)
    broken.kill()
    broken.wait()
    again = run(recipe, options, tmp_path / "broken")
    assert again.codes == [0] and "resuming from" in again.text(), again.text()
    assert numbers(tmp_path / "broken") == numbers(tmp_path / "straight")
    sparse = [[row.get("sparsity") for row in read_log(tmp_path / name)] for name in ("broken", "straight")]
    assert sparse[0] == sparse[1] and any(sparse[0])
    weights = [load_file(tmp_path / name / "final" / "model.safetensors") for name in ("broken", "straight")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


FINISHED = [SPARSE, "sparsity.method=mdgf-linear", "sparsity.finetune=0.25", "steps=12"]


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("sparse") / "run"
    training = run(recipe, [*FINISHED, "checkpoint.keep_last=9"], out)
    assert training.codes == [0], training.text()
    return training


def test_the_result_is_an_ordinary_folder_with_exact_zeros(finished, capsys):
    out = finished.out
    model = AutoModelForCausalLM.from_pretrained(out / "final")
    assert main(["verify", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "6 of 6 obey the expected pattern" in printed
    weight = model.transformer.h[0].mlp.c_fc.weight
    assert int((weight == 0).sum()) == weight.numel() * 7 // 8
    assert "sparsity    mdgf-linear: " in finished.text()
    # the checkpoint's own folder, too, evaluates as the run did
    last = AutoModelForCausalLM.from_pretrained(out / "last" / "hf")
    tokens = torch.arange(32).view(1, -1)
    assert torch.equal(model(tokens).logits, last(tokens).logits)


def test_a_checkpoint_on_the_way_is_what_the_run_computed_with(finished):
    # after step 3 of 9 the weights outside the mask have faded to two thirds, and no file calls them 1:8
    folder = finished.out / "checkpoints" / "step-000003"
    assert not (folder / "hf" / "sparsity.json").exists() and (finished.out / "last/hf/sparsity.json").exists()
    faded = load_file(folder / "hf" / "model.safetensors")["transformer.h.0.mlp.c_fc.weight"]
    dense = load_file(folder / "trainer" / "sparsity.safetensors")
    dense = dense["transformer.h.0.mlp.c_fc.parametrizations.weight.original"]
    mask = nm_mask(dense, "1:8", axis="out")  # stored (in, out)
    torch.testing.assert_close(faded, torch.where(mask, dense, dense * (2 / 3)))


def test_log_and_report_show_sparsity(finished):
    rows = [row for row in read_log(finished.out) if row["kind"] == "train"]
    assert rows[-1]["sparsity"]["sparsity/all"] == pytest.approx(
        (2 * 2 * 32 * 128 * 7 / 8 + 2 * 32 * 96 / 2) / (2 * 11264)
    )
    assert rows[0]["sparsity"]["alpha/1:8"] < 1 and rows[-1]["sparsity"]["alpha/1:8"] == 0
    for what in ("sparsity", "flip_rate", "kept_magnitude", "gradient_noise"):
        assert 0 <= rows[-1]["sparsity"][f"{what}/transformer.h.0.mlp.c_fc"] <= 1
    content = json.loads((finished.out / "sparsity_report.json").read_text())
    assert len(content["layers"]) == 6 and {row["target"] for row in content["layers"]} == {"1:8", "2:4"}
    counted = content["operations"]
    assert counted["theoretical"] < counted["hardware"] < counted["dense"]
    page = write_report([finished.out], finished.out / "again.html").read_text()
    assert "<h2>Sparsity</h2>" in page and "theoretical" in page
    assert all(f"Sparsity: {what}" in page for what in ("sparsity", "flip_rate", "kept_magnitude", "gradient_noise"))


@pytest.mark.slow
def test_a_sharded_run_that_is_killed_trains_as_one_process_does(recipe, tmp_path):
    # GPT-2 keeps its weights as (in, out): rows that are shared out would cut groups, which is refused
    llama = "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}"
    options = [f"model={{family: llama, config: {llama}}}", "sparsity.patterns={'*.mlp.*': '1:8', '*.q_proj': '2:4'}"]
    options += ["sparsity.method=mdgf-linear", "sparsity.finetune=0.25", "sparsity.srste_lambda=1e-3", "steps=12"]
    alone = run(recipe, options, tmp_path / "alone")
    assert alone.codes == [0], alone.text()
    options += ["distributed.strategy=fsdp2"]
    sharded = Training(recipe, options, tmp_path / "sharded", world=2, prepare=partial(held_at, 10, fsdp2_on_cpu))
    sharded.wait_for(lambda training: training.last_step() >= 8, timeout=180)
    sharded.kill(1)
    assert 0 not in sharded.wait()
    again = run(recipe, options, tmp_path / "sharded", world=2, prepare=fsdp2_on_cpu)
    assert again.codes == [0, 0] and "resuming from" in again.text(), again.text()
    # kind, step, loss; the order of additions differs, and with it the choice between weights of almost one size
    for one, other in zip(numbers(alone.out)[:-1], numbers(again.out)[:-1], strict=True):
        assert one[:2] == other[:2] and one[2] == pytest.approx(other[2], rel=2e-3)
    assert main(["verify", str(again.out)]) == 0
