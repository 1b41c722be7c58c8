"""The vocabulary: N:M patterns, and which layer gets which."""

import pytest

from leanstep.sparsity import NM, match_patterns

LAYERS = ["embed", "block.0.attn.q_proj", "block.0.mlp.up", "block.0.mlp.down", "head"]


def test_a_pattern_says_what_it_keeps():
    pattern = NM(2, 8)
    assert (pattern.density, pattern.sparsity, str(pattern)) == (0.25, 0.75, "2:8")
    assert NM.parse(" 1:16 ") == NM(1, 16)
    assert pattern.scaled(4) == NM(8, 32)
    assert NM(4, 4).is_dense and not pattern.is_dense
    assert NM(0, 4).density == 0
    assert len({NM(2, 4), NM.parse("2:4"), NM(4, 8)}) == 2


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((2, 10**30), ValueError),
        ((5, 4), ValueError),
        ((-1, 4), ValueError),
        ((0, 0), ValueError),
        ((1.0, 4), TypeError),
        ((True, 4), TypeError),
    ],
)
def test_numbers_that_are_no_pattern(arguments, error):
    with pytest.raises(error, match=r"^NM: "):
        NM(*arguments)


@pytest.mark.parametrize("text", ["2/4", "2:4:8", "", "a:b", "-1:4", f"2:1{'0' * 30}", "1:" + "9" * 5000])
def test_texts_that_are_no_pattern(text):
    with pytest.raises(ValueError, match="expected 'N:M'") as error:
        NM.parse(text)
    assert len(str(error.value)) < 200


def test_the_first_rule_that_matches_decides():
    rules = {"*.down": "2:4", "*.mlp.*": NM(1, 8), "*_proj": "1:4"}
    assert match_patterns(LAYERS, rules) == {
        "block.0.attn.q_proj": NM(1, 4),
        "block.0.mlp.up": NM(1, 8),
        "block.0.mlp.down": NM(2, 4),
    }
    assert match_patterns(LAYERS, "2:4") == dict.fromkeys(LAYERS, NM(2, 4))


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ({"*.MLP.*": "2:4"}, ValueError, r"'\*\.MLP\.\*' \(pattern 2:4\) matches no layer; the names are 'embed', "),
        ({"*.mlp.*": "2:4", "*.up": "1:4"}, ValueError, r"earlier rules took 'block\.0\.mlp\.up'"),
        ({}, ValueError, "at least one rule"),
        ({"head": 4}, TypeError, "expected an N:M pattern"),
        ({"head": "8:4"}, ValueError, "n = 8, m = 4"),
    ],
)
def test_rules_that_cannot_be_meant(rules, error, message):
    with pytest.raises(error, match=message):
        match_patterns(LAYERS, rules)


def test_a_message_about_many_names_is_short():
    with pytest.raises(ValueError, match="and 60 more"):
        match_patterns([f"layer.{i}" for i in range(100)], {"x": "2:4"})
