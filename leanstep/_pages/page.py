"""HTML of reports, from Jinja templates: every value is escaped, and colours follow the reader's light or dark mode."""

import functools
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from leanstep import __version__

TEMPLATES = Path(__file__).with_name("templates")
# characters that neither HTML nor UTF-8 may contain
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def render(template: Path, **values: Any) -> str:
    """Render a template; every value is escaped. U+FFFD replaces control characters and lone surrogates.

    Args:
        template: the file. It may include or extend templates beside it and those of this package.
        values: the template's variables. Pages that extend ``layout.html`` have a ``title`` and may have a ``footer``
            (texts) and ``refresh`` (seconds after which a browser loads the page again).
    """
    page = (
        environment(template.parent)
        .get_template(template.name)
        .render({"version": __version__, "footer": (), "refresh": 0, **values})
    )
    return _FORBIDDEN.sub("\ufffd", page) + "\n"


@functools.cache
def environment(folder: Path) -> Environment:
    """Jinja's environment for the templates of a folder, which compiles each of them once."""
    loader = FileSystemLoader([folder, TEMPLATES])
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
