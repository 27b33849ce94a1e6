"""Gradient alignment against gain: their correlation, and the scatter plot as one page."""

import base64
import statistics
from collections.abc import Sequence
from html import escape
from typing import Any

import altair as alt
import pandas as pd
import vl_convert

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
_STYLE = """:root { color-scheme: light dark; } body { font: 15px/1.5 system-ui, sans-serif;
max-width: 1100px; margin: 0 auto; padding: 24px 14px; } img { max-width: 100%; background: #fff; }
div { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
td, th { padding: 3px 9px; text-align: right; border-bottom: 1px solid #8884; }
th:first-child { text-align: left; } dd { overflow-wrap: anywhere; }"""


def _points(rows: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Inner product and gain, the latter in points of error, where both are known."""
    pairs = [(row["inner_product"], row["gain"]) for row in rows]
    return [(x, 100 * y) for x, y in pairs if x is not None and y is not None]


def correlation(rows: Sequence[dict[str, Any]]) -> float | None:
    """Returns Pearson's r between mean inner product and gain, a point per row.

    Returns:
      r in [-1, 1]; None for fewer than three rows, or where one of the two does not vary.
    """
    points = _points(rows)
    if len(points) < 3:
        return None
    try:
        return statistics.correlation(*zip(*points, strict=True))
    except statistics.StatisticsError:
        return None


def noise_share(rows: Sequence[dict[str, Any]]) -> float | None:
    """Returns the share of the variance of the gains that few images per set account for.

    An image is turned right (1), wrong (-1) or neither (0), and a set's gain is their mean.

    Returns:
      At most 1; None for fewer than three rows, or gains that are all the same.
    """
    if len(rows) < 3:
        return None
    spread = statistics.pvariance([row["gain"] for row in rows])
    noise = statistics.mean(
        (row["turned_right"] + row["turned_wrong"] - row["gain"] ** 2) / row["num_examples"]
        for row in rows
    )
    return min(1.0, noise / spread) if spread else None


def scatter(rows: Sequence[dict[str, Any]]) -> alt.LayerChart:
    """Returns the chart: a mark per (corruption, severity, seed), least squares, r."""
    kept = [row for row in rows if row["inner_product"] is not None and row["gain"] is not None]
    names = ("domain", "severity", "seed", "inner_product")
    frame = pd.DataFrame(
        [{**{name: row[name] for name in names}, "gain": 100 * row["gain"]} for row in kept]
    )
    r = correlation(rows)
    title = f"{len(kept)} sets" if r is None else f"r = {r:.2f}, {len(kept)} sets"
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
    return (line + marks).properties(width=560, height=320, title=title)


def picture(rows: Sequence[dict[str, Any]]) -> str:
    """Returns :func:`scatter` as an ``<img>``, for pages with other styles."""
    drawing = vl_convert.vegalite_to_svg(scatter(rows).to_json())
    coded = base64.b64encode(drawing.encode()).decode()
    alt_text = "Gain of test-time training against gradient alignment, a mark per set of images"
    return f'<img alt="{alt_text}" src="data:image/svg+xml;base64,{coded}">'


def markdown(record: dict[str, Any]) -> str:
    """Returns what a page shows of a record, in MyST: correlation, plot, means per severity."""
    rows, r = record["rows"], correlation(record["rows"])
    shown = "undefined" if r is None else f"{r:.2f}"
    share = noise_share(rows)
    noise = (
        ""
        if share is None
        else f"Sampling noise is {100 * share:.0f} % of the variance of these gains, which by "
        f"itself keeps r below about {max(0.0, 1 - share) ** 0.5:.2f}. "
    )
    names = ("inner_product", "cosine", "aligned_share", "source_error", "gain")
    lines = [
        f"Over {len(rows)} sets of {rows[0]['dataset']}, {rows[0]['num_examples']} images each, "
        "the mean inner product of the main and the auxiliary gradient (shared encoder parameters "
        f"that adapt) and the gain of `{rows[0]['method']}` correlate with r = {shown}. "
        f"{noise}{PUBLISHED} Computed from `{record['command']}` on "
        f"{record['device_count']} x {record['device']}, commit {record['commit']}; see "
        "[Diagnostics](diagnostics.md).",
        "",
        "```{raw} html",
        picture(rows),
        "```",
        "",
        "Means over the corruptions:",
        "",
        f"| severity | {' | '.join(_COLUMNS[name][0] for name in names)} |",
        "|---|---|---|---|---|---|",
    ]
    for severity in sorted({row["severity"] for row in rows}):
        held = [row for row in rows if row["severity"] == severity]
        cells = [_cell(name, statistics.mean(row[name] for row in held)) for name in names]
        lines.append(f"| {severity} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(name: str, value: float | None) -> str:
    _, factor, digits = _COLUMNS[name]
    return "–" if value is None else f"{factor * value:.{digits}f}"


def render(record: dict[str, Any]) -> str:
    """Returns the page of a record of :mod:`experiments.diagnose`; it loads nothing."""
    rows, r = record["rows"], correlation(record["rows"])
    shown = "too few sets for a correlation" if r is None else f"r = {r:.2f} over {len(rows)} sets"
    heads = "".join(f"<th>{title}</th>" for title, _, _ in _COLUMNS.values())
    body = "".join(
        f"<tr><th>{escape(row['domain'])} {row['severity']}, seed {row['seed']}</th>"
        + "".join(f"<td>{_cell(name, row[name])}</td>" for name in _COLUMNS)
        + "</tr>"
        for row in rows
    )
    facts = {
        "command": record["command"],
        "device": f"{record['device_count']} x {record['device']}",
        "commit": record["commit"],
        "versions": ", ".join(f"{name} {value}" for name, value in record["versions"].items()),
    }
    listed = "".join(f"<dt>{k}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items())
    title = "Gradient alignment against gain"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body><main><h1>{title}</h1>"
        "<p>Alignment, errors and the oracle columns use labels: they evaluate and choose nothing. "
        "The oracle picks its learning rate and number of steps on the images it is scored on, a "
        "bound and not a result.</p>"
        f"{picture(rows)}<p>Each mark is one set of images. Inner product over the shared encoder "
        f"parameters that adapt, mean per image; dashed: least squares. Here {shown}. {PUBLISHED}"
        f"</p><div><table><thead><tr><th>set</th>{heads}</tr></thead><tbody>{body}</tbody></table>"
        f"</div><dl>{listed}</dl></main></body></html>\n"
    )
