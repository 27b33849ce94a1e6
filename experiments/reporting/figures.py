"""The charts of the page. One method, the best per-sample one, has the accent color."""

import math

from experiments.reporting import summary
from experiments.reporting.svg import CHAR, Canvas, log_ticks, spread, ticks
from experiments.reporting.tables import CLEAN, Grid, Stat, short

_SHAPES = ("circle", "square", "diamond", "triangle")
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 2")


def _percent(stat: Stat) -> str:
    text = f"{100 * stat.mean:.2f} %"
    return text if stat.stderr is None else f"{text} ± {100 * stat.stderr:.2f}"


def _margin(labels: list[str]) -> float:
    return 16 + CHAR * max((len(label) for label in labels), default=0)


def _y_axis(canvas: Canvas, values: list[float], left: float, right: float, where) -> None:
    for value in values:
        canvas.line(left, where(value), right, where(value), "grid")
        canvas.text(left - 8, where(value) + 4, f"{value:g}", "end", "tick")


def means(grid: Grid, head: summary.Headline) -> str:
    """Mean error over the corruptions, one dot per method, with its standard error."""
    stats = {m: s for m in grid.methods if (s := grid.mean(m)) is not None}
    if not stats:
        return ""
    left, right, row = _margin(list(stats)), 84, 26
    width, top = 640, 14
    bottom = top + row * len(stats)
    high = max(100 * (s.mean + (s.stderr or 0)) for s in stats.values())
    marks = ticks(0, high)
    canvas = Canvas(width, bottom + 44)

    def at(value: float) -> float:
        return left + value / marks[-1] * (width - left - right)

    for value in marks:
        canvas.line(at(value), top, at(value), bottom, "grid")
        canvas.text(at(value), bottom + 18, f"{value:g}", "middle", "tick")
    canvas.text(
        (at(0) + at(marks[-1])) / 2, bottom + 38, "mean error over the corruptions (%)", "middle"
    )
    if head.source_mean is not None:
        x = at(100 * head.source_mean.mean)
        canvas.line(x, top, x, bottom, "reference")
    for place, (method, stat) in enumerate(stats.items()):
        y, x = top + row * (place + 0.5), at(100 * stat.mean)
        best = method == head.best
        canvas.text(left - 10, y + 4, method, "end", "strong" if best else "")
        if stat.stderr is not None:
            reach = 100 * stat.stderr
            canvas.line(
                at(max(0.0, 100 * stat.mean - reach)),
                y,
                at(100 * stat.mean + reach),
                y,
                "bar best" if best else "bar",
            )
        kind = "best" if best else ("hollow" if grid.baseline(method) else "other")
        canvas.mark(x, y, kind, tip=f"{method}: {_percent(stat)}")
        dagger = "†" if stat.partial else ""
        canvas.text(
            width - 4, y + 4, f"{100 * stat.mean:.1f} %{dagger}", "end", "strong" if best else ""
        )
    return canvas.render("Mean error over the corruptions, per method")


def per_domain(grid: Grid, head: summary.Headline) -> str:
    """Error per domain: source, test-time augmentation and the best per-sample method."""
    names = {
        name: kind
        for name, kind in (
            (head.source, ("hollow", "circle")),
            (head.augmented, ("other", "tick")),
            (head.best, ("best", "circle")),
        )
        if name
    }
    cells = {(m, d): grid.cell(m, d) for m in names for d in grid.domains}
    known = [100 * stat.mean for stat in cells.values() if stat is not None]
    if not known:
        return ""
    left, top, step = 52.0, 34, 70
    width, bottom = left + step * len(grid.domains) + 8, 270
    width = max(width, left + sum(30 + CHAR * len(name) for name in names) + 8)
    marks = ticks(0, max(known))
    canvas = Canvas(width, bottom + 30)

    def at(value: float) -> float:
        return bottom - value / marks[-1] * (bottom - top)

    _y_axis(canvas, marks, left, width - 8, at)
    canvas.text(14, (top + bottom) / 2, "error (%)", "middle", turn=-90)
    x = left + 6.0
    for name, (kind, shape) in names.items():
        canvas.mark(x, 12, kind, shape)
        canvas.text(x + 11, 16, name, kind="strong" if name == head.best else "")
        x += 34 + CHAR * len(name)
    for place, domain in enumerate(grid.domains):
        x = left + step * (place + 0.5)
        canvas.text(x, bottom + 20, short(domain), "middle", "tick")
        first = cells.get((head.source or "", domain))
        last = cells.get((head.best or "", domain))
        if first is not None and last is not None:
            worse = last.mean > first.mean + 1e-12
            canvas.line(
                x, at(100 * first.mean), x, at(100 * last.mean), "link worse" if worse else "link"
            )
        for name, (kind, shape) in names.items():
            stat = cells[name, domain]
            if stat is not None:
                tip = f"{name}, {domain}: {_percent(stat)}"
                canvas.mark(x, at(100 * stat.mean), kind, shape, tip)
    return canvas.render("Error per domain of source, augmentation and the best method")


