"""Find out from a run's config.yaml which text a model was trained on."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from leanstep.recipes.config.schema import DataConfig

UNKNOWN = "not known: no run's config.yaml lies around this model, so it may have been trained on this text"


class Training:
    """The ``data`` section of the run that a model comes from, and the weights that the run began from, if any."""

    def __init__(self, config: Path, data: DataConfig, began_from: str | None) -> None:
        self.config, self.data, self.began_from = config, data, began_from

    def held_out(self) -> int:
        """Number of tokens at the end of the sample text that were held out; 0 if all or none was trained on."""
        data = self.data
        return data.val_tokens if data.source == "sotu" and not data.val_path else 0

    def about_sotu(self, tokens: int) -> str:
        """Whether the last ``tokens`` tokens of the sample text were trained on."""
        if self.data.source != "sotu":
            return self._told(f"trained on {self._text()}, not on this text")
        if self.held_out() == 0:
            return self._told("trained on all of this text: this is no held-out loss")
        if tokens > self.held_out():
            return self._told(
                f"held out in part: the run kept the last {self.held_out():,} of these {tokens:,} tokens from training "
                "and was trained on the others"
            )
        return self._told("held out, newer than all training text")

    def about_file(self, path: str) -> str:
        """Whether the text at ``path`` was trained on, as far as paths tell."""
        data = self.data
        if data.val_path and _same(path, data.val_path):
            return self._told("held out: the run's own data.val_path")
        if data.path and _same(path, data.path):
            rest = "" if data.val_path or not data.val_tokens else f", all but its last {data.val_tokens:,} tokens"
            return self._told(f"trained on: the run's own data.path{rest}")
        return self._told(f"trained on {self._text()}; that it holds this file is not known, the paths differ")

    def _text(self) -> str:
        data = self.data
        return " ".join(part for part in (data.source, data.name or data.path, data.subset) if part)

    def _told(self, what: str) -> str:
        began = f"; what {self.began_from}, where its weights began, was trained on is not known"
        return f"{what} ({self.config})" + (began if self.began_from else "")


def read_training(folder: Path) -> Training | None:
    """Read the training data of the model in ``folder``: ``final/`` or ``checkpoints/step-N/hf/`` of a run.

    None when no readable config.yaml of a run is there.
    """
    folder = folder.resolve()
    for parent in (folder, *folder.parents[:3]):
        content = _recipe(parent / "config.yaml")
        if content is not None:
            known = {item.name for item in fields(DataConfig)}
            try:
                data = DataConfig(**{key: value for key, value in content["data"].items() if key in known})
            except (TypeError, ValueError):
                return None
            model = content.get("model")
            return Training(parent / "config.yaml", data, model.get("init_from") if isinstance(model, dict) else None)
    return None


def _recipe(path: Path) -> dict[str, Any] | None:
    """A recipe as it was saved with its run, None for any other file."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    recipe = isinstance(content, dict) and "recipe" in content and isinstance(content.get("data"), dict)
    return content if recipe else None


def _same(one: str, other: str) -> bool:
    return Path(one).expanduser().resolve() == Path(other).expanduser().resolve()
