"""Every notebook runs, with few training steps; its figures are then other ones."""

import json
import pathlib
import re

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))


def code_of(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, capsys):
    first, *rest = code_of(path)
    quick, count = re.subn(r"STEPS, FILES = \d+, \d+", "STEPS, FILES = 2, 2", first)
    assert count == 1
    # Short documents and a small model: what is tested is that all of it still runs.
    quick = quick.replace(
        "task = ", "config.data.chunks = 4\nconfig.model.update({'width': 16, 'depth': 1})\ntask = "
    )
    names = {"__name__": path.stem}
    for number, source in enumerate([quick, *rest]):
        exec(compile(source, f"{path.name}, cell {number}", "exec"), names)
    assert "saved" in capsys.readouterr().out


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_run_in_order(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert outputs and all(output["output_type"] == "stream" for output in outputs)
