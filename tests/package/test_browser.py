"""Reports in a real browser: no message, no request, nothing cut off, on a screen, on a phone and on paper.

With ``LEANSTEP_PICTURES=FOLDER`` a test writes the pictures of the documentation from the reports in FOLDER.
"""

import json
import os
import threading
import time
from pathlib import Path

import pytest
from browser import MISSING, Screen, browser, browser_path
from pictures import WIDTH, Picture, layout, size_of, stored_layout, take
from run_folders import write_run
from training import write_recipe

from leanstep.pruning.folder.report import report_page
from leanstep.recipes.report.board import write_board
from leanstep.recipes.report.board_server import BoardServer
from leanstep.recipes.report.report import write_report
from leanstep.recipes.sweep.grid import make_plan
from leanstep.recipes.sweep.page import write_pages
from leanstep.recipes.sweep.results import summarize

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("report", "comparison", "pruned", "sweep")
# A4 without the margins of @page, at 96 pixels per inch
PAPER = Screen(688, 1016, media="print")
SCREENS = {"light": Screen(), "dark": Screen(scheme="dark"), "phone": Screen(360, 740), "print": PAPER}
ROLES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")

pytestmark = pytest.mark.skipif(browser_path() is None, reason=MISSING)


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """One report of each kind, with long names, from made-up numbers."""
    folder = tmp_path_factory.mktemp("pages")
    names = ("llama-nano-sinkgd-with-warmup", "llama-nano-lion", "llama-nano-adamw-of-the-second-attempt")
    runs = [write_run(folder / name, name, floor=4.4 + i / 10, seed=i) for i, name in enumerate(names)]
    written = {
        "report": write_report(runs[:1], folder / "report.html"),
        "comparison": write_report(runs, folder / "comparison.html"),
        "pruned": folder / "pruned.html",
        "sweep": sweep_page(folder),
    }
    written["pruned"].write_text(report_page(pruned_content()))
    (folder / names[0] / "pruned").mkdir()
    (folder / names[0] / "pruned" / "report.html").write_bytes(written["pruned"].read_bytes())
    (folder / names[0] / "pruned" / "sparsity.json").write_text("{}")
    written["board"] = write_board(folder, folder / "board.html")
    # adapters are trained by a run like any other
    written["lora"] = written["report"]
    return written


def pruned_content():
    layers = [
        {"name": f"model.layers.{block}.{role}.weight", "shape": [256, 256], "block": block, "pattern": None,
         "sparsity": 0.3 + 0.05 * block + 0.01 * index}
        for block in range(8) for index, role in enumerate(ROLES)
    ]  # fmt: skip
    return {
        "source": "runs/llama/final", "sparsity": 0.5, "score": "wanda", "pattern": "unstructured", "metric": "kl",
        "allocation": {"method": "dp", "predicted": 0.1}, "layers": layers, "notes": ["a remark " * 20],
        "budget": {"kind": "params", "target": 1_572_864, "dense": 3_145_728, "before": 3_145_728, "after": 1_572_864},
    }  # fmt: skip


def sweep_page(folder):
    plan = make_plan(str(write_recipe(folder)), ("optimizer.lr=1e-3,2e-3,4e-3", "seed=0,1"), folder / "sweep")
    losses = (5.0, 5.2, 3.0, 3.1, 4.0, 4.1)
    ends = {
        run.name: {"kind": "end", "run": run.name, "status": "done", "val_loss": loss}
        for run, loss in zip(plan.runs, losses, strict=True)
    }
    plan.folder.mkdir()
    return write_pages(plan, summarize(plan, ends), ends)


