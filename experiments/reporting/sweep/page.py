"""The HTML page of a sweep: a frame, the packed rows, and the scripts that show them."""

import json
import pathlib
from html import escape
from typing import Any

from experiments.reporting.origin import facts_html, run_facts
from experiments.reporting.style import CSS
from experiments.reporting.sweep import terminal
from experiments.reporting.sweep.columns import payload
from experiments.reporting.sweep.source import Sweep

_HERE = pathlib.Path(__file__).parent
# In the order they are run.
SCRIPTS = ("rows.js", "chart.js", "table.js", "heat.js", "bars.js", "cost.js", "failures.js")
MAIN = "main.js"


def _script() -> str:
    texts = [(_HERE / name).read_text(encoding="utf-8") for name in (*SCRIPTS, MAIN)]
    return '"use strict";\n(() => {\n' + "\n".join(texts) + "})();\n"


def data_json(value: Any) -> str:
    """JSON that no text in it can end: a script element knows no other escape."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.replace("<", "\\u003c")


def _tile(value: str, label: str, kind: str = "") -> str:
    return f'<div class="tile {kind}"><b>{escape(value)}</b><span>{escape(label)}</span></div>'


def _tiles(sweep: Sweep) -> str:
    counts = sweep.counts
    tiles = [_tile(f"{sweep.trials:,}", "trials" if sweep.planned else "trials with rows")]
    tiles.append(_tile(f"{counts['done']:,}", "done"))
    tiles.append(_tile(f"{counts['failed']:,}", "failed", "bad" if counts["failed"] else ""))
    if not sweep.finished:
        tiles.append(_tile(f"{counts['running'] + counts['waiting']:,}", "not finished", "bad"))
    tiles.append(_tile(f"{sweep.table.num_rows:,}", "rows"))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _section(name: str, title: str, text: str) -> str:
    return (
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>'
        f'<p class="sub">{text}</p><div data-body></div></section>'
    )


_SECTIONS = (
    _section(
        "heat",
        "Error against steps and learning rate",
        "Mean error (%) of the rows that pass the filter, and their number. A dagger marks a mean "
        "over fewer domains, severities or seeds than others of the same method have.",
    )
    + _section(
        "bars",
        "Error per corruption",
        "Mean error (%) of each seed's rows, then over the seeds; the line is the standard error. "
        "A mean is over all settings that pass the filter, good and bad ones: to compare methods, "
        "filter to the settings they are to be used with.",
    )
    + _section(
        "cost",
        "Cost against gain",
        "Gain: error of the model's own prediction (<code>source</code> or <code>joint</code> of "
        "the same model, images and seed) minus the error, in percentage points; above zero, "
        "adapting helps. A point is a method with one choice of settings.",
    )
    + _section(
        "table",
        "Rows",
        "A line per method, domain, severity and seed of a trial. Press a heading to sort.",
    )
    + _section(
        "failures",
        "Failures",
        "By message; messages that differ in numbers alone stand together. The row of a trial "
        "that failed has the method, domain and seed that its label names, if it names one.",
    )
)


def render(sweep: Sweep, *, name: str) -> str:
    """The whole page.

    Args:
      sweep: what was read.
      name: of the sweep, for the title.

    Returns:
      A complete HTML document that loads nothing from outside.

    Raises:
      ReportError: a column of the table is not what it should be.
    """
    title = f"Sweep: {pathlib.PurePath(name).name}"
    notes = "".join(f"<li>{escape(note)}</li>" for note in sweep.notes)
    kind = "note" if sweep.finished else "note bad"
    origin = '<p class="quiet">No run.json lies in the folder of a trial.</p>'
    if sweep.run:
        run = {key: value for key, value in sweep.run.items() if key != "config"}
        origin = (
            '<p class="sub">As the first trial recorded it; the code and the versions are those '
            f"of every trial.</p>{facts_html(run_facts(run))}"
        )
    parts = [
        f"<h1>{escape(title)}</h1>",
        _tiles(sweep),
        f'<div class="{kind}" id="notes"><ul>{notes}</ul></div>' if notes else "",
        "<noscript><p>The charts and the table of this page need JavaScript; these are its "
        f"means.</p><pre>{escape(terminal.render(sweep))}</pre></noscript>",
        '<form id="filter" role="search" aria-label="Filter of all views"></form>',
        '<div id="shown" role="status"></div>',
        _SECTIONS,
        f'<section id="origin"><h2>Provenance</h2>{origin}</section>',
    ]
    style = CSS + (_HERE / "sweep.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f'<body><main>{"".join(parts)}</main><script type="application/json" id="data">'
        f"{data_json(payload(sweep.table))}</script><script>{_script()}</script></body></html>\n"
    )
