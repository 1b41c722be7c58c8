"""README and docs/ do what they say: their code runs, their commands parse, their links and paths exist."""

import argparse
import importlib.util
import re
import tomllib
import warnings

import pytest
import torch.distributed as dist
from documentation import PAGES, ROOT, blocks, command_lines, leanstep_arguments, programs

from leanstep import cli
from leanstep.recipes import bench, evaluate, generate
from leanstep.recipes.config import loader
from leanstep.recipes.shrink import compress, prune
from leanstep.recipes.sweep import command as sweep_command
from leanstep.recipes.sweep.grid import make_plan

# commands that have a parser of their own
OWN_PARSERS = {module.__name__.rpartition(".")[2]: module._parser for module in (prune, compress, generate, bench)}
OWN_PARSERS["eval"] = evaluate._parser

PROGRAMS = [(page, number, code) for page in PAGES for number, code in enumerate(programs(page))]
COMMANDS = list(dict.fromkeys(line for page in PAGES for line in command_lines(page)))
LEANSTEP = [arguments for line in COMMANDS if (arguments := leanstep_arguments(line)) is not None]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
TEXTS = {page: (ROOT / page).read_text("utf-8") for page in [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]}


def slug(heading: str) -> str:
    """The anchor of a heading, as MkDocs makes it."""
    plain = re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading)
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain.encode("ascii", "ignore").decode()).strip().lower())


@pytest.fixture
def one_process(monkeypatch, tmp_path):
    """The working folder and the environment that torchrun gives to a single process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(("page", "number", "code"), PROGRAMS, ids=[f"{page}-{n}" for page, n, _ in PROGRAMS])
def test_python_blocks_run(page, number, code, one_process, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, f"{page}, program {number}", "exec"), {"__name__": "page"})


def test_blocks_of_a_page_continue_each_other():
    (program,) = (code for page, _, code in PROGRAMS if page == "docs/distributed.md" and "dcp.load" in code)
    assert "init_process_group" in program and "ZeroRedundancyOptimizer" in program


def test_blocks_are_of_languages_that_are_tested():
    languages = {(page, language) for page in PAGES for language, _ in blocks(page)}
    assert {language for _, language in languages} <= {"bash", "math", "python", "text"}, languages


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_of_a_kind_that_is_tested(line):
    """Installations name extras that exist; the other kinds have tests of their own."""
    for part in line.split(" && "):
        if extras := re.fullmatch(r"pip install -e '\.\[([\w,]+)\]'", part):
            assert set(extras[1].split(",")) <= set(EXTRAS)
        else:
            assert re.match(
                r"pytest\b|leanstep |python benchmarks |(ACCELERATE_USE_CPU=true )?(torchrun|accelerate) ", part
            )


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse as the command does: what the parser leaves over are the recipe's key=value words."""
    options, rest = cli._parser().parse_known_args(arguments)
    return options, [*getattr(options, "overrides", []), *rest]


@pytest.mark.parametrize("arguments", LEANSTEP, ids=" ".join)
def test_leanstep_commands_parse(arguments):
    _, overrides = parse(arguments)
    if arguments[0] not in OWN_PARSERS:
        assert all("=" in word and not word.startswith("-") for word in overrides), overrides


def test_a_command_that_does_not_exist_does_not_parse(capsys):
    with pytest.raises(SystemExit):
        parse(["trian", "llama-nano-sinkgd"])
    assert "did you mean 'train'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [a for a in LEANSTEP if a[0] in OWN_PARSERS], ids=" ".join)
def test_commands_with_a_parser_of_their_own_parse(arguments):
    OWN_PARSERS[arguments[0]]().parse_args(arguments[1:])


@pytest.mark.parametrize("arguments", [a for a in LEANSTEP if a[0] in {"train", "check"}], ids=" ".join)
def test_recipes_and_overrides_are_valid(arguments):
    options, overrides = parse(arguments)
    loader.load(options.recipe, overrides, world_size=options.nproc)


@pytest.mark.parametrize("arguments", [a for a in LEANSTEP if a[0] == "sweep"], ids=" ".join)
def test_sweeps_are_valid(arguments):
    options = sweep_command.parser().parse_args(arguments[1:])
    assert len(make_plan(options.recipe, options.values, options.out).runs) > 1


