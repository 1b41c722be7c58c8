"""Values that no run can have are refused by arithmetic, and wrong selectors before the text is read."""

import pytest
from training import run, write_recipe

from leanstep.recipes.check import check as check_module
from leanstep.recipes.config.loader import ConfigError, load

IMPOSSIBLE = {
    "model.config.hidden_act=gleu": "did you mean 'gelu'",
    "model.config.head_dim=7": "must be even",
    "model.config={hidden_size: 12, num_attention_heads: 4}": "must be even",
    "model.config.num_hidden_layers=1000000000": "must be at most 1,000",
    "model.config={hidden_size: 1048576, intermediate_size: 1048576, num_hidden_layers: 1000}": "makes a model of",
    "model.config.vocab_size=4611686018427387904": "must be at most 16,777,216",
    "batch.tokens_per_step=4611686018427387904": "at most 1099511627776",
    "data.seq_len=4611686018427387904": "at most 16777216",
    "data.tokenizer=train:4611686018427387904": "at most 16,777,216",
    "steps=1000000000000": "at most 1000000000",
    "optimizer={name: sinkgd, args: {num_iters: 1000000000000}}": "at most 1,000 iterations",
    "optimizer={name: muon, args: {ns_steps: 1000000000000}}": "at most 1,000 iterations",
    "sparsity.patterns={'*': '1:99999999999'}": "M at most 65,536",
    "lora={target_modules: [q_proj], r: 4611686018427387904}": "at most 65536",
}


@pytest.mark.parametrize("override", IMPOSSIBLE)
def test_impossible_values_are_refused_before_anything_is_built(override):
    with pytest.raises(ConfigError) as refused:
        load("llama-nano-adamw", [override])
    key = override.partition("=")[0].partition(".")[0]
    assert any(IMPOSSIBLE[override] in problem and key in problem for problem in refused.value.problems), refused.value


SELECTORS = {
    "sparsity.patterns={'*.nosuch': '2:4'}": "nosuch",
    "optimizer.groups=[{match: nosuch, lr: 0.1}]": "nosuch",
    "sparsity.patterns={'*': '3:5'}": "5",
}


@pytest.mark.parametrize("override", SELECTORS)
def test_wrong_selectors_are_told_before_the_text_is_read(override, tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path)
    monkeypatch.setattr(check_module, "load_data", lambda *arguments, **options: pytest.fail("it reads the text"))
    assert check_module.check(load(recipe, [override, f"out={tmp_path / 'run'}"])) == 1
    told = capsys.readouterr().out.partition("problem")[2]
    assert SELECTORS[override] in told
    (tmp_path / "text.txt").unlink()
    training = run(recipe, [override], tmp_path / "run")
    assert training.codes == [2] and SELECTORS[override] in training.text() and "text.txt" not in training.text()
