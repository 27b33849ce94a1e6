"""Gradient alignment against gain: their correlation, and the scatter plot as one page."""

import base64
import statistics
from collections.abc import Sequence
from html import escape
from typing import Any

from experiments.reporting import sections
from experiments.reporting.style import CSS
from experiments.reporting.svg import Canvas, ticks

PUBLISHED = (
    "Sun et al. (2020) report a correlation of r = 0.93 over the 75 sets of 15 corruptions at 5 "
    "severities of CIFAR-10-C."
)
# Light to strong.
_SHAPES = {1: "circle", 2: "square", 3: "diamond", 4: "triangle", 5: "circle"}


def correlation(rows: Sequence[dict[str, Any]]) -> float | None:
    """Pearson's r between mean inner product and gain, a point per row.

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


def _points(rows: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Inner product and gain, the latter in points of error, where both are known."""
    pairs = [(row["inner_product"], row["gain"]) for row in rows]
    return [(x, 100 * y) for x, y in pairs if x is not None and y is not None]


def noise_share(rows: Sequence[dict[str, Any]]) -> float | None:
    """Share of the variance of the gains, over sets, that few images per set account for.

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


def picture(rows: Sequence[dict[str, Any]]) -> str:
    """:func:`scatter` as an ``<img>`` that holds its own styles, for pages with other ones."""
    drawing = scatter(rows).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    start = drawing.index(">") + 1
    drawing = f"{drawing[:start]}<style>{CSS}</style>{drawing[start:]}"
    coded = base64.b64encode(drawing.encode()).decode()
    alt = "Gain of test-time training against gradient alignment, a mark per set of images"
    return f'<img alt="{alt}" src="data:image/svg+xml;base64,{coded}">'


def scatter(rows: Sequence[dict[str, Any]]) -> str:
    """An ``<svg>``: a mark per (corruption, severity, seed), a line of least squares, r."""
    points = _points(rows)
    if not points:
        return ""
    left, right, top, bottom, width = 56, 120, 24, 340, 720
    xs = ticks(min(0.0, *(x for x, _ in points)), max(0.0, *(x for x, _ in points)))
    ys = ticks(min(0.0, *(y for _, y in points)), max(0.0, *(y for _, y in points)))
    canvas = Canvas(width, bottom + 46)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - xs[0]) / (xs[-1] - xs[0]) * (width - left - right),
            bottom - (y - ys[0]) / (ys[-1] - ys[0]) * (bottom - top),
        )

    for y in ys:
        canvas.line(*at(xs[0], y), *at(xs[-1], y), "axis" if y == 0 else "grid")
        canvas.text(left - 8, at(0, y)[1] + 4, f"{y:g}", "end", "tick")
    for x in xs:
        canvas.line(*at(x, ys[0]), *at(x, ys[-1]), "axis" if x == 0 else "grid")
        canvas.text(at(x, 0)[0], bottom + 18, f"{x:g}", "middle", "tick")
    label = "mean inner product of the main and the auxiliary gradient"
    canvas.text((left + width - right) / 2, bottom + 38, label, "middle")
    canvas.text(14, (top + bottom) / 2, "gain: source minus TTT error (points)", "middle", turn=-90)
    r = correlation(rows)
    if r is not None:
        fit = statistics.linear_regression(*zip(*points, strict=True))
        ends = [min(x for x, _ in points), max(x for x, _ in points)]
        places = [at(x, fit.intercept + fit.slope * x) for x in ends]
        canvas.line(*places[0], *places[1], "reference")
        canvas.text(left + 4, top - 10, f"r = {r:.2f}, {len(points)} sets", kind="strong")
    for row in rows:
        if row["inner_product"] is None or row["gain"] is None:
            continue
        x, y = at(row["inner_product"], 100 * row["gain"])
        tip = (
            f"{row['domain']}, severity {row['severity']}, seed {row['seed']}: inner product "
            f"{row['inner_product']:.4g}, gain {100 * row['gain']:.2f} points"
        )
        canvas.mark(x, y, *_mark(row["severity"]), tip)
    for i, severity in enumerate(sorted({row["severity"] for row in rows})):
        y = top + 8 + 20 * i
        canvas.mark(width - right + 24, y, *_mark(severity))
        canvas.text(width - right + 36, y + 4, f"severity {severity}")
    return canvas.render("Gain of test-time training against gradient alignment")


def _mark(severity: int) -> tuple[str, str]:
    """CSS class and shape."""
    return "best" if severity == 5 else "other", _SHAPES.get(severity, "tick")


def _table(rows: Sequence[dict[str, Any]]) -> str:
    columns = {
        "inner product": ("inner_product", 1, 4),
        "cosine": ("cosine", 1, 3),
        "aligned (%)": ("aligned_share", 100, 1),
        "source error (%)": ("source_error", 100, 2),
        "TTT error (%)": ("ttt_error", 100, 2),
        "gain (points)": ("gain", 100, 2),
        "turned wrong (%)": ("turned_wrong", 100, 2),
        "label-free error (%)": ("label_free_error", 100, 2),
        "oracle error (%)": ("oracle_error", 100, 2),
    }
    body = []
    for row in rows:
        cells = [
            f"<td>{'–' if row[name] is None else f'{scale * row[name]:.{digits}f}'}</td>"
            for name, scale, digits in columns.values()
        ]
        where = f"{escape(row['domain'])} {row['severity']}, seed {row['seed']}"
        body.append(f'<tr><th scope="row">{where}</th>{"".join(cells)}</tr>')
    return sections.table(sections.heads(["set", *columns]), body, "full")


def markdown(record: dict[str, Any]) -> str:
    """What a page shows of a record, in MyST: correlation, plot, means per severity."""
    rows, r = record["rows"], correlation(record["rows"])
    found = "undefined" if r is None else f"{r:.2f}"
    share = noise_share(rows)
    noise = (
        ""
        if share is None
        else f"Sampling noise is {100 * share:.0f} % of the variance of these gains, which by "
        f"itself keeps r below about {max(0.0, 1 - share) ** 0.5:.2f}. "
    )
    lines = [
        f"Over {len(rows)} sets of {rows[0]['dataset']}, {rows[0]['num_examples']} images each, "
        "the mean inner product of the main and the auxiliary gradient (shared encoder parameters "
        f"that adapt) and the gain of `{rows[0]['method']}` correlate with r = {found}. "
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
        "| severity | inner product | cosine | aligned (%) | source error (%) | gain (points) |",
        "|---|---|---|---|---|---|",
    ]
    columns = (
        ("inner_product", 1, 4),
        ("cosine", 1, 3),
        ("aligned_share", 100, 1),
        ("source_error", 100, 2),
        ("gain", 100, 2),
    )
    for severity in sorted({row["severity"] for row in rows}):
        here = [row for row in rows if row["severity"] == severity]
        cells = [
            f"{scale * statistics.mean(row[name] for row in here):.{digits}f}"
            for name, scale, digits in columns
        ]
        lines.append(f"| {severity} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def render(record: dict[str, Any]) -> str:
    """The page of a record of :mod:`experiments.diagnose`; it loads nothing from outside."""
    rows, r = record["rows"], correlation(record["rows"])
    found = "too few sets for a correlation" if r is None else f"r = {r:.2f} over {len(rows)} sets"
    caption = (
        "Each mark is one set of images. Inner product over the shared encoder parameters that "
        f"adapt, mean per image; dashed: least squares. Here {found}. {PUBLISHED}"
    )
    title = "Gradient alignment against gain"
    facts = {
        "command": record["command"],
        "device": f"{record['device_count']} x {record['device']}",
        "commit": record["commit"],
        "versions": ", ".join(f"{name} {value}" for name, value in record["versions"].items()),
    }
    listed = "".join(f"<dt>{k}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items())
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{CSS}</style></head><body><main><h1>{title}</h1>"
        '<p class="note">Alignment, errors and the oracle columns use labels: they evaluate and '
        "choose nothing. The oracle picks its learning rate and number of steps on the images it "
        "is scored on, a bound and not a result.</p>"
        f"{sections.figure(scatter(rows), caption)}{_table(rows)}"
        f'<dl class="facts">{listed}</dl></main></body></html>\n'
    )
