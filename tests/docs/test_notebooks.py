"""Every notebook runs, with few training steps; its figures are then other ones."""

import json
import pathlib
import re

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))


def code_of(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


# Small data and a small model: what is tested is that all of it still runs. Per notebook: the line
# of its sizes and another one, what is set before the task is built, and a word that it prints.
QUICK = {
    "documents": (
        r"STEPS, FILES = \d+, \d+",
        "STEPS, FILES = 2, 2",
        "config.data.chunks = 4\nconfig.model.update({'width': 16, 'depth': 1})\n",
        "saved",
    ),
    "tasks": (
        r"STEPS, TASKS = \d+, \d+",
        "STEPS, TASKS = 2, 2",
        "config.data.update({'views': 2, 'rows': 2, 'tasks': 20, 'side': 3})\n"
        "config.model.update({'width': 16, 'depth': 1, 'heads': 1, 'mlp_width': 16})\n",
        "solved",
    ),
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, capsys):
    pattern, sizes, smaller, word = QUICK[path.stem]
    first, *rest = code_of(path)
    quick, count = re.subn(pattern, sizes, first)
    assert count == 1
    quick = quick.replace("task = ", f"{smaller}task = ")
    names = {"__name__": path.stem}
    for number, source in enumerate([quick, *rest]):
        exec(compile(source, f"{path.name}, cell {number}", "exec"), names)
    assert word in capsys.readouterr().out


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_run_in_order(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert outputs and all(output["output_type"] == "stream" for output in outputs)
