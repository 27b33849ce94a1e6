"""The page: one HTML file for a run or a sweep, which loads nothing from outside."""

import base64
import gzip
import itertools
import json
import math
import pathlib
import re
from functools import cache
from typing import Any

import altair as alt
import itables
import jinja2
import numpy as np
import pandas as pd
import vl_convert

from experiments.report import charts, documents, grids, intervals, notes, pictures, table
from experiments.report.charts import scale_of, title_of
from experiments.report.table import Data

_HERE = pathlib.Path(__file__).parent
_SEARCHED = ("trial", "label", "method", "dataset", "domain", "status", "message")
_FIRST = ("method", "dataset", "domain", "severity", "seed", "split_role", "status", "scope")
_TRIAL = ("trial", "label", "message")
_MOST_CHOICES = 80
# What the address names beside columns; the search finds a column that is called like one.
_CONTROLS = ("role", "measure", "q", "across", "down", "price", "chosen", "split_role")
_MOST_VALUES = 14
_NUM_BINS = 10
_MOST_LISTED = 200
# The script puts in the color of the page's text, which is another one in the dark.
_INK = {"color": "__color__"}
_LABELS = {"labelColor": "__color__", "titleColor": "__color__", "labelLimit": 0, "titleLimit": 0}
_COLUMNS = {"expr": "containerSize()[0] < 500 ? 1 : 3"}
_CONFIG = {
    **{"background": "transparent", "view": {"stroke": None}, "axisX": {"tickCount": 6}},
    **{"title": _INK, "text": _INK, "rule": _INK},
    "axis": {**_LABELS, "gridColor": "__color__", "gridOpacity": 0.1, "domainOpacity": 0.4},
    "legend": {**_LABELS, "symbolLimit": 0, "symbolOpacity": 1, "columns": _COLUMNS},
}
_ACTIONS = {"export": True, "source": False, "compiled": False, "editor": False}
_FACTS = ("command", "device", "device_count", "versions", "commit", "started")


def render(data: Data, *, name: str) -> str:
    """Returns the whole page.

    Args:
      data: what :func:`experiments.report.table.prepare` made.
      name: of the run or the sweep, for the title.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    results, views = data.results, charts.views(data)
    shown = pictures.examples(results.folder / "examples.npz", results.notes)
    payload = _payload(data, views)
    text = json.dumps(payload, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    kind = "Test-time training" if results.trials is None else "Sweep"
    return environment.get_template("page.html.j2").render(
        title=f"{kind}: {name}" if name else kind,
        lead=notes.lead(data),
        notes=[*results.notes, *notes.notes(data)],
        unfinished=bool(results.trials and (results.trials["running"] + results.trials["waiting"])),
        views=views,
        payload=payload,
        data=base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode(),
        libraries=_libraries(),
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        script=(_HERE / "page.js").read_text(encoding="utf-8"),
        table_style=(pathlib.Path(itables.__file__).parent / "html/dt_bundle.css").read_text(),
        pictures=shown,
        documents=documents.lines(data),
        few_shot=grids.lines(data),
        grids=grids.shown_tasks(results.folder, results.notes),
        passages=documents.shown_passages(results.folder, results.notes),
        as_run=table.as_run(data),
        failures=[(r, part.head(_MOST_LISTED), len(part)) for r, part in table.failures(data)],
        selection=results.selection,
        tried=_tried(results.selection, results.primary),
        facts=facts(data),
        words=words,
        means=table.means(data) if results.primary and len(data.rows()) else None,
    )


@cache
def _libraries() -> tuple[str, str]:
    """Vega with its friends, and DataTables, as scripts of the installed packages."""
    tables = (pathlib.Path(itables.__file__).parent / "html/dt_bundle.js").read_text("utf-8")
    exported = re.search(r"export\{[^}]*?([\w$]+) as jQuery[^}]*\};?", tables)
    if exported is None:
        raise RuntimeError("itables' bundle no longer exports jQuery; pin itables to 2.9.")
    tables = tables.replace(exported[0], f"window.jQuery={exported[1]};")
    # The stub lacks the default, a bundle of vega, vega-lite and vega-embed.
    vega = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    # "<!--" would start a comment in which the end of the script is not seen.
    return vega.replace("<!--", "<\\!--"), tables.replace("<!--", "<\\!--")


def _binned(values: pd.Series) -> pd.Series:
    """Many numbers as ranges of equal width, of the logarithm where all are positive."""
    if not pd.api.types.is_numeric_dtype(values.dropna().infer_objects()):
        return values
    known = values.dropna().astype(float)
    if known.nunique() <= _MOST_VALUES:
        return values
    ends = (known.min(), known.max())
    edges = np.geomspace(*ends, _NUM_BINS + 1) if ends[0] > 0 else np.linspace(*ends, _NUM_BINS + 1)
    labels = np.array([f"{low:.2g} to {high:.2g}" for low, high in itertools.pairwise(edges)])
    return pd.Series(labels[np.digitize(known, edges[1:-1])], known.index).reindex(values.index)


def _encode(values: pd.Series) -> dict[str, Any]:
    """A column as its different values and, per row, which one it has (-1: none)."""
    if values.map(lambda value: isinstance(value, list)).any():
        return {"values": [_plain(value) for value in values], "codes": [*range(len(values))]}
    codes, known = pd.factorize(values)
    return {"values": [_plain(value) for value in known], "codes": codes.tolist()}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, (bool, np.bool_, int, float, np.number)):
        if not math.isfinite(value):
            return None
        return int(value) if float(value).is_integer() else float(f"{value:.6g}")
    return None if value is None or value is pd.NA else str(value)


def _columns(data: Data) -> dict[str, dict[str, Any]]:
    """What the page's script may filter, average and list; shares are in percent."""
    results, frame = data.results, data.frame
    names = [*_FIRST, "num_examples", *results.measures, *results.tags, *results.settings]
    names += [
        "num_steps",
        *results.curves,
        *_TRIAL,
        "place",
        "setting",
        "settings",
        "chosen",
        "chance",
    ]
    frame = frame.assign(settings=_settings(data))
    columns = {}
    for name in dict.fromkeys(name for name in names if name in frame):
        values, factor = frame[name], scale_of(name)
        if values.isna().all() and name not in _FIRST:
            continue
        if name in (*results.settings, "num_steps"):
            values = _binned(values)
        elif name in results.measures:
            values = factor * values
        elif name == "chance":
            values = scale_of(results.primary) * values
        elif name in results.curves:
            values = values.map(lambda v, k=factor: np.multiply(k, v).tolist(), na_action="ignore")
        columns[name] = _encode(values)
    return columns