def steps(grid: Grid, head: summary.Headline) -> str:
    """Mean error over the corruptions after each inner step, one line per method."""
    lines = {m: points for m in grid.methods if len(points := summary.curve(grid, m)) > 1}
    if not lines:
        return ""
    left, right, top, bottom = 52, _margin(list(lines)) + 44, 14, 290
    width = 640 + right
    longest = max(len(points) for points in lines.values()) - 1
    values = [100 * stat.mean for points in lines.values() for stat in points]
    marks = ticks(min(values), max(values))
    canvas = Canvas(width, bottom + 46)

    def at_y(value: float) -> float:
        return bottom - (value - marks[0]) / (marks[-1] - marks[0]) * (bottom - top)

    def at_x(step: float) -> float:
        return left + step / longest * (width - left - right)

    _y_axis(canvas, marks, left, width - right, at_y)
    for step in sorted({round(value) for value in ticks(0, longest, min(longest, 10))}):
        if step <= longest:
            canvas.line(at_x(step), bottom, at_x(step), bottom + 4, "axis")
            canvas.text(at_x(step), bottom + 18, str(step), "middle", "tick")
    canvas.text(
        (left + width - right) / 2, bottom + 38, "inner steps (0: before the first)", "middle"
    )
    canvas.text(14, (top + bottom) / 2, "mean error (%)", "middle", turn=-90)
    ends = [at_y(100 * points[-1].mean) for points in lines.values()]
    labels = spread(ends, 16, top + 4, bottom - 2)
    # The accent line is drawn last, on top.
    order = sorted(range(len(lines)), key=lambda i: list(lines)[i] == head.best)
    for i in order:
        method, points = list(lines.items())[i]
        best = method == head.best
        kind = "best" if best else "other"
        shape = _SHAPES[i % len(_SHAPES)]
        places = [(at_x(k), at_y(100 * stat.mean)) for k, stat in enumerate(points)]
        canvas.path(places, f"curve {kind}", "" if best else _DASHES[i % len(_DASHES)])
        for (x, y), (k, stat) in zip(places, enumerate(points), strict=True):
            if stat.stderr is not None and k:
                reach = 100 * stat.stderr
                low, high = at_y(100 * stat.mean - reach), at_y(100 * stat.mean + reach)
                canvas.line(x, min(low, bottom), x, max(high, top), f"bar thin {kind}")
            if k in (0, len(points) - 1) or len(points) <= 24:
                canvas.mark(x, y, kind, shape, f"{method}, step {k}: {_percent(stat)}")
        x_end, y_end = places[-1]
        canvas.line(x_end + 6, y_end, width - right + 12, labels[i] - 4, "leader")
        text = f"{method}  {100 * points[-1].mean:.1f}"
        canvas.text(width - right + 16, labels[i], text, kind="strong" if best else "")
    return canvas.render("Mean error after each inner step, per method")


