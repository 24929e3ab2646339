"""The notebook of the documentation runs, in order, where nothing but fastkd is installed."""

import ast
import contextlib
import io
import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from harness import seconds

from fastkd import artifacts

NOTEBOOK = Path(__file__).parent.parent / "docs" / "tour.ipynb"


def cells(kind: str) -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def run(source: str, names: dict[str, object]) -> object:
    """Run a cell as Jupyter does: return the value of its last line, if that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, NOTEBOOK.name, "exec"), names)
    return eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names) if last else None


@pytest.mark.slow
@pytest.mark.timeout(seconds(300))
def test_the_tour_runs(tmp_path, monkeypatch):
    """47 s of CPU time when it was measured, on two cores with one torch thread."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        values = [run("".join(cell["source"]), names) for cell in cells("code")]
    _, (counts, classes), teacher, student, _, page, top1 = values
    assert (sum(counts.values()), len(classes)) == (1797, 10)
    assert teacher["val"] > 0.8
    assert student["val"] > 0.5
    assert top1 > 0.5
    assert page == Path("tour/report/report.html")
    assert page.stat().st_size > 100_000
    assert [line for line in printed.getvalue().splitlines() if line.strip().startswith("score")][-1].endswith("reused")
    assert artifacts.load(names["student"].path, "RUN").key == names["student"].key
    assert {path.name for path in tmp_path.iterdir()} == {"tour"}
    assert plt.get_fignums() == []


def test_the_notebook_has_no_outputs_and_its_links_lead_somewhere():
    for cell in cells("code"):
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
    text = "".join(line for cell in cells("markdown") for line in cell["source"])
    links = [one.partition(")")[0] for one in text.split("](")[1:]]
    assert links
    assert all((NOTEBOOK.parent / link).is_file() for link in links)
