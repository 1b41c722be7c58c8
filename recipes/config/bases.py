"""Find the file that ``base:`` of a recipe names: a built-in recipe, or a file in the recipe's own folder or below."""

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

MOST_BASES = 8  # in one line of descent


def find_base(name: str, recipe: Path, derived: Sequence[Path], built_in: Mapping[str, Path]) -> Path | None:
    """Return the file of the base ``name`` of ``recipe``, or None if there is neither a recipe nor a file of that name.

    Args:
        name: a built-in recipe, or a path relative to the folder of ``recipe`` that does not leave it.
        recipe: the file that names the base.
        derived: the files derived from ``recipe``, the first one first.
        built_in: the files of the built-in recipes, aliases included.

    Raises:
        ValueError: the path is absolute, has ``..``, or leads out of the folder through a link; a file has the name of
            a built-in recipe; the base is one of the files derived from it, or the line has more than
            :data:`MOST_BASES` bases.
    """
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(
            f"{name} leads out of the folder of {recipe.name}: expected a built-in recipe, or a file in that folder or "
            "below; copy the base there"
        )
    beside = recipe.parent / path
    exists = os.path.lexists(beside)
    if name in built_in:
        # a folder cannot be a base: it may be that of a run, which has the recipe's name
        if exists and not beside.is_dir() and not _is_same(beside, built_in[name]):
            raise ValueError(
                f"{name} is a built-in recipe and a file beside {recipe.name}: write ./{name} for the file, or rename "
                "the file to use the built-in recipe"
            )
        base = built_in[name]
    elif exists:
        base = beside
        _refuse_outside(name, base, recipe)
    else:
        return None
    line = (*derived, recipe)
    if any(_is_same(base, other) for other in line):
        raise ValueError(f"{name} derives from itself")
    if len(line) > MOST_BASES:
        raise ValueError(f"{line[0].name} has more than {MOST_BASES} bases in one line: write their values into fewer")
    return base


def _refuse_outside(name: str, base: Path, recipe: Path) -> None:
    """Raise ValueError for a link that leads out of the folder of ``recipe``, or anything but a regular file."""
    try:
        target, mode = base.resolve(strict=True), os.stat(base).st_mode
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise ValueError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not target.is_relative_to(recipe.parent.resolve()):
        raise ValueError(
            f"{name} is a link out of the folder of {recipe.name}: expected a file in it or below; copy it there"
        )
    if not stat.S_ISREG(mode):
        raise ValueError(f"{name} is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}, expected a recipe file")


def _is_same(first: Path, second: Path) -> bool:
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False