def _settings(data: Data) -> pd.Series:
    """What a row's method was set to, as text."""
    names = [*data.results.settings, *(["num_steps"] if "num_steps" in data.frame else [])]
    lines = data.frame.drop_duplicates("setting").set_index("setting")[names]
    texts = {
        number: ", ".join(f"{title_of(str(name))} {words(v)}" for name, v in line.dropna().items())
        for number, line in lines.iterrows()
    }
    return data.frame["setting"].map(texts)


def _choices(data: Data, columns: dict[str, dict[str, Any]]) -> list[tuple[str, list[Any]]]:
    """The columns that a reader can choose a value of, and their values."""
    found = []
    listed = {"method": data.methods, "domain": data.domains}
    for name in (*_FIRST, *data.results.tags, *data.results.settings, "num_steps"):
        values = [v for v in columns.get(name, {"values": []})["values"] if v is not None]
        order = [*listed.get(name, ()), *sorted(values, key=lambda v: (isinstance(v, str), v))]
        if 1 < len(values) <= _MOST_CHOICES and name not in _CONTROLS:
            found.append((name, [v for v in dict.fromkeys(order) if v in values]))
    return found


def _payload(data: Data, views: list[charts.View]) -> dict[str, Any]:
    """All that the page's script needs, ready for JSON."""
    results, columns, axes = data.results, _columns(data), charts.axes(data)
    measures = [name for name in results.measures if name in columns]
    hidden = {"place", "setting", "settings", "chosen", "chance", "worse"}
    hidden |= {*results.curves, *_TRIAL}
    listed = [n for n in columns if n not in hidden and not n.endswith((" change", " fell"))]
    # The link to a log stands first, long texts last.
    listed = [n for n in (*_TRIAL[:1], *listed, *_TRIAL[1:]) if n in columns]
    roles = {*data.frame["split_role"].dropna()}
    return {
        "rows": len(data.frame),
        "columns": columns,
        "titles": {name: title_of(name) for name in (*columns, "num_steps")},
        "roles": [r for r in ("reported", "validation") if r in roles] or ["reported"],
        "measures": measures,
        "primary": results.primary if data.ranks else "",
        "prices": [n for n in ("cost", "milliseconds") if n in measures],
        "axes": axes,
        "curves": list(results.curves),
        "choices": _choices(data, columns),
        "searched": [n for n in (*_SEARCHED, *results.tags) if n in columns],
        "shown": listed,
        "table": [_listed(name, columns[name]) for name in listed],
        "methods": data.methods,
        "groups": table.groups(data),
        "t95": intervals.T95,
        "words": [intervals.NO_INTERVAL, intervals.UNSEEN, intervals.AT_CHANCE],
        "differences": [name for name in measures if charts.is_difference(name)],
        "replicates": {
            name: [
                None if np.isnan(row).any() else [_plain(scale_of(name) * value) for value in row]
                for row in matrix
            ]
            for name, matrix in data.replicates.items()
            if name in (results.primary, "gain", "turned_right", "turned_wrong")
        },
        "logs": _logs(data),
        "views": [_view(view, data) | {"panel": p} for view in views for p in view.panels],
    }


