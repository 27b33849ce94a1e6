"""Altair charts of a run or of a sweep, the same in pages, notebooks and files.

Every chart draws lines of :func:`experiments.report.intervals.summarize`, in which shares are in
percent, from a frame or, in a page, from what the page's script hands over as ``rows``. Words
between two pairs of underscores stand for what a reader of the page chooses.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import altair as alt
import numpy as np
import pandas as pd

from experiments.report import intervals, table
from experiments.report.read import is_share
from experiments.report.table import CLEAN, Data

PALETTE = (
    "#7d858d", "#0b62c4", "#c2571a", "#1b8a5a", "#b0348c", "#8a6d00", "#6a4fc9", "#b4483a",
    "#008a9e", "#5c7f1f",
)  # fmt: skip
_TITLES = {
    "error": "error",
    "gain": "gain over source",
    "cost": "cost (plain forwards)",
    "milliseconds": "ms per instance",
    "worse": "rows made worse",
    "num_steps": "steps",
}
_INTERVAL = [
    alt.Tooltip("mean:Q", format=",.4~g"),
    alt.Tooltip("low:Q", format=",.4~g", title="95 % from"),
    alt.Tooltip("high:Q", format=",.4~g", title="to"),
    alt.Tooltip("basis:N", title="interval over"),
    alt.Tooltip("remark:N"),
]
_STEPS = "inner steps (0: before the first)"
# What the entries of a curve are, by the end of its name.
_ALONG = {
    "_by_position": "position k: the chunks after the first 2^k − 1, as many and one more",
    "_by_quarter": "quarter of the document (0: the first)",
}
WIDTH = 560
Source: TypeAlias = pd.DataFrame | alt.NamedData


class View(NamedTuple):
    """A part of the page: which lines it has, and what draws them.

    Attributes:
      name: of the section.
      title: its heading.
      text: what a reader must know.
      draw: makes the chart; None for a table.
      by: the columns that make a group.
      peers: see :func:`experiments.report.intervals.summarize`.
      values: measures; "" is the one that the reader chose, a curve gives a line per entry.
      panels: of ``shifted`` and ``clean`` rows, or ``all``.
      each: a column with a chart per value.
      methods: only these methods, where any of them passes the filter.
    """

    name: str
    title: str
    text: str
    draw: Callable[[Source, Data, str], alt.TopLevelMixin] | None
    by: tuple[str, ...] = ("method",)
    peers: tuple[str, ...] = ()
    values: tuple[str, ...] = ("",)
    panels: tuple[str, ...] = ("shifted",)
    each: str = ""
    methods: tuple[str, ...] = ()


def views(data: Data) -> list[View]:
    """Returns the parts of a page, as far as the rows have what they show."""
    results, frame = data.results, data.frame
    held = [name for name in results.measures if frame[name].notna().any()]
    auxiliary = [n for n in held if n.endswith(("_before", "_after", " change", " fell"))]
    turned = ("turned_right", "turned_wrong")
    per_domain = (("method", "domain"), ("domain",), ("",), ("all",))
    named = {data.reference}
    for pick in table.headline(table.chosen(data)).values():
        named |= {pick.method} | ({pick.best["method"]} if pick.best is not None else set())
    text = (
        "The lowest of a column is marked, in hindsight and unless it is at chance. The mean is "
        "over the shifted domains alone."
    )
    parts = [
        View("means", "Mean over the shifted domains", "", draw_means),
        View("table", "Per domain", text, None, *per_domain),
    ]
    text = "The methods that the first sentences name."
    domains = View("domains", "Compared per domain", text, draw_domains, *per_domain)
    parts.append(domains._replace(methods=tuple(m for m in data.methods if m in named)))
    if frame.loc[frame["domain"] != CLEAN, "severity"].nunique() > 1:
        draw = functools.partial(draw_lines, along="severity")
        parts.append(
            View("severity", "Per severity", "", draw, ("method", "severity"), ("severity",))
        )
    if len(axes(data)) > 1:
        text = (
            "Mean of the rows that pass the filter, and their number. A dagger marks a mean over "
            "fewer domains, severities or seeds than others of the same method have."
        )
        heat = View("heat", "Two settings", text, draw_heat, ("method", "across", "down"))
        parts.append(heat._replace(peers=("method",), each="method"))
    for curve in results.curves:
        text = "Mean over the shifted domains. The axis does not start at zero."
        title = next((title for end, title in _ALONG.items() if curve.endswith(end)), "")
        draw = functools.partial(draw_lines, along="step", name=title or _STEPS)
        by = ("method", "step")
        parts.append(View(curve, title_of(curve).capitalize(), text, draw, by, by[1:], (curve,)))
    both = {"panels": ("shifted", "clean")}
    if auxiliary:
        text = "Each method on its own scale; below, the same on clean instances."
        view = View("auxiliary", "Before and after the inner steps", text, None)
        parts.append(view._replace(values=tuple(auxiliary), **both))
    if {*turned} <= {*held}:
        text = (
            "Shares of all examples that source gets wrong and the method right, and the reverse. "
            "Their difference is the gain. Per domain: choose the measure above."
        )
        view = View("turned", "Turned right, turned wrong", text, draw_turned)
        parts.append(view._replace(values=turned, **both))
    if "cost" in held or "milliseconds" in held:
        text = (
            "A point is a method with one choice of settings. A backward pass counts as two "
            "forward passes; milliseconds are as measured on the device named below."
        )
        parts.append(View("cost", "Cost", text, draw_cost, ("method", "setting")))
    every = View("measures", "Every measure", "Means over the shifted domains.", None)
    return [*parts, every._replace(values=tuple(name for name in held if name not in auxiliary))]


def axes(data: Data) -> list[str]:
    """Settings that vary within a method, so that they can be the axes of a map."""
    names = [*(["num_steps"] if "num_steps" in data.frame else []), *data.results.settings]
    varied = data.frame.groupby("method")[names].nunique().max() if names else {}
    return [name for name in names if varied[name] > 1]


def figure(
    data: Data, name: str = "means", measure: str = "", *, role: str = "reported", **axes_of: str
) -> alt.TopLevelMixin:
    """Returns a chart of the page.

    Args:
      data: the rows.
      name: of a view: "means", "domains", "severity", "heat", "turned", "cost" or a curve.
      measure: the default is the one that chooses settings.
      role: the split role of the rows.
      **axes_of: ``price`` ("cost" or "milliseconds") of the chart "cost", ``across`` and ``down``
        (settings) of "heat"; their defaults are the first that there are.

    Raises:
      ValueError: the rows have no such chart; names those that they have.
    """
    known = {view.name: view for view in views(data) if view.draw is not None}
    if name not in known:
        raise ValueError(f"these rows have the charts {', '.join(known)}; got {name!r}.")
    view, measure = known[name], measure or data.results.primary
    across, down, *_ = [*axes(data), "", ""]
    price = "cost" if "cost" in data.results.measures else "milliseconds"
    names = {"price": price, "across": across, "down": down} | axes_of
    lines = lines_of(data, view, measure, role=role, names=names)
    if view.each:
        parts = {str(key): view.draw(part, data, "") for key, part in lines.groupby(view.each)}
        maps = [chart.properties(title=key) for key, chart in parts.items()]
        text = alt.concat(*maps, columns=3).to_json()
    else:
        text = view.draw(lines, data, title_of(view.values[0] or measure)).to_json()
    for word, chosen in names.items():
        text = text.replace(f"__{word}__", title_of(chosen))
    return alt.Chart.from_json(text)


def figures(data: Data) -> dict[str, alt.TopLevelMixin]:
    """Returns every chart that the rows have something for, by name, for files."""
    return {view.name: figure(data, view.name) for view in views(data) if view.draw is not None}


def lines_of(
    data: Data, view: View, measure: str, *, role: str, names: dict[str, str]
) -> pd.DataFrame:
    """Returns what a view draws, as ``linesOf`` of ``page.js`` does for the page."""
    rows = data.rows(role, shifted=view.panels[0] == "shifted")
    if view.methods:
        rows = rows[rows["method"].isin(view.methods)]
    if view.each:
        rows = rows.rename(columns={names["across"]: "across", names["down"]: "down"})
    parts = []
    for value in view.values:
        value, kept = value or measure, rows
        if value in data.results.curves:
            kept = rows.dropna(subset=[value]).explode(value)
            kept["step"], kept[value] = kept.groupby(level=0).cumcount(), kept[value].astype(float)
        held = data.replicates
        lines = intervals.summarize(kept, view.by, value, peers=view.peers, replicates=held)
        parts.append(shown(lines, value).assign(measure=value))
    lines = pd.concat(parts, ignore_index=True).assign(role=role, settings="")
    if view.name == "cost":
        prices = rows.groupby([*view.by])[names["price"]].mean().rename("price").reset_index()
        lines = lines.merge(prices, on=[*view.by])
    low, high = lines["mean"].min(), lines["mean"].max()
    return lines.assign(share=(lines["mean"] - low) / (high - low or 1))


def title_of(name: str) -> str:
    """Returns a measure's name with its unit."""
    text = _TITLES.get(name, name.replace("_", " "))
    share = is_share(name) or name == "worse" or name.endswith((" change", " fell"))
    return f"{text} (%)" if share else text


