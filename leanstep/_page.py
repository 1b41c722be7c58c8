"""HTML pages of reports: the layout, the style sheet (light, dark and print) and shared Jinja macros."""

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from leanstep._charts import PALETTE, STYLE
from leanstep._version import __version__

_TEMPLATES = Path(__file__).with_name("templates")
# characters that neither HTML nor UTF-8 may contain
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")

_COLORS = {
    "light": "--page:#f6f7f9;--card:#fff;--text:#1a1d23;--muted:#5c6470;--line:#e3e6eb;--axis:#9aa2ae;--accent:#2457d6;"
    "--good:#0b7a4b;--good-back:#e2f5ec;--bad:#b42318;--bad-back:#fdeceb;--warn:#8a5a00;--warn-back:#fdf3dc;",
    "dark": "--page:#121418;--card:#1a1d23;--text:#e8eaee;--muted:#9aa3b0;--line:#2c313a;--axis:#59616e;"
    "--accent:#7aa8ff;--good:#5fd6a0;--good-back:#12301f;--bad:#ff8f86;--bad-back:#3a1614;--warn:#f0c060;"
    "--warn-back:#33270c;",
}


def render(template: Path, **values: Any) -> str:
    """Render a page from a template that extends ``layout.html``; every value is escaped.

    Control characters and lone surrogates are replaced by U+FFFD.

    Args:
        template: the file. It may include templates beside it and those of this package.
        values: ``title`` and the template's variables; ``version`` and ``footer`` (texts) have defaults.
    """
    loader = FileSystemLoader([template.parent, _TEMPLATES])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    light, dark = ("".join(f"--c{i}:{colors[side]};" for i, colors in enumerate(PALETTE)) for side in (0, 1))
    style = (
        f":root{{color-scheme:light dark;{_COLORS['light']}{light}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{_COLORS['dark']}{dark}}}}}\n" + _RULES + STYLE
    )
    shared = {"style": Markup(style), "version": __version__, "footer": ()}
    page = environment.get_template(template.name).render({**shared, **values})
    return _FORBIDDEN.sub("\ufffd", page) + "\n"


_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1040px;margin:0 auto;padding:32px 24px 48px}
h1{font-size:26px;line-height:1.2;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:17px;margin:34px 0 12px;letter-spacing:-.005em}
.head{display:flex;flex-wrap:wrap;align-items:center;gap:6px 14px}
.lead{color:var(--muted);margin:6px 0 0}
.badge{font-size:12.5px;font-weight:600;padding:2px 10px;border-radius:99px;white-space:nowrap}
.good{color:var(--good);background:var(--good-back)}
.bad{color:var(--bad);background:var(--bad-back)}
.warn{color:var(--warn);background:var(--warn-back)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:12px;margin:22px 0 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.tile span{display:block;color:var(--muted);font-size:12.5px}
.tile b{display:block;font-size:22px;font-weight:650;line-height:1.3;white-space:nowrap}
.tile small{display:block;color:var(--muted);font-size:12px;line-height:1.35}
.notes{margin:22px 0 0;padding:12px 16px 12px 34px;border-radius:10px}
.notes li{margin:2px 0;overflow-wrap:anywhere}
.grid{display:grid;grid-template-columns:1fr 1fr;gap:14px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th,td{padding:7px 10px;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
tr>:first-child{padding-left:14px}tr>:last-child{padding-right:14px}
tr:last-child>*{border-bottom:0}
thead th{color:var(--muted);font-weight:600;font-size:12.5px;white-space:nowrap}
tbody th{font-weight:500;color:var(--muted);white-space:nowrap}
td{overflow-wrap:anywhere}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.best{font-weight:700;color:var(--good)}
tbody th i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:8px;vertical-align:-1px}
pre{margin:0;padding:14px 16px;columns:2 400px;column-gap:28px;white-space:pre-wrap;overflow-wrap:anywhere;
font:12.5px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
blockquote{margin:0;padding:14px 18px;white-space:pre-wrap;overflow-wrap:anywhere;border-left:3px solid var(--accent)}
footer{margin-top:36px;color:var(--muted);font-size:12.5px;overflow-wrap:anywhere}
@media (max-width:720px){.grid{grid-template-columns:1fr}main{padding:20px 14px 32px}}
@media print{@page{margin:14mm}.tiles{grid-template-columns:repeat(4,1fr)}
body{background:#fff;font-size:10.5pt}main{max-width:none;padding:0}
.tile,tr,blockquote,.notes{break-inside:avoid}h2{break-after:avoid}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
"""