def turned(grid: Grid, head: summary.Headline) -> str:
    """Shares of predictions turned wrong (left) and right (right), corruptions and clean."""
    panels = []
    for title, stat_of in (
        ("mean over the corruptions", lambda m, get: grid.mean(m, get)),
        ("clean", lambda m, get: grid.cell(m, CLEAN, get)),
    ):
        found = {}
        for method in grid.methods:
            gained = stat_of(method, lambda row: row.turned_right)
            lost = stat_of(method, lambda row: row.turned_wrong)
            if gained is not None and lost is not None:
                found[method] = (100 * gained.mean, 100 * lost.mean)
        panels.append((title, found))
    methods = [m for m in grid.methods if any(m in found for _, found in panels)]
    reach = max((max(pair) for _, found in panels for pair in found.values()), default=0.0)
    if not methods or reach <= 0:
        return ""
    left, row, top, panel, space = _margin(methods), 26, 32, 380, 28
    bottom, width = top + row * len(methods), left + 2 * panel + space + 8
    canvas = Canvas(width, bottom + 44)
    marks = ticks(0, reach, 3)
    # Room beside the longest bar for its figure.
    scale = (panel / 2 - 38) / marks[-1]
    for number, (title, found) in enumerate(panels):
        middle = left + number * (panel + space) + panel / 2
        canvas.text(middle, 14, title, "middle", "strong")
        for value in marks:
            for sign in (-1, 1) if value else (1,):
                x = middle + sign * value * scale
                canvas.line(x, top, x, bottom, "grid" if value else "axis")
                canvas.text(x, bottom + 18, f"{value:g}", "middle", "tick")
        canvas.text(middle - 10, bottom + 38, "← turned wrong (%)", "end")
        canvas.text(middle + 10, bottom + 38, "turned right (%) →")
        for place, method in enumerate(methods):
            if method not in found:
                continue
            right, wrong = found[method]
            y, best = top + row * place + 6, method == head.best
            kind = "fill best" if best else "fill"
            tip = f"{method}, {title}: {right:.2f} % turned right, {wrong:.2f} % turned wrong"
            canvas.rect(middle, y, right * scale, row - 12, kind, tip)
            canvas.rect(middle - wrong * scale, y, wrong * scale, row - 12, "fill worse", tip)
            canvas.text(middle + right * scale + 5, y + 11, f"{right:.1f}", kind="tick")
            canvas.text(middle - wrong * scale - 5, y + 11, f"{wrong:.1f}", "end", "tick")
    for place, method in enumerate(methods):
        canvas.text(
            left - 10,
            top + row * place + 17,
            method,
            "end",
            "strong" if method == head.best else "",
        )
    return canvas.render("Share of predictions turned right and turned wrong, per method")


def cost(grid: Grid, head: summary.Headline) -> str:
    """Mean error against the cost of one prediction in plain forwards, on a log axis."""
    found = {
        m: (c.equivalents, 100 * stat.mean, stat)
        for m, c in summary.costs(grid).items()
        if c.equivalents and (stat := grid.mean(m)) is not None
    }
    if len(found) < 2:
        return ""
    left, right, top, bottom = 52, _margin(list(found)), 14, 280
    across = log_ticks(min(v[0] for v in found.values()), max(v[0] for v in found.values()))
    if len(across) < 2:
        across = [across[0], across[0] * 10]
    marks = ticks(min(v[1] for v in found.values()), max(v[1] for v in found.values()))
    width = 640 + right
    canvas = Canvas(width, bottom + 46)

    def at_y(value: float) -> float:
        return bottom - (value - marks[0]) / (marks[-1] - marks[0]) * (bottom - top)

    def at_x(value: float) -> float:
        share = math.log(value / across[0]) / math.log(across[-1] / across[0])
        return left + 10 + share * (width - left - right - 10)

    _y_axis(canvas, marks, left, width - right, at_y)
    for value in across:
        canvas.line(at_x(value), bottom, at_x(value), bottom + 4, "axis")
        canvas.text(at_x(value), bottom + 18, f"{value:g}", "middle", "tick")
    canvas.text(
        (left + width - right) / 2,
        bottom + 38,
        "cost of one prediction (plain forwards; a backward counts as two)",
        "middle",
    )
    canvas.text(14, (top + bottom) / 2, "mean error (%)", "middle", turn=-90)
    names = list(found)
    ys = [at_y(found[name][1]) for name in names]
    labels = _labels_beside([at_x(found[name][0]) for name in names], ys, names)
    for name, label_y in zip(names, labels, strict=True):
        price, error, stat = found[name]
        best = name == head.best
        kind = "best" if best else ("hollow" if grid.baseline(name) else "other")
        tip = f"{name}: {price:g} forwards, {_percent(stat)}"
        canvas.mark(at_x(price), at_y(error), kind, tip=tip)
        canvas.text(at_x(price) + 9, label_y + 4, name, kind="strong" if best else "")
    return canvas.render("Mean error against the cost of one prediction, per method")


def _labels_beside(xs: list[float], ys: list[float], names: list[str]) -> list[float]:
    # Only labels whose texts would overlap sideways push one another up or down.
    placed = list(ys)
    for i in sorted(range(len(ys)), key=lambda k: ys[k]):
        near = [
            j
            for j in range(len(ys))
            if j != i
            and ys[j] <= ys[i]
            and xs[j] < xs[i] + 9 + CHAR * len(names[i])
            and xs[i] < xs[j] + 9 + CHAR * len(names[j])
            and (ys[j], j) < (ys[i], i)
        ]
        placed[i] = max([ys[i], *(placed[j] + 15 for j in near)])
    return placed
