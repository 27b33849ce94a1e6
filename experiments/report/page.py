"""The page: one HTML file for a run or a sweep, which loads nothing from outside."""

import itertools
import json
import math
import pathlib
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import altair as alt
import itables
import jinja2
import numpy as np
import pandas as pd
import vl_convert

from experiments.report import intervals, notes, pictures, table, views
from experiments.report.charts import scale_of, title_of
from experiments.report.table import Data

_HERE = pathlib.Path(__file__).parent
_SEARCHED = ("trial", "label", "method", "dataset", "domain", "status", "message")
_FIRST = ("method", "dataset", "domain", "severity", "seed", "split_role", "status", "scope")
_MOST_CHOICES = 80
# What the address names beside columns; the search finds a column that is called like one.
_CONTROLS = ("role", "measure", "q", "across", "down", "price", "chosen")
_MOST_VALUES = 14
_NUM_BINS = 10
_MOST_LISTED = 200
_INK = "__ink__"
_CONFIG = {
    "background": "transparent",
    "view": {"stroke": None},
    "title": {"color": _INK},
    "text": {"color": _INK},
    "rule": {"color": _INK},
    "axis": {
        "labelColor": _INK,
        "titleColor": _INK,
        "labelLimit": 0,
        "titleLimit": 0,
        "gridColor": _INK,
        "gridOpacity": 0.1,
        "domainOpacity": 0.4,
    },
    "axisX": {"tickCount": 6},
    "legend": {"labelColor": _INK, "labelLimit": 0, "symbolLimit": 0, "symbolOpacity": 1},
}


