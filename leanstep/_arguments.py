"""The argument parser of all commands: a mistake is one line, with what to type."""

import argparse
import re
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from leanstep._files import output_folder

EXIT_BAD_INPUT = 2
_KINDS = {"float": "a number", "int": "a whole number"}


class OneLineParser(argparse.ArgumentParser):
    """ArgumentParser that answers a mistake by one line and exit code 2, and suggests the nearest command."""

    def error(self, message: str) -> NoReturn:
        """Print what was expected, what came, and what to type."""
        wrong = message.partition("invalid choice: '")[2].partition("'")[0]
        choices = [name for action in self._actions for name in action.choices or () if isinstance(name, str)]
        if (words := message.partition("unrecognized arguments: ")[2]).startswith("-"):
            wrong, choices = words.split()[0].partition("=")[0], self.option_names()
        near = get_close_matches(wrong, choices, n=1) if wrong else []
        message = re.sub(r"invalid (float|int) value: (.*)", lambda m: f"expected {_KINDS[m[1]]}, got {m[2]}", message)
        for action in self._actions:
            if not action.option_strings and action.nargs == "*" and action.metavar:
                # argparse names them, too, though none is needed
                message = message.replace(f", {action.metavar}", "")
        hint = f"; did you mean '{near[0]}'?" if near else f"; see `{self.prog} --help`"
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {message}{hint}\n")

    def option_names(self) -> list[str]:
        """The names of the options, as ``--seed``."""
        return [name for action in self._actions for name in action.option_strings]


def add_device(parser: argparse._ActionsContainer) -> None:
    """Add the option ``--device``, with the default of all commands: None, a GPU where there is one, else the CPU."""
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ...; default: cuda where there is one")


def positive(text: str) -> int:
    """The type of an option with a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def whole(text: str) -> int:
    """The type of an option with a whole number from 0 on, as a seed."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2^63 - 1, got {text!r}")
    return int(text)


def port(text: str) -> int:
    """The type of an option with a TCP port; 0 stands for a free one."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 65535, got {text!r}")
    return int(text)


def html_page(text: str) -> Path:
    """The type of an option that names a page to write, which browsers know by the end of its name."""
    if not text.endswith(".html"):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .html, got {text!r}")
    return Path(text)


def new_folder(text: str) -> Path:
    """The type of an option that names a folder to create."""
    try:
        return output_folder(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