def scale_of(name: str) -> int:
    """Returns 100 for what is shown in percent, else 1."""
    return 100 if title_of(name).endswith("(%)") else 1


def is_difference(name: str) -> bool:
    """Whether a measure is a difference, of which zero says that none is seen."""
    return name == "gain" or name.endswith(" change")


def shown(lines: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Returns summary lines with ``low`` and ``high``, scaled as they are shown, and a remark."""
    factor = scale_of(measure)
    mean, half = factor * lines["mean"], factor * lines["half"].astype(float)
    basis = lines["basis"].replace("", intervals.NO_INTERVAL)
    remark = np.where(intervals.at_chance(lines), intervals.AT_CHANCE, "")
    if is_difference(measure):
        remark = np.where(intervals.unseen(lines), intervals.UNSEEN, remark)
    lines = lines.assign(mean=mean, half=half, low=mean - half, high=mean + half)
    return lines.assign(basis=basis, remark=remark)


def _color(source: Source, data: Data, *, legend: bool = True) -> alt.Color:
    colors = [PALETTE[i % len(PALETTE)] for i in range(len(data.methods))]
    scale = alt.Scale(domain=data.methods, range=colors)
    held = isinstance(source, pd.DataFrame)
    there = [m for m in data.methods if m in set(source["method"])] if held else ["__methods__"]
    shape = alt.Legend(orient="top", title=None, labelLimit=0, values=there) if legend else None
    return alt.Color("method:N", scale=scale, legend=shape)


def draw_means(source: Source, data: Data, title: str) -> alt.LayerChart:
    """A dot and an interval per method; the dashed line is the source's mean."""
    y = alt.Y("method:N", sort=data.methods, title=None)
    base = alt.Chart(source).encode(y=y)
    line = alt.Chart(source).transform_filter(alt.datum.method == data.reference)
    x = alt.X("mean:Q", title=title)
    color = _color(source, data, legend=False)
    text = base.mark_text(align="left", dx=9).encode(
        x=alt.X("edge:Q"), text=alt.Text("mean:Q", format=".3r")
    )
    return (
        line.mark_rule(strokeDash=[4, 3], opacity=0.6).encode(x="mean:Q")
        + base.mark_rule(size=2).encode(x="low:Q", x2="high:Q", color=color)
        + base.mark_point(filled=True, size=80, opacity=1).encode(
            x=x, color=color, tooltip=["method:N", *_INTERVAL]
        )
        + text.transform_calculate(edge="isValid(datum.high) ? datum.high : datum.mean")
    ).properties(width=WIDTH, height={"step": 26}, padding={"left": 5, "right": 40})


def draw_domains(source: Source, data: Data, title: str) -> alt.LayerChart:
    """A dot and an interval per domain, of the methods that the headline compares."""
    base = alt.Chart(source).encode(
        y=alt.Y("domain:N", sort=data.domains, title=None), color=_color(source, data)
    )
    tip = ["method:N", "domain:N", *_INTERVAL]
    return (
        base.mark_rule(size=2, opacity=0.5).encode(x="low:Q", x2="high:Q")
        + base.mark_point(filled=True, size=70, opacity=0.9).encode(
            x=alt.X("mean:Q", title=title), tooltip=tip
        )
    ).properties(width=WIDTH, height={"step": 24})


def draw_lines(
    source: Source, data: Data, title: str, *, along: str, name: str = ""
) -> alt.LayerChart:
    """A line and its intervals along the severities, the inner steps or positions."""
    x = alt.X(f"{along}:O", title=name or along, axis=alt.Axis(labelAngle=0))
    base = alt.Chart(source).encode(x=x, color=_color(source, data))
    y = alt.Y("mean:Q", title=title, scale=alt.Scale(zero=False))
    tip = ["method:N", x.shorthand, *_INTERVAL]
    return (
        base.mark_area(opacity=0.12).encode(y=alt.Y("low:Q"), y2="high:Q")
        + base.mark_line(point={"size": 50}).encode(y=y, tooltip=tip)
    ).properties(width=WIDTH, height=300)


def draw_turned(source: Source, data: Data, title: str) -> alt.LayerChart:
    """Shares of all examples turned right (to the right) and turned wrong (to the left)."""
    del title
    sign = "datum.measure == 'turned_wrong' ? -1 : 1"
    base = (
        alt.Chart(source)
        .transform_calculate(signed=f"({sign}) * datum.mean")
        .transform_calculate(from_=f"({sign}) * datum.low", to_=f"({sign}) * datum.high")
        .encode(y=alt.Y("method:N", sort=data.methods, title=None))
    )
    scale = alt.Scale(domain=["turned_right", "turned_wrong"], range=["#0b62c4", "#b4483a"])
    legend = alt.Legend(orient="top", title=None, labelLimit=0)
    color = alt.Color("measure:N", scale=scale, legend=legend)
    x = alt.X("signed:Q", title="wrong ← % → right")
    tip = ["method:N", "measure:N", *_INTERVAL]
    return (
        base.mark_bar(height=12, opacity=0.85).encode(x=x, color=color, tooltip=tip)
        + base.mark_rule().encode(x="from_:Q", x2="to_:Q")
    ).properties(width=WIDTH, height={"step": 26})


def draw_cost(source: Source, data: Data, title: str) -> alt.LayerChart:
    """A measure against what a prediction costs; a point per method and choice of settings."""
    base = alt.Chart(source).transform_filter("datum.price > 0")
    x = alt.X("price:Q", scale=alt.Scale(type="log"), title="__price__")
    zero = alt.Scale(zero=False)
    tip = ["method:N", "settings:N", alt.Tooltip("price:Q", format=",.4~g"), *_INTERVAL]
    encoded = base.encode(x=x, color=_color(source, data))
    return (
        encoded.mark_rule(opacity=0.4).encode(y=alt.Y("low:Q"), y2="high:Q")
        + encoded.mark_point(filled=True, size=60, opacity=0.8).encode(
            y=alt.Y("mean:Q", title=title, scale=zero), tooltip=tip
        )
    ).properties(width=WIDTH, height=340)


def draw_heat(source: Source, data: Data, title: str) -> alt.LayerChart:
    """Means over two settings; framed: the lowest of validation rows."""
    del data, title
    # Only validation rows may choose, and a mean over fewer domains is no lower one.
    ranked = (
        alt.Chart(source)
        .transform_calculate(full="datum.partial ? null : datum.mean")
        .transform_joinaggregate(lowest="min(full)")
    )
    best = "datum.role === 'validation' && datum.full !== null && datum.full === datum.lowest"
    base = ranked.encode(
        x=alt.X("across:O", title="__across__", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("down:O", title="__down__"),
    )
    scale = alt.Scale(scheme="blues", domain=[0, 1])
    color = alt.Color("share:Q", scale=scale, legend=None)
    tip = ["method:N", "across:O", "down:O", *_INTERVAL, "rows:Q", "seeds:Q"]
    ink = alt.condition("datum.share > 0.55", alt.value("white"), alt.value("#1c2024"))
    text = base.transform_calculate(
        figure="format(datum.mean, ',.3r') + (datum.partial ? '†' : '')",
        count="'n ' + datum.rows",
    )
    return (
        base.mark_rect(strokeWidth=2).encode(
            color=color,
            stroke=alt.condition(best, alt.value("#c2571a"), alt.value("transparent")),
            tooltip=tip,
        )
        + text.mark_text(dy=-5).encode(text="figure:N", color=ink)
        + text.mark_text(dy=8, fontSize=9).encode(text="count:N", color=ink)
    ).properties(width=WIDTH, height={"step": 36})