def test_modules_and_recipes_of_other_launchers_exist():
    launched = [re.search(r" -m (leanstep[.\w]*) ([\w-]+)$", line) for line in COMMANDS if " -m leanstep" in line]
    assert len(launched) == 2
    for match in launched:
        assert importlib.util.find_spec(match[1]) is not None
        loader.load(match[2], [])


def test_scripts_exist():
    scripts = [word for line in COMMANDS for word in line.split() if word.endswith((".py", ".sh"))]
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


@pytest.mark.parametrize("page", PAGES)
def test_paths_in_code_spans_exist(page):
    spans = re.findall(r"`([\w./-]+)`", TEXTS[page])
    paths = [span for span in spans if "/" in span and span.split("/")[0] in {p.name for p in ROOT.iterdir()}]
    made = ("runs/", "build/", "data/", "docs/gpu.json")
    assert [path for path in paths if not (ROOT / path).exists() and not path.startswith(made)] == []


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_to_files_and_headings(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", TEXTS[page]):
        file = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page}: {target}#{anchor}"


@pytest.mark.parametrize("page", TEXTS)
def test_no_path_of_one_machine(page):
    assert not re.search(r"(?<![\w.:/`])/(home|root|work|tmp|Users|opt|mnt)/", TEXTS[page])


TABLES = [page for page in PAGES if "<!-- table:" in TEXTS[page]]


@pytest.mark.parametrize("page", TABLES)
def test_tables_are_filled_from_benchmarks(page):
    """A table marker has a partner, and what is between them names the command that prints it."""
    text = TEXTS[page]
    opened = re.findall(r"<!-- table:([\w-]+) -->", text)
    assert opened == re.findall(r"<!-- /table:([\w-]+) -->", text)
    assert len(set(opened)) == len(opened)
    for name in opened:
        table = text.split(f"<!-- table:{name} -->")[1].split(f"<!-- /table:{name} -->")[0].strip()
        generated = page == "docs/protocol.md"  # its caption is in the table of the losses
        assert generated or re.search(r"python benchmarks (\w+/)?\w+|leanstep \w+", table), f"{name} names no command"


# a phrase of a page, the table of docs/measured/ that it quotes, and what the row of its number contains
QUOTES = [
    ("docs/methods/sparsity.md", "[2.32 times as fast]", "nm-matmul", "| 2:4 | 2.32 /"),
    ("docs/methods/sparsity.md", "5.37 times at 1:8", "nm-matmul", "| 1:8 | 5.37 /"),
    ("docs/methods/sparsity.md", "[3.47 times as fast]", "bitmask", "| bf16 | 60 % | 3.47 / 1.61 "),
    ("docs/methods/pruning.md", "at 50 % 0.0207", "prune-evidence-nano", "SparseGPT 50%, uniform | 0, 1, 2 | 0.0207 "),
    ("docs/methods/pruning.md", "at 60 % 0.0609", "prune-evidence-nano", "SparseGPT 60%, uniform | 0, 1, 2 | 0.0609 "),
    ("README.md", "bf16: 3.20 GB, AdamW", "memory",
     "| SinkGD, AdamW on embedding, head, norms | 0.25 | 0.46 | 1.00 | 3.20 |"),
    ("README.md", "AdamW 8.03", "memory", "| AdamW | 0.35 | 0.80 | 2.21 | 8.03 |"),
    ("README.md", "perplexity 71,", "prune-evidence-smollm2", "-38.7 [-42.2, -35.2] | 71.28 "),
    ("README.md", "uniform sparsity 137,", "prune-evidence-smollm2",
     "Wanda 60%, uniform | 0, 1, 2 | 1.7639 | – | 137.05 "),
    ("README.md", "0.53 to 0.76 of PEFT's", "lora-step",
     "| bf16 | dropout | leanstep | 93.7 | 125.2 | 220.1 | 1.15 | 0.53 "),
    ("README.md", "0.53 to 0.76 of PEFT's", "lora-step",
     "| bf16 | plain | leanstep | 87.4 | 115.9 | 202.9 | 1.09 | 0.76 "),
    ("README.md", "0.12 to 0.22 of its", "lora-memory", "| bf16 | dropout | 8.35 | 0.98 | -0.46 | 0.12 "),
    ("README.md", "0.12 to 0.22 of its", "lora-memory", "| bf16 | plain | 4.55 | 0.98 | -0.46 | 0.22 "),
    ("README.md", "0.56 of the memory; on one thread 2.8", "generation-llama-1b", "60 % | 1302 | 1303 | 11.2 | 2.77 "),
    ("README.md", "1.5 with AVX2", "generation-llama-1b-avx2", "sparse bf16, 60 % | 60 % | 1302 | 1306 | 5.7 | 1.52 "),
    ("README.md", "72 to 81 % less", "compress-llama", "compensated | 2.16 | 0.00080 | -74.8 [-77.3, -72.4]"),
    ("README.md", "72 to 81 % less", "compress-llama", "compensated | 2.56 | 0.00030 | -79.6 [-80.9,"),
    ("README.md", "1,021 kills in 750 runs", "faults", "| all |  | 750 | 1021 | 750 | 0 |"),
    ("README.md", "8 bits cost 0.1 of perplexity", "generation-smollm2", "| llama.cpp Q8_0 | – | 145 | 185 | 22.04 |"),
    ("README.md", "50 % zeros 13", "generation-smollm2", "| sparse bf16, 50 % | 50 % | 178 | 181 | 34.76 |"),
    ("docs/methods/sinkgd.md", "+0.243 [+0.161", "compare-llama-micro", "SinkGD, AdamW on the rest | 5.550 "),
]  # fmt: skip


