"""The notebooks run from the first cell to the last, and the repository has the outputs of such a run."""

import ast
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def printed(notebook) -> str:
    """The texts that the cells of a notebook printed, then its pictures."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [o.data["image/svg+xml"] for o in outputs if "image/svg+xml" in o.get("data", {})]
    # a progress bar on the standard error ends without a line break
    return "".join([o.text for o in outputs if o.get("name") == "stdout"] + pictures)


def without_numbers(text: str) -> str:
    """The text with every number, and every bar that draws one, replaced by #."""
    return re.sub(r"[\d.,█ ]+", "#", text)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The outputs of every notebook's code cells, as one text each, by the notebook's name; run on first use."""
    texts: dict[str, str] = {}

    def run(name: str) -> str:
        if name not in texts:
            notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
            resources = {"metadata": {"path": str(tmp_path_factory.mktemp(name))}}
            nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
            texts[name] = printed(notebook)
        return texts[name]

    return run


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_explains_itself_and_has_the_outputs_of_one_run(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs and all(output.get("name") == "stdout" or "image/svg+xml" in output.data for output in outputs)
    assert "/tmp" not in printed(notebook) and "/home" not in printed(notebook)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the packages that run notebooks
@pytest.mark.parametrize("name", NAMES)
def test_the_stored_outputs_are_those_of_the_present_code(name, executed):
    """But for their numbers. ``bash .ci/notebooks`` stores them anew."""
    stored = printed(nbformat.read(FOLDER / f"{name}.ipynb", as_version=4))
    assert without_numbers(executed(name)) == without_numbers(stored)


def test_the_notebooks():
    assert NAMES == ["first_run", "prune_a_checkpoint"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the packages that run notebooks
def test_the_first_run_draws_curves_that_fall(executed):
    text = executed("first_run")
    curves = re.findall(r'<polyline points="([^"]*)"', text)
    assert len(curves) == 3
    for points in curves:
        heights = [float(point.split(",")[1]) for point in points.split()]
        assert len(heights) == 60 and sum(heights[-10:]) > sum(heights[:10]) + 100  # y grows downwards
    state = dict(re.findall(r">([^:<>]+): [\d.]+, ([\d,]+) bytes<", text))
    sinkgd, lion, adamw = (int(state[name].replace(",", "")) for name in ("SinkGD", "Lion, 8 bits", "AdamW"))
    assert lion < sinkgd < adamw


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_pruned_checkpoint_opens_and_has_its_zeros(executed):
    text = executed("prune_a_checkpoint")
    sparsities = [float(number) for number in re.findall(r"^([01]\.\d\d)  ", text, re.MULTILINE)]
    losses = ast.literal_eval(re.search(r"^\{.*\}$", text, re.MULTILINE)[0])
    assert len(sparsities) == 14 and len(set(sparsities)) > 1
    assert losses["dense"] < losses["pruned"] < losses["dense"] + 2
    assert "report.html" in text.splitlines()[-1].split()
