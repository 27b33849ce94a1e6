"""Few-shot tasks as pictures: demonstrations, true output, and the attempts before and after."""

import pathlib
from collections.abc import Sequence
from typing import Any

import pandas as pd

from experiments import grids
from experiments.report import charts, read
from experiments.report.table import Data

# The colors of ARC's own pages, by number.
_COLORS = (
    *("#000000", "#0074d9", "#ff4136", "#2ecc40", "#ffdc00"),
    *("#aaaaaa", "#f012be", "#ff851b", "#7fdbff", "#870c25"),
)
_CELL, _MOST_PIXELS = 16, 160
_MEASURES = ("solved", "solved_in_one_attempt", "solved_by_some_view", "cells", "vote_share")
_TURNED = ("turned_right", "turned_wrong")


def lines(data: Data) -> pd.DataFrame | None:
    """Returns a line per method and number of steps, all streams together; None without tasks.

    Counts are tasks, summed over streams and seeds; cells and votes are means over tasks.
    """
    rows = data.rows()
    if "solved_by_some_view" not in rows or rows["solved_by_some_view"].isna().all():
        return None
    made = {}
    for (method, steps), part in rows.groupby(["method", "num_steps"], sort=False):
        count = part["num_examples"]
        line = {}
        for name in (*_MEASURES, *_TURNED):
            total = (part[name] * count).sum()
            title = charts.title_of(name).removesuffix(" (%)")
            counted = name.startswith(("solved", "turned"))
            line[title] = f"{total:.0f}" if counted else f"{total / count.sum():.3f}"
        line |= {"tasks": f"{count.sum():.0f}"}
        line["ms per task"] = f"{1000 * part['seconds'].sum() / count.sum():.0f}"
        made[method, int(steps)] = line
    order = [place for method in data.methods for place in made if place[0] == method]
    return pd.DataFrame.from_dict(made, orient="index").loc[order]


def shown_tasks(folder: pathlib.Path, said: list[str]) -> list[dict[str, Any]]:
    """Returns the tasks of ``grids.json`` as pictures, losses and gains first; [] without the file.

    Args:
      folder: of a run.
      said: notes, to which a damaged file is added.
    """
    made = read.kept_objects(folder / grids.FILE, _task, "tasks", said)
    made.sort(key=lambda task: (task["before"] == task["after"], task["after"]))
    firsts = {task["stream"]: task for task in reversed(made)}
    return [task | {"open": task is firsts[task["stream"]]} for task in made]


def _task(task: dict[str, Any]) -> dict[str, Any]:
    queries = []
    for query in task["queries"]:
        asked = {name: svg(query[name]) for name in ("input", "output")}
        for side in ("before", "after"):
            asked[side] = [
                {"svg": svg(cells), "votes": votes, "right": cells == query["output"]}
                for cells, votes in query[side]
            ]
        queries.append(asked | {"views": query["views"]})
    pairs = [[svg(cells) for cells in pair] for pair in task["demonstrations"]]
    solved = {
        side: all(any(tried["right"] for tried in asked[side]) for asked in queries)
        for side in ("before", "after")
    }
    return {"stream": task["stream"], "name": task["name"], "pairs": pairs, "queries": queries} | (
        solved
    )


def svg(cells: Sequence[Sequence[int]]) -> str:
    """Returns a grid as an SVG element; equal neighbors of a row are one rectangle."""
    height, width = len(cells), len(cells[0])
    size = min(_CELL, _MOST_PIXELS / max(height, width))
    rects = []
    for y, row in enumerate(cells):
        start = 0
        for x in range(1, width + 1):
            if x == width or row[x] != row[start]:
                rects.append(
                    f'<rect x="{start}" y="{y}" width="{x - start}" height="1" '
                    f'fill="{_COLORS[row[start]]}"/>'
                )
                start = x
    ruled = [f"M0 {y}H{width}" for y in range(1, height)] + [
        f"M{x} 0V{height}" for x in range(1, width)
    ]
    return (
        f'<svg class="cells" viewBox="0 0 {width} {height}" width="{width * size:g}" '
        f'height="{height * size:g}" role="img" aria-label="{height} by {width} cells">'
        f'{"".join(rects)}<path d="{"".join(ruled)}"/></svg>'
    )