def _listed(name: str, column: dict[str, Any]) -> dict[str, Any]:
    """How DataTables lists a column; a type that is named needs no look at every row."""
    numbers = all(isinstance(value, (int, float)) for value in column["values"])
    return {
        "type": "num" if numbers else "string",
        "visible": name == "method" or len({*column["codes"]}) > 1,
        "searchable": False,
        "orderSequence": ["asc", "desc", ""],
    }


def _view(view: charts.View, data: Data) -> dict[str, Any]:
    spec = None
    if view.draw is not None:
        title = "__curve__" if view.values[0] in data.results.curves else "__measure__"
        chart = view.draw(alt.NamedData("rows"), data, title).properties(width="container")
        spec = {k: v for k, v in chart.to_dict().items() if k not in ("$schema", "config")}
        # Charts of a fixed height per line fit the width of the page alone.
        spec |= {"autosize": {"type": "fit-x", "contains": "padding"}, "config": _CONFIG}
        spec["usermeta"] = {"embedOptions": {"actions": _ACTIONS}}
    several = len(view.values) > 1
    return view._asdict() | {
        **{"draw": None, "title": None, "text": None, "spec": spec},
        "column": "measure" if several else "domain",
        "columns": view.values if several else (*data.domains, "mean"),
    }


def _logs(data: Data) -> dict[str, str]:
    """Where the log of every trial lies, seen from the page."""
    places = {}
    for trial in data.frame.get("trial", pd.Series(dtype=object)).dropna().unique():
        place = f"trials/{trial}/"
        # A trial that shared a process with others has its words in the first one's folder.
        log = (data.results.folder / place / "log.txt").exists()
        places[str(trial)] = f"{place}log.txt" if log else place
    return places


def words(value: Any) -> str:
    """Returns a setting or a fact as text."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(words, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} = {words(item)}" for key, item in value.items()) or "none"
    return str(value)


def _tried(selection: dict[str, Any], primary: str) -> list[dict[str, Any]]:
    """The settings that were compared, the best of a method first."""
    tried, chosen = selection.get("tried"), selection.get("chosen") or {}
    kept = [line for line in tried if isinstance(line, dict)] if isinstance(tried, list) else []
    kept = [{**line, "error": line.get(primary)} for line in kept]
    lines = pd.DataFrame(kept, columns=["method", "params", "error"])
    lines["chosen"] = [chosen.get(line.get("method")) == line.get("params") for line in kept]
    lines["error"] = pd.to_numeric(lines["error"], errors="coerce")
    return lines.sort_values(["method", "error"], kind="stable").to_dict("records")


def facts(data: Data) -> list[tuple[str, Any]]:
    """Returns names and values that say where the rows come from; a list value opens."""
    run, frame = data.results.run, data.frame
    found: dict[str, Any] = {}
    for name in dict.fromkeys([*(n for n in _FACTS if n in run), *run]):
        value = run[name]
        if name in ("parts", "runs") and isinstance(value, list):
            found[name] = [words(part) for part in value]
        elif name == "config" and isinstance(value, dict):
            found[name] = [f"{key}: {words(item)}" for key, item in value.items()]
        else:
            found[name.replace("_", " ")] = words(value)
    if "checkpoint" in frame and data.results.trials is None:
        pairs = frame[["checkpoint", "seed"]].dropna().drop_duplicates().sort_values("seed")
        found["checkpoints"] = [f"{name} (seed {seed:g})" for name, seed in pairs.to_numpy()]
    lost = int((frame["status"] != "ok").sum())
    return [*found.items(), ("rows", f"{len(frame) - lost:,} ok, {lost:,} failed")]