def render(data: Data, *, name: str) -> str:
    """Returns the whole page.

    Args:
      data: what :func:`experiments.report.table.prepare` made.
      name: of the run or the sweep, for the title.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    results, payload = data.results, _payload(data)
    compact = json.dumps(payload, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    kind = "Test-time training" if results.trials is None else "Sweep"
    return environment.get_template("page.html.j2").render(
        title=f"{kind}: {name}" if name else kind,
        lead=lead(data),
        tiles=_tiles(data),
        notes=[*results.notes, *notes.notes(data)],
        unfinished=bool(results.trials and (results.trials["running"] + results.trials["waiting"])),
        views=views.views(data),
        methods=data.methods,
        payload=payload,
        choices=_choices(data),
        # A script element knows no other escape.
        data=compact.replace("<", "\\u003c"),
        libraries=_libraries(),
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        script=(_HERE / "page.js").read_text(encoding="utf-8"),
        table_style=(pathlib.Path(itables.__file__).parent / "html/dt_bundle.css").read_text(),
        pictures=pictures.examples(results.folder / "examples.npz"),
        as_run=table.as_run(data),
        failures=[(r, part.head(_MOST_LISTED), len(part)) for r, part in table.failures(data)],
        logs=payload["logs"],
        chosen=results.selection.get("chosen") or {},
        tried=_tried(results.selection),
        selection_note=results.selection.get("note", ""),
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
    charts = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    # "<!--" would start a comment in which the end of the script is not seen.
    return charts.replace("<!--", "<\\!--"), tables.replace("<!--", "<\\!--")


def _percent(value: float, half: float, name: str) -> str:
    """A mean and half its interval, in percent if it is a share."""
    digits = 1 if scale_of(name) > 1 else 3
    texts = [f"{scale_of(name) * x:.{digits}f}" for x in (value, half) if not math.isnan(x)]
    return " ± ".join(texts).replace("-", "−") + (" %" if scale_of(name) > 1 else "")


def _points(value: float, half: float, name: str) -> str:
    """A difference of two means."""
    text = _percent(value, half, name)
    return text.replace(" %", " points") if text.endswith("%") else text


_SCOPES = {
    "per_sample": "that adapts to each instance alone",
    "batch": "that adapts to a batch",
    "stream": "that carries what it learned along a stream",
}


def lead(data: Data) -> str:
    """Returns the first sentences, in plain text."""
    name = data.results.primary
    if not name or data.rows().empty:
        return "There is no reported row with a measure yet; what there is follows."
    kept = table.chosen(data)
    head = table.headline(kept)
    count = kept.rows(shifted=True)["domain"].nunique()
    text = f"Mean {title_of(name)} over {count} domain{'s' if count != 1 else ''}"
    text += ", with the settings that validation rows chose" if kept is not data else ""
    if not head.best:
        return f"{text}: no method that takes gradient steps has a complete mean yet."
    sentences = []
    for scope, line in head.best.items():
        what = _SCOPES.get(scope, "that takes gradient steps")
        value = _percent(line["mean"], line["half"], name)
        sentence = f"{line['method']} is the best method {what}, {value}"
        if head.plain is not None:
            mean, half, basis = head.differences[scope]
            moved = "below" if mean < 0 else "above"
            sure = f", {basis}" if basis else ", no interval: one seed and no instances"
            sentence += (
                f", {_points(abs(mean), half, name)} {moved} {head.plain['method']} (paired{sure})"
            )
        sentences.append(sentence)
    plain = ""
    if head.plain is not None:
        value = _percent(head.plain["mean"], head.plain["half"], name)
        plain = f" The best method without a gradient step is {head.plain['method']}, {value}"
        if head.source is not None and head.source["method"] != head.plain["method"]:
            value = _percent(head.source["mean"], head.source["half"], name)
            plain += f"; {head.source['method']} has {value}"
    return f"{text}: {'; '.join(sentences)}.{plain}."


def _tiles(data: Data) -> list[tuple[str, str]]:
    """Figures and what they are."""
    results = data.results
    if results.trials is not None:
        counts = results.trials
        left = counts["running"] + counts["waiting"]
        tiles = [(f"{sum(counts.values()):,}", "trials"), (f"{counts['done']:,}", "done")]
        tiles += [(f"{counts['failed']:,}", "failed")]
        return (
            tiles
            + ([(f"{left:,}", "not finished")] if left else [])
            + [(f"{len(data.frame):,}", "rows")]
        )
    if not results.primary or data.rows().empty:
        return []
    head = table.headline(data)
    lines = [(head.source, "the model itself"), (head.plain, "best without a gradient step")]
    lines += [(line, f"best, {scope.replace('_', ' ')}") for scope, line in head.best.items()]
    tiles, name = [], results.primary
    for line, what in lines:
        if line is not None:
            value = _percent(line["mean"], line["half"], name)
            tiles.append((value, f"{line['method']}: {what}"))
    clean = table.by_domain(data, "gain") if "gain" in results.measures else pd.DataFrame()
    best = next(iter(head.best.values()), None)
    if best is not None and len(clean):
        part = clean[(clean["domain"] == table.CLEAN) & (clean["method"] == best["method"])]
        for _, line in part.iterrows():
            value = _points(-line["mean"], line["half"], name)
            count = data.rows()["num_examples"].astype(float).median()
            images = f" ({-line['mean'] * count:+.1f} of {count:,.0f} examples wrong)"
            tiles.append((value, f"{best['method']} against source on clean{images}"))
    return tiles


def _binned(values: pd.Series) -> pd.Series:
    """Many numbers as ranges of equal width, of the logarithm where all are positive."""
    known = values.dropna().astype(float)
    if known.nunique() <= _MOST_VALUES:
        return values
    ends = (known.min(), known.max())
    edges = np.geomspace(*ends, _NUM_BINS + 1) if ends[0] > 0 else np.linspace(*ends, _NUM_BINS + 1)
    labels = [f"{low:.2g} to {high:.2g}" for low, high in itertools.pairwise(edges)]
    index = np.clip(np.searchsorted(edges, known, side="right") - 1, 0, _NUM_BINS - 1)
    return pd.Series([labels[i] for i in index], known.index).reindex(values.index)


def _encode(values: Sequence[Any], order: Sequence[Any] = ()) -> dict[str, Any]:
    """A column as ``{"values", "codes"}`` (-1: missing), or ``{"raw"}`` if few values repeat."""
    plain = [_plain(value) for value in values]
    if any(isinstance(value, list) for value in plain):
        return {"raw": plain}
    different = dict.fromkeys([*order, *(v for v in plain if v is not None)])
    if len(different) > max(20, len(plain) / 3):
        return {"raw": plain}
    code = {value: place for place, value in enumerate(different)}
    return {"values": list(code), "codes": [-1 if v is None else code[v] for v in plain]}


def _plain(value: Any) -> Any:
    if isinstance(value, (bool, np.bool_)):
        return int(value)
    if isinstance(value, (int, float, np.number)):
        if not math.isfinite(value):
            return None
        return int(value) if float(value).is_integer() else float(f"{value:.6g}")
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if value is None or value is pd.NA else str(value)


def _choices(data: Data) -> list[tuple[str, list[Any]]]:
    """The columns that a reader can choose a value of, and their values."""
    settings = [*data.results.settings, *(["num_steps"] if "num_steps" in data.frame else [])]
    found = []
    for name in ("method", "dataset", "domain", "severity", "seed", "status", *data.results.tags,
                 "scope", *settings):  # fmt: skip
        values = _binned(data.frame[name]) if _numeric(data.frame[name]) else data.frame[name]
        kept = list({_plain(v) for v in values.dropna()})
        order = {"method": data.methods, "domain": data.domains}.get(name)
        kept.sort(key=order.index if order else lambda v: (isinstance(v, str), v))
        if 1 < len(kept) <= _MOST_CHOICES and name not in _CONTROLS:
            found.append((name, kept))
    return found


def _numeric(column: pd.Series) -> bool:
    return all(isinstance(v, (int, float, np.number)) for v in column.dropna())


def _payload(data: Data) -> dict[str, Any]:
    """All that the page's script needs, ready for JSON; shares are in percent."""
    results, frame = data.results, data.frame
    measures = [name for name in results.measures if frame[name].notna().any()]
    axes = views.axes(data)
    names = [n for n in (*_FIRST, "trial", "label", "message", "num_examples") if n in frame]
    names += [*measures, *results.tags, *results.settings, *results.curves]
    names += [n for n in ("num_steps",) if n in frame]
    columns = {}
    for name in dict.fromkeys([*names, "place", "setting", "chosen"]):
        values = frame[name]
        if name in axes or name in results.settings:
            values = _binned(values) if _numeric(values) else values
        if (factor := scale_of(name)) > 1 and name in measures:
            values = values * factor
        elif factor > 1 and name in results.curves:
            values = values.map(lambda v: [factor * x for x in v] if isinstance(v, list) else None)
        order = {"method": data.methods, "domain": data.domains}.get(name, ())
        columns[name] = _encode(values.tolist(), order)
    replicates = {
        name: [
            None if np.isnan(row).any() else [float(f"{scale_of(name) * v:.5g}") for v in row]
            for row in matrix
        ]
        for name, matrix in data.replicates.items()
        if name in (results.primary, "gain", "turned_right", "turned_wrong")
    }
    hidden = {"place", "setting", "chosen", "worse", *results.curves}
    listed = [n for n in names if n not in hidden and not n.endswith((" change", " fell"))]
    listed = [n for n in dict.fromkeys(listed) if n not in ("trial", "label", "message")]
    listed += [n for n in ("trial", "label", "message") if n in frame and frame[n].notna().any()]
    roles = [role for role in ("reported", "validation") if (frame["split_role"] == role).any()]
    return {
        "rows": len(frame),
        "columns": columns,
        "titles": {n: title_of(n) for n in {*columns}} | {"num_steps": "steps"},
        "roles": roles or ["reported"],
        "measures": measures,
        "primary": results.primary,
        "prices": [n for n in ("cost", "milliseconds") if n in measures],
        "axes": axes,
        "settings": [n for n in (*results.settings, "num_steps") if n in columns],
        "curves": list(results.curves),
        "filters": [name for name, _ in _choices(data)],
        "searched": [n for n in (*_SEARCHED, *results.tags) if n in columns],
        "shown": listed,
        "constant": [n for n in listed if n != "method" and frame[n].nunique(dropna=False) == 1],
        "methods": data.methods,
        "groups": table.groups(data),
        "domains": data.domains,
        "t95": intervals.T95,
        "replicates": replicates,
        "config": _CONFIG,
        "logs": _logs(data),
        "views": [_view(view, data) for view in views.views(data)],
    }


