"""Gradient alignment against gain: their correlation, and the scatter plot as one page."""

import base64
import statistics
from collections.abc import Sequence
from typing import Any

import altair as alt
import jinja2
import pandas as pd
import vl_convert

from experiments.report import intervals

PUBLISHED = (
    "Sun et al. (2020) report a correlation of r = 0.93 over the 75 sets of 15 corruptions at 5 "
    "severities of CIFAR-10-C."
)
# Column of a record -> heading, factor, digits.
_COLUMNS = {
    "inner_product": ("inner product", 1, 4),
    "cosine": ("cosine", 1, 3),
    "aligned_share": ("aligned (%)", 100, 1),
    "source_error": ("source error (%)", 100, 2),
    "ttt_error": ("TTT error (%)", 100, 2),
    "gain": ("gain (points)", 100, 2),
    "turned_wrong": ("turned wrong (%)", 100, 2),
    "label_free_error": ("label-free error (%)", 100, 2),
    "oracle_error": ("oracle error (%)", 100, 2),
}
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Gradient alignment against gain</title>
<style>:root { color-scheme: light dark; } body { font: 15px/1.5 system-ui, sans-serif;
max-width: 1100px; margin: 0 auto; padding: 24px 14px; } img { max-width: 100%; background: #fff; }
div { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
td, th { padding: 3px 9px; text-align: right; border-bottom: 1px solid #8884; }
th:first-child { text-align: left; } dd { overflow-wrap: anywhere; }</style></head><body><main>
<h1>Gradient alignment against gain</h1>
<p>Alignment, errors and the oracle columns use labels: they evaluate and choose nothing. The oracle
picks its learning rate and number of steps on the images it is scored on, a bound and not a
result.</p>
{{ picture | safe }}<p>Each mark is one set of images. Inner product over the shared encoder
parameters that adapt, mean per image; dashed: least squares. ± is half of a 95 % interval over the
images of one model, paired. Here {{ shown }}. {{ published }}</p>
<div tabindex="0" role="region" aria-label="Sets">{{ table | safe }}</div>
<dl>{% for name, value in facts.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
</main></body></html>
"""


def correlation(rows: Sequence[dict[str, Any]]) -> float | None:
    """Returns Pearson's r between mean inner product and gain, a point per row.

    Returns:
      r in [-1, 1]; None for fewer than three rows, or where one of the two does not vary.
    """
    pairs = _known(rows)[["inner_product", "gain"]]
    if len(pairs) < 3 or (pairs.nunique() < 2).any():
        return None
    return statistics.correlation(*pairs.to_numpy().T.tolist())


def _known(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The rows that are a point, with the gain in points of error."""
    frame = pd.DataFrame(rows).astype({"inner_product": float, "gain": float})
    return frame.assign(gain=100 * frame["gain"]).dropna(subset=["inner_product", "gain"])


def scatter(rows: Sequence[dict[str, Any]]) -> alt.LayerChart:
    """Returns the chart: a mark per (corruption, severity, seed), least squares, r."""
    frame = _known(rows)[["domain", "severity", "seed", "inner_product", "gain"]]
    r = correlation(rows)
    title = f"{len(frame)} sets" if r is None else f"r = {r:.2f}, {len(frame)} sets"
    x = alt.X("inner_product:Q", title="mean inner product of the main and the auxiliary gradient")
    y = alt.Y("gain:Q", title="gain: source minus TTT error (points)")
    scale = alt.Scale(scheme="blues", domain=[0, 5])
    color = alt.Color("severity:Q", scale=scale, legend=alt.Legend(values=[1, 2, 3, 4, 5]))
    tip = ["domain:N", "severity:Q", "seed:Q", "inner_product:Q", "gain:Q"]
    marks = (
        alt.Chart(frame)
        .mark_point(filled=True, size=60, opacity=0.9)
        .encode(x=x, y=y, color=color, shape=alt.Shape("severity:O"), tooltip=tip)
    )
    line = (
        alt.Chart(frame)
        .transform_regression("inner_product", "gain")
        .mark_line(strokeDash=[4, 3], color="#7d858d")
        .encode(x="inner_product:Q", y="gain:Q")
    )
    chart = (line + marks).properties(width=560, height=320, title=title)
    # Letters are wider in some browsers than in the file.
    return chart.properties(padding={"left": 5, "top": 5, "bottom": 5, "right": 20})


def picture(rows: Sequence[dict[str, Any]]) -> str:
    """Returns :func:`scatter` as an ``<img>``, for pages with other styles."""
    drawing = vl_convert.vegalite_to_svg(scatter(rows).to_json())
    coded = base64.b64encode(drawing.encode()).decode()
    alt_text = "Gain of test-time training against gradient alignment, a mark per set of images"
    return f'<img alt="{alt_text}" src="data:image/svg+xml;base64,{coded}">'


def cells(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns the columns that there are, by their headings, as text."""
    columns = {}
    for name, (title, factor, digits) in _COLUMNS.items():
        if name in frame:
            values = factor * frame[name].astype(float)
            columns[title] = ["–" if pd.isna(v) else f"{v:.{digits}f}" for v in values]
    if {"gain", "turned_right", "turned_wrong", "num_examples"} <= {*frame}:
        columns["gain (points)"] = _gains(frame)
    return pd.DataFrame(columns, index=frame.index)


def _gains(frame: pd.DataFrame) -> list[str]:
    """Gains and half their paired interval: an image is turned right (1), wrong (-1) or neither."""
    values = frame[["gain", "turned_right", "turned_wrong", "num_examples"]].astype(float)
    variance = values["turned_right"] + values["turned_wrong"] - values["gain"] ** 2
    halves = intervals.NORMAL95 * (variance.clip(lower=0) / values["num_examples"]) ** 0.5
    return [
        "–"
        if pd.isna(gain)
        else f"{100 * gain:.2f} ± {100 * half:.2f}" + f" ({intervals.UNSEEN})" * (abs(gain) <= half)
        for gain, half in zip(values["gain"], halves, strict=True)
    ]


def render(record: dict[str, Any]) -> str:
    """Returns the page of a record of :mod:`experiments.diagnose`; it loads nothing."""
    rows, r = record["rows"], correlation(record["rows"])
    shown = "too few sets for a correlation" if r is None else f"r = {r:.2f} over {len(rows)} sets"
    frame = pd.DataFrame(rows)
    sets = [f"{x['domain']} {x['severity']}, seed {x['seed']}" for x in rows]
    facts = {name: record[name] for name in ("command", "device_count", "device", "commit")}
    facts["versions"] = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
    environment = jinja2.Environment(autoescape=True)
    return environment.from_string(_PAGE).render(
        picture=picture(rows),
        shown=shown,
        published=PUBLISHED,
        table=cells(frame.set_index(pd.Index(sets))).to_html(border=0),
        facts=facts,
    )
