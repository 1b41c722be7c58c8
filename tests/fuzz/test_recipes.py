"""Recipes and overrides: each becomes a configuration that reads back equal, or problems of one line each."""

import pytest
import yaml
from fuzzing import COUNTS, VALUES, command_line, damaged, edits, fuzz, guarded, listing
from hypothesis import example, given
from hypothesis import strategies as st

from leanstep.recipes.config.loader import FOLDER, ConfigError, dump, load
from leanstep.recipes.config.schema import RunConfig

NAMES = ("nano/llama-nano-adamw", "nano/llama-nano-lora", "nano/llama-nano-sparse-1of16", "gpt2/distilgpt2-mfac")
TEXTS = {name: (FOLDER / f"{name}.yaml").read_text() for name in NAMES}
# pieces of references, which the strategy nests
PIECES = (
    *("${", "}", "\\", ".", "..", "[0]", "[", "]", ":", ",", "'", '"', " ", "null", "???", "{a: 1}", "x" * 3000),
    *("steps", "data", "data.seq_len", "optimizer", "name", "out", "oc.env:", "oc.decode:", "NO_SUCH_VARIABLE", "HOME"),
)
KEYS = (
    *("name", "out", "steps", "data.path", "data.seq_len", "optimizer", "optimizer.args", "optimizer.groups.0.lr"),
    *(
        "lora",
        "model.config.hidden_size",
        "expect",
        "sparsity",
        "checkpoint.resume",
        "references",
        "source_file",
        "base",
    ),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipes")
    (root / "inside").mkdir()
    (root / "outside").mkdir()
    (root / "outside" / "file").write_text("precious")
    return root / "inside", root / "outside"


def problems_or_equal(folders, path, overrides=()):
    """Load a recipe: what it is says the same when it is written and read again."""
    inside, outside = folders
    with guarded(outside=outside):
        before = listing(inside)
        try:
            config = load(path, overrides)
            text = dump(config)
        except ConfigError as error:
            assert error.problems and len(error.problems) <= 200
            for problem in error.problems:
                assert problem.isprintable() and len(problem) < 2000, problem
            COUNTS["recipes and overrides"]["refused"] += 1
            return None
        assert listing(inside) == before
    again = inside / "again.yaml"
    again.write_text(text, encoding="utf-8")
    try:
        assert dump(load(again)) == text
    finally:
        again.unlink()
    # a recipe that says something else is another recipe
    COUNTS["recipes and overrides"]["other"] += 1
    return config


@given(text=st.sampled_from(NAMES).flatmap(lambda name: damaged(TEXTS[name].encode())))
@fuzz(60)
def test_damaged_text(folders, text):
    recipe = folders[0] / "mine.yaml"
    recipe.write_bytes(text)
    problems_or_equal(folders, recipe)


@given(content=st.sampled_from(NAMES).flatmap(lambda name: edits(yaml.safe_load(TEXTS[name]))))
@fuzz(100)
def test_other_values(folders, content):
    recipe = folders[0] / "mine.yaml"
    recipe.write_text(yaml.safe_dump(content), encoding="utf-8", errors="surrogatepass")
    problems_or_equal(folders, recipe)


@given(
    overrides=st.lists(
        st.builds("{}={}".format, st.sampled_from(KEYS), VALUES | st.lists(st.sampled_from(PIECES)).map("".join))
        | st.lists(st.sampled_from((*PIECES, "=", *KEYS))).map("".join)
        | st.text(),
        max_size=4,
    )
)
@example(overrides=["0" * 5000])
@example(overrides=[".".join(["x" * 300] * 5) + "=["])
@fuzz(100)
def test_overrides(folders, overrides):
    problems_or_equal(folders, "llama-nano-adamw", overrides)


@pytest.mark.slow
@given(references=st.lists(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), min_size=1, max_size=3))
@fuzz(100)
def test_references(folders, references):
    content = yaml.safe_load(TEXTS["nano/llama-nano-adamw"])
    for key, reference in zip(("name", "description", "out"), references, strict=False):
        content[key] = reference
    recipe = folders[0] / "mine.yaml"
    recipe.write_text(yaml.safe_dump(content))
    config = problems_or_equal(folders, recipe)
    assert config is None or isinstance(config, RunConfig)


@given(text=damaged(TEXTS["nano/llama-nano-lora"].encode()), override=st.sampled_from(KEYS).map("{}=1".format))
@example(text=b"name: \xa3", override="name=1")
@fuzz(20)
def test_the_command_line_tells_it_in_lines(folders, text, override):
    recipe = folders[0] / "mine.yaml"
    recipe.write_bytes(text)
    for command in ("show", "--dry-run"):
        words = ("recipes", "show", str(recipe), override) if command == "show" else ("train", str(recipe), command)
        with guarded(outside=folders[1]):
            code, out, error = command_line(*words)
        assert code in (0, 2) and (code == 0) == (not error)
        lines = error.splitlines()
        assert code == 0 or all(
            line.isprintable() and line.startswith((str(recipe), "override: ", "error: ")) for line in lines
        )