def _view(view: views.View, data: Data) -> dict[str, Any]:
    spec = None
    if view.draw is not None:
        title = "__curve__" if view.values[0] in data.results.curves else "__measure__"
        chart = view.draw(alt.NamedData("rows"), data, title).properties(width="container")
        spec = {k: v for k, v in chart.to_dict().items() if k not in ("$schema", "config")}
        # Charts of a fixed height per line fit the width of the page alone.
        spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    return {**view._asdict(), "draw": None, "title": None, "text": None, "spec": spec}


def _logs(data: Data) -> dict[str, str]:
    """Where the log of every trial lies, seen from the page."""
    if "trial" not in data.frame:
        return {}
    found = {}
    for trial in data.frame["trial"].dropna().unique():
        place = pathlib.PurePosixPath("trials", str(trial))
        # A trial that shared a process with others has its words in the first one's folder.
        log = (data.results.folder / place / "log.txt").exists()
        found[str(trial)] = f"{place}/log.txt" if log else f"{place}/"
    return found


def words(value: Any) -> str:
    """Returns a setting or a fact as text."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(words, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} = {words(item)}" for key, item in value.items()) or "none"
    return str(value)


def _tried(selection: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings that were compared, the best of a method first."""
    tried = selection.get("tried")
    kept = [one for one in tried if isinstance(one, dict)] if isinstance(tried, list) else []
    order = list(dict.fromkeys(str(one.get("method")) for one in kept))
    chosen = selection.get("chosen") or {}

    def rank(one: dict[str, Any]) -> tuple[int, float]:
        error = one.get("error")
        value = error if isinstance(error, (int, float)) else math.inf
        return order.index(str(one.get("method"))), value

    return [
        {**one, "chosen": chosen.get(one.get("method")) == one.get("params")}
        for one in sorted(kept, key=rank)
    ]


