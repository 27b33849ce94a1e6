"""The parts of a page: what its script averages, and which chart or table shows it."""

from collections.abc import Callable
from typing import NamedTuple

import altair as alt

from experiments.report import charts, table
from experiments.report.charts import Source
from experiments.report.table import CLEAN, Data


class View(NamedTuple):
    """A part of the page: what its script averages, and what draws the result.

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
    by: tuple[str, ...]
    peers: tuple[str, ...] = ()
    values: tuple[str, ...] = ("",)
    panels: tuple[str, ...] = ("shifted",)
    each: str = ""
    methods: tuple[str, ...] = ()


def views(data: Data) -> list[View]:
    """Returns the parts of a page, as far as the rows have what they show."""
    results, frame = data.results, data.frame
    held = [name for name in results.measures if frame[name].notna().any()]
    domain_text = "The lowest of a column is marked. The mean is over the shifted domains alone."
    parts = [
        View("means", "Mean over the shifted domains", "", charts.draw_means, ("method",)),
        View(
            "table",
            "Per domain",
            domain_text,
            None,
            ("method", "domain"),
            ("domain",),
            panels=("all",),
        ),
        View(
            "domains",
            "Compared per domain",
            "The methods that the first sentences name.",
            charts.draw_domains,
            ("method", "domain"),
            ("domain",),
            panels=("all",),
            methods=table.compared(data),
        ),
    ]
    if frame.loc[frame["domain"] != CLEAN, "severity"].nunique() > 1:
        by: tuple[str, ...] = ("method", "severity")
        parts.append(
            View("severity", "Per severity", "", charts.draw_severities, by, ("severity",))
        )
    if len(axes(data)) > 1:
        text = (
            "Mean of the rows that pass the filter, and their number. A dagger marks a mean over "
            "fewer domains, severities or seeds than others of the same method have."
        )
        by = ("method", "across", "down")
        parts.append(
            View("heat", "Two settings", text, charts.draw_heat, by, ("method",), each="method")
        )
    for curve in results.curves:
        text = "Mean over the shifted domains. The axis does not start at zero."
        by = ("method", "step")
        parts.append(
            View(
                curve,
                charts.title_of(curve).capitalize(),
                text,
                charts.draw_steps,
                by,
                ("step",),
                (curve,),
            )
        )
    return parts + _measure_views(held)


def _measure_views(held: list[str]) -> list[View]:
    """The parts that show several measures of each method."""
    parts = []
    auxiliary = [n for n in held if n.endswith(("_before", "_after", " change", " fell"))]
    if auxiliary:
        text = "Each method on its own scale; below, the same on clean instances."
        parts.append(
            View(
                "auxiliary",
                "Before and after the inner steps",
                text,
                None,
                ("method",),
                (),
                tuple(auxiliary),
                ("shifted", "clean"),
            )
        )
    if {"turned_right", "turned_wrong"} <= {*held}:
        text = (
            "Shares of all examples that source gets wrong and the method right, and the reverse. "
            "Their difference is the gain. Per domain: choose the measure above."
        )
        parts.append(
            View(
                "turned",
                "Turned right, turned wrong",
                text,
                charts.draw_turned,
                ("method",),
                (),
                ("turned_right", "turned_wrong"),
                ("shifted", "clean"),
            )
        )
    if "cost" in held or "milliseconds" in held:
        text = (
            "A point is a method with one choice of settings. A backward pass counts as two "
            "forward passes; milliseconds are as measured on the device named below."
        )
        parts.append(View("cost", "Cost", text, charts.draw_cost, ("method", "setting")))
    plain = tuple(name for name in held if name not in auxiliary)
    parts.append(
        View(
            "measures",
            "Every measure",
            "Means over the shifted domains.",
            None,
            ("method",),
            (),
            plain,
        )
    )
    return parts


def axes(data: Data) -> list[str]:
    """Settings that vary within a method, so that they can be the axes of a map."""
    names = [*(["num_steps"] if "num_steps" in data.frame else []), *data.results.settings]
    varied = data.frame.groupby("method")[names].nunique().max() if names else {}
    return [name for name in names if varied[name] > 1]


def figures(data: Data) -> dict[str, alt.TopLevelMixin]:
    """Returns every chart that the rows have something for, by name, for files."""
    names = {view.name for view in views(data)}
    found: dict[str, alt.TopLevelMixin] = {"means": charts.means(data)}
    found["domains"] = charts.domains(data)
    if "severity" in names:
        found["severity"] = charts.severities(data)
    if data.results.curves:
        found["steps"] = charts.steps(data)
    if "turned" in names:
        found["turned"] = charts.turned(data)
    if "cost" in names:
        found["cost"] = charts.cost(data)
    if "heat" in names:
        found["heat"] = charts.heat(data, *axes(data)[:2])
    return found