@pytest.mark.sample(len(PAGES))
@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("name", PAGES)
def test_a_report_says_nothing_and_asks_for_nothing(tab, pages, name, screen):
    visit = tab.open(pages[name], SCREENS[screen])
    assert visit.messages == []
    assert visit.requests == [pages[name].as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") <= SCREENS[screen].width, "the page scrolls sideways"
    assert tab.evaluate("document.querySelectorAll('svg').length") > 0


@pytest.mark.parametrize("name", PAGES)
def test_no_table_is_cut_off_on_a_screen_or_on_paper(tab, pages, name):
    for screen in ("light", "print"):
        tab.open(pages[name], SCREENS[screen])
        wide = "[...document.querySelectorAll('.card')].filter(c => c.scrollWidth > c.clientWidth).length"
        assert tab.evaluate(wide) == 0, screen


@pytest.mark.parametrize("name", PAGES)
def test_labels_of_an_axis_differ_and_stay_inside(tab, pages, name):
    tab.open(pages[name], SCREENS["light"])
    outside = """[...document.querySelectorAll('figure')].flatMap(f => [...f.querySelectorAll('text')].filter(t => {
        const a = t.getBoundingClientRect(), b = f.getBoundingClientRect();
        return a.left < b.left || a.right > b.right || a.bottom > b.bottom;
    }).map(t => t.textContent))"""
    assert tab.evaluate(outside) == []
    # labels of one axis stand at one height, or end at one place
    doubled = """[...document.querySelectorAll('svg')].flatMap(s => {
        const places = [...s.querySelectorAll('text')].map(t => t.getAttribute('x') + ' ' + t.textContent);
        return places.filter((p, i) => places.indexOf(p) != i);
    })"""
    assert tab.evaluate(doubled) == []


@pytest.mark.parametrize("name", PAGES)
def test_labels_can_be_read_on_a_phone(tab, pages, name):
    tab.open(pages[name], SCREENS["phone"])
    heights = tab.evaluate(
        "[...document.querySelectorAll('svg text')].filter(t => t.checkVisibility())"
        ".map(t => t.getBoundingClientRect().height)"
    )
    assert min(heights) > 8, "pixels"
    charts = "[...document.querySelectorAll('figure.phone, figure:has(+ figure.phone)')]"
    cut = tab.evaluate(f"{charts}.filter(chart => chart.scrollWidth > chart.clientWidth).length")
    assert cut == 0, "a chart of curves fits the width of a phone"


def test_dark_is_dark_and_paper_is_white_for_readers_of_the_dark_too(tab, pages):
    def brightness(screen):
        tab.open(pages["report"], screen)
        colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour.strip("rgb()").split(","))

    assert brightness(SCREENS["light"]) > 600 > 150 > brightness(SCREENS["dark"])
    assert brightness(PAPER._replace(scheme="dark")) == 3 * 255


def test_text_stands_out_from_its_ground(tab, pages):
    """Contrast of at least 4.5, which WCAG 2 asks for small text."""
    script = """(() => {
        const parse = c => c.match(/[\\d.]+/g).map(Number);
        const luminance = c => parse(c).slice(0, 3).map(v => v / 255)
            .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
        const ground = e => {
            while (e && (parse(getComputedStyle(e).backgroundColor)[3] ?? 1) == 0) e = e.parentElement;
            return getComputedStyle(e || document.body).backgroundColor; };
        return [...document.querySelectorAll('body *')].filter(e => e.children.length == 0 && e.textContent.trim()
            && e.getClientRects().length && !['title', 'STYLE'].includes(e.tagName)).map(e => {
            const style = getComputedStyle(e), over = luminance(ground(e));
            const text = luminance(e.namespaceURI.endsWith('svg') ? style.fill : style.color);
            return [(Math.max(text, over) + .05) / (Math.min(text, over) + .05), e.textContent.slice(0, 40)];
        }).filter(([contrast]) => contrast < 4.5);
    })()"""
    for screen in ("light", "dark"):
        for name in (*PAGES, "board"):
            tab.open(pages[name], SCREENS[screen])
            assert tab.evaluate(script) == [], (screen, name)


def test_every_value_of_a_curve_and_of_a_map_is_named_on_hover(tab, pages):
    tab.open(pages["pruned"], SCREENS["light"])
    names = tab.evaluate("[...document.querySelectorAll('rect.cell')].map(r => r.querySelector('title').textContent)")
    assert len(names) == 48 and names[0] == "q_proj, block 0: 0.300"
    # the pointer meets the cell itself, nothing lies over it
    hit = """(() => { const r = document.querySelector('rect.cell').getBoundingClientRect();
        return document.elementFromPoint(r.x + r.width / 2, r.y + r.height / 2).getAttribute('class'); })()"""
    assert tab.evaluate(hit) == "cell"


@pytest.mark.parametrize("name", PAGES)
def test_a_report_prints(tab, pages, name):
    tab.open(pages[name], Screen())
    assert tab.pdf().startswith(b"%PDF-")


# the curves of a chart as its library has them
CURVES = (
    "[...document.querySelectorAll('.plot')].map(p => p.data.map(t => [t.name, t.x.length, t.line.color, t.opacity]))"
)
LEGEND = "[...document.querySelectorAll('#keys button')].map(b => [b.textContent, b.ariaPressed])"
ROWS = "[...document.querySelectorAll('#runs tbody tr')].map(r => [...r.cells].slice(1).map(c => c.textContent))"
SETTINGS = "[...document.querySelectorAll('#settings tr')].map(r => [...r.cells].map(c => c.textContent))"
# choose a value as a reader does
CHOOSE = """(id, value) => { const e = document.getElementById(id); const box = e.type == 'checkbox';
    e[box ? 'checked' : 'value'] = value; e.dispatchEvent(new Event(e.oninput ? 'input' : 'change')); }"""