def facts(data: Data) -> list[tuple[str, Any]]:
    """Returns names and values that say where the rows come from; a list value opens."""
    run = data.results.run
    found: list[tuple[str, Any]] = []
    for name in ("command", "device", "device_count", "versions", "commit", "started"):
        if run.get(name):
            value = run[name]
            if name == "command" and isinstance(value, list):
                value = " ".join(map(str, value))
            found.append((name.replace("_", " "), words(value)))
    for name in ("parts", "runs"):
        if isinstance(run.get(name), list) and len(run[name]) > (name == "runs"):
            keys = ("folder", "test", "command", "device", "commit", "started")
            found.append(
                (name, [", ".join(str(one[k]) for k in keys if one.get(k)) for one in run[name]])
            )
    known = {"command", "device", "device_count", "versions", "commit", "started", "parts", "runs"}
    found += [(k, words(v)) for k, v in run.items() if k not in known and k != "config"]
    if isinstance(run.get("config"), dict):
        found.append(("config", [f"{k}: {words(v)}" for k, v in run["config"].items()]))
    if "checkpoint" in data.frame:
        for name, part in data.frame.dropna(subset=["checkpoint"]).groupby("checkpoint"):
            seeds = ", ".join(f"{seed:g}" for seed in sorted(part["seed"].dropna().unique()))
            if data.results.trials is None:
                found.append(("checkpoint", f"{name} (seed {seeds})"))
    lost = int((data.frame["status"] != "ok").sum())
    return [*found, ("rows", f"{len(data.frame) - lost:,} ok, {lost:,} failed")]
