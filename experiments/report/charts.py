"""Altair charts of a run or of a sweep: one function per kind, the same in pages and notebooks.

Every function draws lines of :func:`experiments.report.intervals.summarize`, in which shares are
in percent, from a frame or, in a page, from what the page's script hands over as ``rows``.
"""

from typing import TypeAlias

import altair as alt
import pandas as pd

from experiments.report import intervals, table
from experiments.report.read import is_share
from experiments.report.table import Data

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
}
_INTERVAL = [
    alt.Tooltip("mean:Q", format=",.4~g"),
    alt.Tooltip("low:Q", format=",.4~g", title="95 % from"),
    alt.Tooltip("high:Q", format=",.4~g", title="to"),
    alt.Tooltip("basis:N", title="interval over"),
]
WIDTH = 560
Source: TypeAlias = pd.DataFrame | alt.NamedData


def title_of(name: str) -> str:
    """Returns a measure's name with its unit."""
    text = _TITLES.get(name, name.replace("_", " "))
    share = is_share(name) or name == "worse" or name.endswith((" change", " fell"))
    return f"{text} (%)" if share else text


def scale_of(name: str) -> int:
    """Returns 100 for what is shown in percent, else 1."""
    return 100 if title_of(name).endswith("(%)") else 1


def shown(lines: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Returns summary lines with ``low`` and ``high``, scaled as they are shown."""
    factor = scale_of(measure)
    mean, half = factor * lines["mean"], factor * lines["half"].astype(float)
    basis = lines["basis"].replace("", "no interval: one seed, no instances")
    return lines.assign(mean=mean, half=half, low=mean - half, high=mean + half, basis=basis)


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


def _lines(source: Source, data: Data, x: alt.X, title: str) -> alt.LayerChart:
    base = alt.Chart(source).encode(x=x, color=_color(source, data))
    y = alt.Y("mean:Q", title=title, scale=alt.Scale(zero=False))
    tip = ["method:N", x.shorthand, *_INTERVAL]
    return (
        base.mark_area(opacity=0.12).encode(y=alt.Y("low:Q"), y2="high:Q")
        + base.mark_line(point={"size": 50}).encode(y=y, tooltip=tip)
    ).properties(width=WIDTH, height=300)


def draw_steps(source: Source, data: Data, title: str) -> alt.LayerChart:
    """A measure after every inner step; step 0 is before the first."""
    x = alt.X("step:O", title="inner steps (0: before the first)", axis=alt.Axis(labelAngle=0))
    return _lines(source, data, x, title)


def draw_severities(source: Source, data: Data, title: str) -> alt.LayerChart:
    """A measure at every severity."""
    return _lines(source, data, alt.X("severity:O", axis=alt.Axis(labelAngle=0)), title)


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


def means(data: Data, measure: str = "", *, role: str = "reported") -> alt.LayerChart:
    """Returns the chart of :func:`experiments.report.table.means`."""
    measure = measure or data.results.primary
    lines = shown(table.means(data, measure, role=role), measure)
    return draw_means(lines, data, title_of(measure))


def domains(data: Data, measure: str = "", *, role: str = "reported") -> alt.LayerChart:
    """Returns the chart of the compared methods per domain."""
    measure = measure or data.results.primary
    lines = shown(table.by_domain(data, measure, role=role), measure)
    names = table.compared(data)
    return draw_domains(lines[lines["method"].isin(names)], data, title_of(measure))


def steps(data: Data, curve: str = "", *, role: str = "reported") -> alt.LayerChart:
    """Returns the chart of a measure after every inner step."""
    curve = curve or data.results.curves[0]
    rows = data.rows(role, shifted=True).dropna(subset=[curve])
    parts = rows[["method", *intervals.PLACE, curve]].explode(curve)
    parts["step"] = parts.groupby(level=0).cumcount()
    parts[curve] = parts[curve].astype(float)
    lines = intervals.summarize(parts, ["method", "step"], curve, peers=["step"])
    return draw_steps(shown(lines, curve), data, title_of(curve))


def severities(data: Data, measure: str = "", *, role: str = "reported") -> alt.LayerChart:
    """Returns the chart of a measure at every severity."""
    measure, rows = measure or data.results.primary, data.rows(role, shifted=True)
    by = ["method", "severity"]
    lines = intervals.summarize(rows, by, measure, peers=["severity"], replicates=data.replicates)
    return draw_severities(shown(lines, measure), data, title_of(measure))


def turned(data: Data, *, role: str = "reported") -> alt.LayerChart:
    """Returns the chart of the shares turned right and wrong."""
    parts = [
        shown(table.means(data, name, role=role), name).assign(measure=name)
        for name in ("turned_right", "turned_wrong")
    ]
    return draw_turned(pd.concat(parts, ignore_index=True), data, "")


def cost(
    data: Data, measure: str = "", price: str = "cost", *, role: str = "reported"
) -> alt.TopLevelMixin:
    """Returns the chart of a measure against ``price`` ("cost" or "milliseconds")."""
    measure, rows = measure or data.results.primary, data.rows(role, shifted=True)
    by = ["method", "setting"]
    lines = intervals.summarize(rows, by, measure, replicates=data.replicates)
    prices = rows.groupby(by)[price].mean().rename("price").reset_index()
    lines = shown(lines, measure).merge(prices, on=by).assign(settings="")
    chart = draw_cost(lines, data, title_of(measure))
    return _titled(chart, {"__price__": title_of(price)})


def heat(
    data: Data,
    across: str = "num_steps",
    down: str = "learning_rate",
    *,
    role: str = "reported",
) -> alt.TopLevelMixin:
    """Returns a map per method of the primary measure over two settings."""
    measure = data.results.primary
    rows = data.rows(role, shifted=True).rename(columns={across: "across", down: "down"})
    by = ["method", "across", "down"]
    lines = shown(intervals.summarize(rows, by, measure, peers=["method"]), measure)
    low, high = lines["mean"].min(), lines["mean"].max()
    lines["role"] = role
    lines["share"] = (lines["mean"] - low) / (high - low or 1)
    maps = [
        draw_heat(part, data, "").properties(title=str(name), width=60 * part["across"].nunique())
        for name, part in lines.groupby("method")
    ]
    return _titled(alt.concat(*maps, columns=3), {"__across__": across, "__down__": down})


def _titled(chart: alt.TopLevelMixin, names: dict[str, str]) -> alt.TopLevelMixin:
    text = chart.to_json()
    for name, title in names.items():
        text = text.replace(name, title)
    return alt.Chart.from_json(text)
