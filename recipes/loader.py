"""Read a recipe file and command-line overrides into a frozen :class:`~leanstep.recipes.config.RunConfig`."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from leanstep.recipes.config import RunConfig

__all__ = ["ConfigError", "dump", "load"]


class ConfigError(ValueError):
    """A recipe that cannot be run; ``problems`` holds one line for each thing wrong with it."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def load(name_or_path: str, overrides: Sequence[str] = (), *, world_size: int = 1) -> RunConfig:
    """Load a shipped recipe by name, or a file, with ``key.path=value`` overrides applied.

    Raises ConfigError.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = Path(name_or_path)
    if not path.exists():
        path = Path(__file__).parent / f"{name_or_path}.yaml"
    if not path.exists():
        raise ConfigError([f"no recipe or file named {name_or_path!r}"])
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(RunConfig),
            {"name": path.stem},
            OmegaConf.load(path),
            OmegaConf.from_dotlist(list(overrides)),
        )
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError([f"{path}: {error}"]) from None
    assert isinstance(config, RunConfig)
    return replace(config, source_file=str(path))


def dump(config: RunConfig) -> str:
    """The resolved configuration as YAML that :func:`load` reads back to an equal object."""
    from omegaconf import OmegaConf

    content = asdict(config)
    del content["source_file"]
    return OmegaConf.to_yaml(OmegaConf.create(content))