@pytest.fixture
def board(tab, tmp_path):
    """The page of three runs, and a function that makes a choice in it."""
    for name, optimizer, lr, floor in (("a", "lion", 0.1, 4.5), ("b", "lion", 0.2, 4.2), ("c", "<i>sgd", 0.1, 4.8)):
        run = write_run(tmp_path / "runs" / name, name, optimizer=optimizer, lr=lr, floor=floor, seed=ord(name))
        facts = {"status": "done", "step": 600, "steps": 600, "val_loss": floor, "updated": "2026-12-01T10:00:00+0000"}
        (run / "status.json").write_text(json.dumps(facts))
    tab.open(write_board(tmp_path / "runs", tmp_path / "board.html"), Screen())
    return lambda name, value: tab.evaluate(f"({CHOOSE})({json.dumps(name)}, {json.dumps(value)})")


@pytest.mark.sample(3)
@pytest.mark.parametrize("screen", ["light", "dark", "phone"])
def test_the_board_draws_all_runs_and_asks_for_nothing(tab, pages, screen):
    visit = tab.open(pages["board"], SCREENS[screen])
    assert visit.messages == []
    # older versions of the library try how the browser reads a picture that they carry
    assert [address for address in visit.requests if not address.startswith("data:")] == [pages["board"].as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") <= SCREENS[screen].width, "the page scrolls sideways"
    curves = tab.evaluate(CURVES)
    assert [[length for _, length, *_ in chart] for chart in curves] == [[6] * 3, [61] * 3]
    assert len({color for _, _, color, _ in curves[0]}) == 3
    inside = (
        "[...document.querySelectorAll('.plot')].every(p => p.querySelector('.main-svg').clientWidth == p.clientWidth)"
    )
    assert tab.evaluate(inside), "a chart is wider than its place"
    tab.evaluate("document.querySelector('details').open = true")
    frame = "document.querySelector('#frames iframe')"
    assert tab.evaluate(f"[{frame}.src.slice(0, 15), {frame}.getAttribute('sandbox')]") == ["data:text/html;", ""]


def test_a_reader_of_the_board_chooses_what_it_shows(tab, board):
    assert [row[0] for row in tab.evaluate(ROWS)] == ["a", "b", "c"] and tab.evaluate(LEGEND)[0] == ["a", "true"]
    assert tab.evaluate(SETTINGS) == [
        ["", "a", "b", "c"], ["optimizer.name", "lion", "lion", "<i>sgd"], ["optimizer.lr", "0.1", "0.2", "0.1"]
    ]  # fmt: skip
    # sort, filter, hide
    tab.evaluate("document.querySelectorAll('#runs thead button')[3].click()")
    assert [row[0] for row in tab.evaluate(ROWS)] == ["b", "a", "c"] and tab.evaluate(ROWS)[0][3] == "4.2000"
    board("filter", "optimizer.name=lion state=DONE")
    assert [row[0] for row in tab.evaluate(ROWS)] == ["b", "a"]
    assert tab.evaluate(SETTINGS) == [["", "a", "b"], ["optimizer.lr", "0.1", "0.2"]]
    tab.evaluate("document.querySelector('#runs tbody input').click()")
    assert [name for name, *_ in tab.evaluate(CURVES)[0]] == ["a"] and tab.evaluate(LEGEND) == [
        ["a", "true"],
        ["b", "false"],
    ]
    assert tab.evaluate("document.getElementById('same').checkVisibility()")
    tab.evaluate("document.querySelectorAll('#keys button')[1].click()")
    board("filter", "")
    assert [name for name, *_ in tab.evaluate(CURVES)[0]] == ["a", "b", "c"]
    board("filter", "optimizer.lr=0.1 optimizer.lr=0")
    assert [row[0] for row in tab.evaluate(ROWS)] == ["a", "c"]
    board("filter", "")
    # a chart of another number, over hours, on logarithmic axes
    board("add", "grad_norm")
    board("x", "hours")
    board("logy", True)
    axes = "[...document.querySelectorAll('.plot')].map(p => [p.layout.yaxis.type, p.data[0].x[0], p.data[0].y[0]])"
    drawn = tab.evaluate(axes)
    assert (
        len(drawn) == 3
        and {kind for kind, *_ in drawn} == {"log"}
        and drawn[2][1] == pytest.approx(0.17 / 3600, rel=1e-5)
    )
    tab.evaluate("document.querySelector('#charts figure:last-child > button').click()")
    assert len(tab.evaluate(CURVES)) == 2


def test_the_board_smooths_and_takes_the_mean_of_a_group(tab, board):
    raw = tab.evaluate("document.querySelectorAll('.plot')[1].data.map(t => t.y)")
    board("smooth", 0.5)
    faint, smooth = tab.evaluate("document.querySelectorAll('.plot')[1].data.slice(0, 2).map(t => t.y)")
    assert faint == raw[0] and smooth[1] == pytest.approx((0.5 * raw[0][0] + raw[0][1]) / 1.5)
    board("smooth", 0)
    board("group", "optimizer")
    assert tab.evaluate(LEGEND) == [["lion", "true"], ["<i>sgd", "true"]]
    names = [(name, opacity < 1) for name, _, _, opacity in tab.evaluate(CURVES)[1]]
    assert names == [("a", True), ("b", True), ("lion (mean of 2)", False), ("c", False)]
    mean = tab.evaluate("document.querySelectorAll('.plot')[1].data[2].y")
    assert mean == pytest.approx([(a + b) / 2 for a, b in zip(raw[0], raw[1], strict=True)])
    # what was chosen survives a reload
    address = tab.evaluate("location.href")
    tab.open("about:blank", Screen())
    tab.open(address, Screen())
    assert tab.evaluate(LEGEND) == [["lion", "true"], ["<i>sgd", "true"]]


@pytest.mark.slow  # the page asks every five seconds
def test_a_served_board_follows_its_runs_and_keeps_the_zoom(tab, tmp_path):
    run = write_run(tmp_path / "runs" / "<img src=x onerror=console.log(1)>", made=100)
    with BoardServer(tmp_path / "runs", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            visit = tab.open(server.url, Screen())
            assert visit.messages == []
            count = "document.querySelectorAll('.plot')[1]?.data[0]?.x.length"
            until(tab, count, 11)
            zoom = "Plotly.relayout(document.querySelectorAll('.plot')[1], {'xaxis.range': [20, 90]})"
            tab.evaluate(f"{zoom}.then(() => 1)")
            with (run / "log.jsonl").open("a") as log:
                log.write(json.dumps({"step": 110, "kind": "train", "loss": 5.0}) + "\n")
            until(tab, count, 12)
            assert tab.evaluate("document.querySelectorAll('.plot')[1].layout.xaxis.range") == [20, 90]
            assert tab.evaluate("document.getElementById('state').textContent") == "live"
            assert list(tab._messages()) == []
        finally:
            server.shutdown()
            thread.join()
    until(tab, "document.getElementById('state').textContent", "not served any more")


def until(tab, expression, value):
    """Wait until an expression has a value."""
    end = time.monotonic() + 60
    while (now := tab.evaluate(expression)) != value:
        assert time.monotonic() < end, now
        time.sleep(0.05)


def test_a_page_that_loads_something_is_caught(tab, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        "<!doctype html><title>x</title><script>console.log('said')</script><img src='http://a.test/b.png'>"
    )
    visit = tab.open(page, Screen())
    assert any("said" in message for message in visit.messages)
    assert "http://a.test/b.png" in visit.requests


REPORTS = os.environ.get("LEANSTEP_PICTURES")
# without tiles and tables of speed, which a busy machine makes
PICTURES = {
    "report": Picture("report", 468, "Curves"),
    "report-dark": Picture("report", 468, "Curves", scheme="dark"),
    "comparison": Picture("comparison", 468, "Curves"),
    "lora": Picture("lora", 468, "Curves"),
    "pruned": Picture("pruned", 676),
}


@pytest.mark.slow
@pytest.mark.skipif(not REPORTS, reason="writes the pictures of docs/ where LEANSTEP_PICTURES names real reports")
@pytest.mark.parametrize("name", PICTURES)
def test_write_the_pictures_of_the_documentation(tab, name):
    page = Path(REPORTS or "", f"{PICTURES[name].page}.html")
    if not page.exists():
        pytest.skip(f"{page} is not there")
    take(tab, page.resolve(), PICTURES[name], DOCS / f"{name}.png")


def test_every_picture_of_the_documentation_is_listed():
    assert {path.stem for path in DOCS.glob("*.png")} == set(PICTURES)


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_show_the_reports_as_they_are_now(tab, pages, name):
    """Real numbers there and made-up ones here, in one layout. CONTRIBUTING.md says how to take pictures again."""
    path, picture = DOCS / f"{name}.png", PICTURES[name]
    assert path.stat().st_size < 150_000
    assert size_of(path) == (WIDTH, picture.height)
    shown, now = stored_layout(path), layout(tab, pages[picture.page], picture._replace(height=3 * picture.height))
    left = iter(now["texts"])
    missing = [text for text in shown["texts"] if text not in left]
    assert not missing, f"docs/{name}.png shows {missing}, and a new report has {now['texts']}"
    assert set(shown["boxes"]) <= set(now["boxes"])
    assert shown["colours"] == now["colours"]
