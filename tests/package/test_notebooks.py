"""The notebooks run from the first cell to the last, and the repository has them without outputs."""

import ast
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The outputs of every notebook's code cells, as one text each, by the notebook's name; run on first use."""
    texts: dict[str, str] = {}

    def run(name: str) -> str:
        if name not in texts:
            notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
            resources = {"metadata": {"path": str(tmp_path_factory.mktemp(name))}}
            nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
            outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
            pictures = [o.data["image/svg+xml"] for o in outputs if "image/svg+xml" in o.get("data", {})]
            # a progress bar on the standard error ends without a line break
            texts[name] = "".join([o.text for o in outputs if o.get("name") == "stdout"] + pictures)
        return texts[name]

    return run


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_has_no_outputs_and_explains_itself(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


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
    assert (Path(re.search(r"^report: (.*)$", text, re.MULTILINE)[1])).is_file()