def measured(table: str) -> str:
    """A table of docs/measured/."""
    [page] = [TEXTS[page] for page in TABLES if f"<!-- table:{table} -->" in TEXTS[page]]
    return page.split(f"<!-- table:{table} -->")[1].split(f"<!-- /table:{table} -->")[0]


@pytest.mark.parametrize(("page", "phrase", "table", "row"), QUOTES)
def test_quoted_numbers_are_those_of_the_table(page, phrase, table, row):
    assert phrase in " ".join(TEXTS[page].split())
    assert any(row in line for line in measured(table).splitlines())


_SINKGD, _LOSSES = "SinkGD, AdamW on the rest", "docs/measured/losses.md"
_NANO, _GPT, _MICRO = (f"compare-{model}" for model in ("llama-nano", "gpt-nano", "llama-micro"))
# a phrase of a page with a ratio, the table it is of, the starts of the rows of both numbers, and their column
RATIOS = [
    (_LOSSES, "takes 0.62 of the memory", _NANO, f"{_SINKGD} | 4.681 ± 0.008", "AdamW | 4.679", "MB"),
    (_LOSSES, "take 0.64 of the memory", _GPT, f"{_SINKGD} | 4.915", "AdamW | 5.052", "MB"),
    (_LOSSES, "SinkGD takes 0.67 of", _MICRO, f"{_SINKGD} | 5.249", "AdamW | 5.306", "MB"),
    (_LOSSES, "Lion takes 0.75 of", _MICRO, "Lion | 5.753", "AdamW | 5.306", "MB"),
    (_LOSSES, "LANTON without noise 1.3,", _MICRO, "LANTON, plain | 5.103", "AdamW | 5.306", "ms a step"),
    (_LOSSES, "takes 0.75 of AdamW's", _MICRO, "LANTON, plain | 5.103", "AdamW | 5.306", "MB"),
    (_LOSSES, "LANTON with noise 1.6 times", _MICRO, "LANTON | 5.153", "AdamW | 5.306", "ms a step"),
]  # fmt: skip


@pytest.mark.parametrize(("page", "phrase", "table", "above", "below", "column"), RATIOS)
def test_quoted_ratios_are_those_of_the_table(page, phrase, table, above, below, column):
    rows = [[cell.strip() for cell in line.split(" | ")] for line in measured(table).splitlines() if line[:2] == "| "]
    index = rows[0].index(column) if column in rows[0] else rows[0].index(f"{column} |")
    numbers = [
        float(next(row for row in rows if " | ".join(row).startswith(f"| {start}"))[index].rstrip("* |"))
        for start in (above, below)
    ]
    assert phrase in " ".join(TEXTS[page].split())
    (quoted,) = re.findall(r"\d\.\d+", phrase)
    assert abs(numbers[0] / numbers[1] - float(quoted)) <= 0.51 * 10.0 ** -len(quoted.split(".")[1])


def test_the_pages_with_tables():
    assert {"docs/gpu.md", _LOSSES, "docs/reliability.md"} <= set(TABLES)
