"""Bases of recipes: a built-in recipe or a file in the recipe's own folder or below, never one elsewhere."""

import os

import pytest

from leanstep.recipes.config.bases import MOST_BASES
from leanstep.recipes.config.loader import ConfigError, find_recipe, load

STEPS = "steps: 7\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder for recipes, beside a file and a folder that no recipe in it may read."""
    inside = tmp_path / "inside"
    (inside / "below").mkdir(parents=True)
    (tmp_path / "outside.yaml").write_text(STEPS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "far.yaml").write_text(STEPS)
    # a base is not looked up in the working folder
    monkeypatch.chdir(tmp_path / "other")
    return inside


def derived(folder, base, name="mine.yaml"):
    path = folder / name
    path.write_text(f"base: {base}\nseed: 3\n")
    return path


def problem(path):
    with pytest.raises(ConfigError) as caught:
        load(path)
    (line,) = caught.value.problems
    return line


@pytest.mark.parametrize("base", ["below/first.yaml", "./below/first.yaml"])
def test_a_file_below_is_a_base_and_its_own_base_lies_below_it(folder, base):
    (folder / "below" / "first.yaml").write_text("base: second.yaml\nseed: 1\n")
    (folder / "below" / "second.yaml").write_text(STEPS)
    config = load(derived(folder, base))
    assert (config.steps, config.seed) == (7, 3)


@pytest.mark.parametrize("base", ["../outside.yaml", "below/../../outside.yaml", "below/../mine2.yaml", ".."])
def test_a_path_with_dots_is_refused(folder, base):
    (folder / "mine2.yaml").write_text(STEPS)
    assert "leads out of the folder of mine.yaml: expected a built-in recipe, or a file" in problem(
        derived(folder, base)
    )


def test_an_absolute_path_is_refused_even_into_the_folder(folder):
    (folder / "first.yaml").write_text(STEPS)
    assert "leads out of the folder of mine.yaml" in problem(derived(folder, folder / "first.yaml"))
    assert "leads out of the folder of mine.yaml" in problem(derived(folder, find_recipe("llama-nano-adamw")))


def test_the_base_of_a_base_does_not_leave_its_folder_either(folder):
    (folder / "first.yaml").write_text(STEPS)
    (folder / "below" / "second.yaml").write_text("base: ../first.yaml\n")
    assert "../first.yaml leads out of the folder of second.yaml" in problem(derived(folder, "below/second.yaml"))


def test_links_are_followed_inside_the_folder_only(folder, tmp_path):
    (folder / "first.yaml").write_text(STEPS)
    (folder / "below" / "link.yaml").symlink_to(folder / "first.yaml")
    assert load(derived(folder, "below/link.yaml")).steps == 7
    (folder / "out.yaml").symlink_to(tmp_path / "outside.yaml")
    assert "out.yaml is a link out of the folder of mine.yaml" in problem(derived(folder, "out.yaml"))
    (folder / "away").symlink_to(tmp_path / "other")
    assert "away/far.yaml is a link out of the folder of mine.yaml" in problem(derived(folder, "away/far.yaml"))
    (folder / "circle.yaml").symlink_to(folder / "circle.yaml")
    assert "circle.yaml cannot be read" in problem(derived(folder, "circle.yaml"))
    (folder / "gone.yaml").symlink_to(folder / "nothing.yaml")
    assert "gone.yaml cannot be read" in problem(derived(folder, "gone.yaml"))


def test_folders_and_pipes_are_no_bases(folder):
    assert "below is a folder, expected a recipe file" in problem(derived(folder, "below"))
    os.mkfifo(folder / "pipe.yaml")
    assert "pipe.yaml is no regular file, expected a recipe file" in problem(derived(folder, "pipe.yaml"))


def test_a_recipe_that_is_itself_a_link_has_its_bases_beside_the_link(folder, tmp_path):
    (tmp_path / "other" / "linked.yaml").write_text("base: first.yaml\n")
    (folder / "first.yaml").write_text(STEPS)
    (folder / "mine.yaml").symlink_to(tmp_path / "other" / "linked.yaml")
    assert load(folder / "mine.yaml").steps == 7


def test_a_base_is_not_looked_up_in_the_working_folder(folder):
    assert "far.yaml: no such file" in problem(derived(folder, "far.yaml"))


@pytest.mark.parametrize("name", ["llama-nano-adamw", "llama-60m"])
def test_a_file_with_the_name_of_a_built_in_recipe_is_ambiguous(folder, name):
    built_in = load(name).steps
    (folder / name).mkdir()  # of a run
    assert load(derived(folder, name)).steps == built_in
    (folder / name).rmdir()
    (folder / name).write_text(STEPS)
    assert f"{name} is a built-in recipe and a file beside mine.yaml: write ./{name}" in problem(derived(folder, name))
    assert load(derived(folder, f"./{name}")).steps == 7 != built_in


def test_a_circle_of_bases_is_refused(folder):
    (folder / "first.yaml").write_text("base: below/../first.yaml\n")
    derived(folder, "second.yaml", "first.yaml")
    derived(folder, "third.yaml", "second.yaml")
    derived(folder, "first.yaml", "third.yaml")
    assert "base: first.yaml derives from itself" in problem(folder / "first.yaml")
    os.link(folder / "first.yaml", folder / "fourth.yaml")
    derived(folder, "fourth.yaml", "third.yaml")
    assert "base: fourth.yaml derives from itself" in problem(folder / "first.yaml")


def test_the_number_of_bases_in_one_line_is_limited(folder):
    (folder / "0.yaml").write_text(STEPS)
    for number in range(1, MOST_BASES + 2):
        derived(folder, f"{number - 1}.yaml", f"{number}.yaml")
    assert load(folder / f"{MOST_BASES}.yaml").steps == 7
    message = f"{MOST_BASES + 1}.yaml has more than {MOST_BASES} bases in one line"
    assert message in problem(folder / f"{MOST_BASES + 1}.yaml")


@pytest.mark.parametrize("base", ['"a\\0b"', '""', '"~/x.yaml"', '"' + "x" * 5000 + '"'])
def test_odd_names_are_told_in_a_line(folder, base):
    with pytest.raises(ConfigError) as caught:
        load(derived(folder, base))
    assert all(line.isprintable() and len(line) < 2000 for line in caught.value.problems)
