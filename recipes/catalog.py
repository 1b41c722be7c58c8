"""The recipes that come with the package: their names, files, and a line about each."""

from pathlib import Path

__all__ = ["recipe_names", "recipe_path"]

FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a shipped recipe. Raises KeyError for a name that is not one."""
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise KeyError(f"no recipe is named {name!r}; there are {', '.join(recipe_names())}")
    return path
