"""The parts of the page that hold numbers: each function gives HTML for one grid."""

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from experiments.reporting import summary
from experiments.reporting.rows import GROUPS, Row
from experiments.reporting.tables import CLEAN, Get, Grid, Stat, short

GAP = '<td class="gap">–</td>'
_GROUPS = {
    "per_sample": "per sample: every instance adapts its own copy",
    "batch": "batch: one copy adapts to a batch",
    "stream": "stream: one copy carries on from instance to instance",
}


def table(head: Sequence[str], body: Sequence[str], kind: str = "") -> str:
    """A scrolling table; ``head`` holds ``<th>`` cells, ``body`` whole ``<tr>`` rows."""
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{"".join(head)}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def heads(names: Sequence[str], left: Sequence[int] = (0,)) -> list[str]:
    """Plain column headings; those whose place is in ``left`` are left-aligned."""
    return [
        f'<th scope="col"{" class=left" if i in left else ""}>{escape(name)}</th>'
        for i, name in enumerate(names)
    ]


def figure(svg: str, caption: str) -> str:
    """A chart with its caption, or nothing when there was nothing to draw."""
    if not svg:
        return ""
    return (
        f'<figure><div class="scroll">{svg}</div><figcaption>{escape(caption)}</figcaption>'
        "</figure>"
    )


def _wide(grid: Grid) -> str:
    return "wide full" if len(grid.domains) > 8 else "wide"


def _row(method: str, best: str | None, cells: Sequence[str]) -> str:
    kind = ' class="best"' if method == best else ""
    return f'<tr{kind}><th scope="row">{escape(method)}</th>{"".join(cells)}</tr>'


def _grouped(grid: Grid, make: Callable[[str], str], columns: int) -> list[str]:
    """Rows of every method, with a heading where the scope changes."""
    body, seen = [], None
    for method in grid.methods:
        group = "no adaptation" if grid.baseline(method) else _GROUPS.get(grid.scope(method), "")
        if group != seen and group:
            body.append(f'<tr class="group"><td colspan="{columns}"><span>{group}</span></td></tr>')
        seen = group
        body.append(make(method))
    return body


def _value(stat: Stat | None, low: bool, failed: bool, kind: str = "") -> str:
    if stat is None:
        text = '<span class="worse" title="this run failed">failed</span>' if failed else "–"
        return f'<td class="gap {kind}">{text}</td>'
    dagger = "†" if stat.partial else ""
    spread = "" if stat.stderr is None else f"<small>±{100 * stat.stderr:.1f}</small>"
    seeds = f"{stat.seeds} of {stat.expected} seeds"
    return (
        f'<td class="{kind}{" low" if low else ""}" title="{100 * stat.mean:.3f} %, {seeds}">'
        f"{100 * stat.mean:.1f}{dagger}{spread}</td>"
    )


def _domain_heads(grid: Grid) -> list[str]:
    head = ['<th scope="col">method</th>']
    head += [
        f'<th scope="col" title="{escape(d, quote=True)}">{escape(short(d))}</th>'
        for d in grid.domains
    ]
    return [*head, '<th scope="col" class="sum" title="mean over the corruptions">mean</th>']


def errors(grid: Grid, best: str | None) -> str:
    """The error table (%): methods by domains, the mean last, the lowest of a column marked."""
    columns = {d: {m: grid.cell(m, d) for m in grid.methods} for d in grid.domains}
    means = {m: grid.mean(m) for m in grid.methods}
    low = {d: grid.lowest(column) for d, column in columns.items()}
    low_mean = grid.lowest(means)

    def make(method: str) -> str:
        cells = [
            _value(columns[d][method], method in low[d], grid.failed(method, d))
            for d in grid.domains
        ]
        cells.append(_value(means[method], method in low_mean, False, "sum"))
        return _row(method, best, cells)

    head = _domain_heads(grid)
    return table(head, _grouped(grid, make, len(head)), _wide(grid))


def differences(grid: Grid, source: str, best: str | None) -> str:
    """Error minus the source's, in percentage points, over the seeds both have."""

    def cell(ours: dict[int, float], theirs: dict[int, float], kind: str = "") -> str:
        both = ours.keys() & theirs.keys()
        if not both:
            return f'<td class="gap {kind}">–</td>'
        change = 100 * sum(ours[s] - theirs[s] for s in both) / len(both)
        tone = "" if abs(change) < 0.05 else (" worse" if change > 0 else " good")
        text = "0.0" if abs(change) < 0.05 else f"{change:+.1f}".replace("-", "−")
        return f'<td class="{kind}{tone}">{text}</td>'

    def make(method: str) -> str:
        cells = [cell(grid.per_seed(method, d), grid.per_seed(source, d)) for d in grid.domains]
        cells.append(cell(grid.mean_per_seed(method), grid.mean_per_seed(source), "sum"))
        return _row(method, best, cells)

    head = _domain_heads(grid)
    return table(head, _grouped(grid, make, len(head)), _wide(grid))


def severities(grid: Grid, best: str | None) -> str:
    """Mean error over the corruptions at each severity; empty for a single severity."""
    if len(grid.severities) < 2:
        return ""
    means = {s: {m: grid.at_severity(s).mean(m) for m in grid.methods} for s in grid.severities}
    low = {s: grid.lowest(column) for s, column in means.items()}
    body = [
        _row(m, best, [_value(means[s][m], m in low[s], False) for s in grid.severities])
        for m in grid.methods
    ]
    return table(heads(["method", *(f"severity {s:g}" for s in grid.severities)]), body)


def class_groups(grid: Grid, best: str | None) -> str:
    """Error per group of classes (%), over the corruptions and on clean; empty without groups."""
    places = (["corruptions"] if grid.corruptions else []) + (
        [CLEAN] if CLEAN in grid.domains else []
    )
    columns: list[dict[str, Stat | None]] = []
    for place in places:
        for group in GROUPS:

            def get(row: Row, name: str = f"error_{group}") -> float | None:
                return getattr(row, name)

            columns.append(
                {
                    m: grid.cell(m, CLEAN, get) if place == CLEAN else grid.mean(m, get)
                    for m in grid.methods
                }
            )
    if not any(stat for column in columns for stat in column.values()):
        return ""
    low = [grid.lowest(column) for column in columns]

    def make(method: str) -> str:
        cells = [
            _value(column[method], method in lowest, False)
            for column, lowest in zip(columns, low, strict=True)
        ]
        return _row(method, best, cells)

    head = heads(["method", *(f"{place}: {group}" for place in places for group in GROUPS)])
    return table(head, _grouped(grid, make, len(head)))


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _loss(value: float) -> str:
    # One number of decimals keeps a column aligned; a tiny loss would read as zero.
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2e}"


def _pair(
    grid: Grid, method: str, first: Get, second: Get, domain: str | None
) -> tuple[Stat, Stat] | None:
    stats = [
        grid.cell(method, domain, get) if domain else grid.mean(method, get)
        for get in (first, second)
    ]
    return (stats[0], stats[1]) if stats[0] is not None and stats[1] is not None else None


def _before(row: Row) -> float | None:
    return row.aux_loss_before


def _after(row: Row) -> float | None:
    return row.aux_loss_after


def _right(row: Row) -> float | None:
    return row.turned_right


def _wrong(row: Row) -> float | None:
    return row.turned_wrong


def aux_loss(grid: Grid, best: str | None) -> str:
    """Auxiliary loss before and after adapting, on clean and as mean over the corruptions."""
    body = []
    for method in grid.methods:
        if not any(row.aux_loss_before is not None for row in grid.of(method)):
            continue
        cells = []
        for domain in (None, CLEAN):
            pair = _pair(grid, method, _before, _after, domain)
            if pair is None:
                cells += [GAP] * 3
                continue
            before, after = pair[0].mean, pair[1].mean
            change = f"{100 * (after / before - 1):+.0f} %" if before > 0 else "–"
            cells += [
                f"<td>{_loss(before)}</td>",
                f"<td>{_loss(after)}</td>",
                f'<td class="muted">{change.replace("-", "−")}</td>',
            ]
        fell = known = 0
        for domain in grid.domains:
            pair = _pair(grid, method, _before, _after, domain)
            known += pair is not None
            fell += pair is not None and pair[1].mean < pair[0].mean
        cells.append(f"<td>{fell} of {known}</td>")
        body.append(_row(method, best, cells))
    if not body:
        return ""
    names = ["method", "before", "→ after", "change", "clean: before", "→ after", "change"]
    return table(heads([*names, "domains where it fell"]), body)


def turned(grid: Grid, best: str | None) -> str:
    """Shares turned right and turned wrong (% of all examples), per method and domain."""
    body = []
    for method in grid.methods:
        pairs = [_pair(grid, method, _right, _wrong, d) for d in (*grid.domains, None)]
        if not any(pairs):
            continue
        cells = []
        for place, pair in enumerate(pairs):
            kind = "sum" if place == len(pairs) - 1 else ""
            if pair is None:
                cells.append(f'<td class="gap {kind}">–</td>')
                continue
            right, wrong = (100 * stat.mean for stat in pair)
            cells.append(
                f'<td class="{kind}">+{right:.1f}<small class="worse">−{wrong:.1f}</small></td>'
            )
        body.append(_row(method, best, cells))
    return table(_domain_heads(grid), body, _wide(grid)) if body else ""


def cost(grid: Grid, best: str | None) -> str:
    """Passes, forward equivalents and measured speed of every method."""
    body = []
    for method, price in summary.costs(grid).items():
        values = (price.forwards, price.backwards, price.equivalents)
        cells = [GAP if v is None else f"<td>{v:,.4g}</td>" for v in values]
        speed = price.samples_per_second
        cells.append(GAP if speed is None else f"<td>{_number(speed)}</td>")
        cells.append(GAP if speed is None else f"<td>{_number(1000 / speed)}</td>")
        cells.append(GAP if price.slowdown is None else f"<td>{_number(price.slowdown)} ×</td>")
        body.append(_row(method, best, cells))
    names = ["method", "forwards", "backwards", "in plain forwards", "samples/s", "ms per sample"]
    return table(heads([*names, "time against source"]), body)


def as_run(grid: Grid, best: str | None) -> str:
    """How every method was run: scope, steps, prediction, reset, examples, seeds."""

    def values(method: str, get: Callable[[Row], Any]) -> str:
        seen = {get(row): None for row in grid.of(method) if row.ok and get(row) is not None}
        return ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in seen) or "–"

    body = []
    for method in grid.methods:
        rows = grid.of(method)
        seconds = sum(row.seconds or 0.0 for row in rows)
        cells = [
            f'<td class="left">{escape(values(method, lambda r: r.scope).replace("_", " "))}</td>',
            f"<td>{values(method, lambda r: r.num_steps)}</td>",
            f'<td class="left">{escape(values(method, lambda r: r.predict))}</td>',
            f'<td class="left">{escape(values(method, lambda r: r.reset))}</td>',
        ]
        for get in (lambda r: r.resets, lambda r: r.non_finite):
            found = [get(row) for row in rows if get(row) is not None]
            cells.append(f"<td>{sum(found):,.0f}</td>" if found else GAP)
        cells.append(f"<td>{values(method, lambda r: r.num_examples)}</td>")
        cells.append(f"<td>{len({row.seed for row in rows if row.ok})}</td>")
        cells.append(f"<td>{seconds:,.1f}</td>")
        body.append(_row(method, best, cells))
    names = ["method", "scope", "inner steps", "predicts", "reset", "resets fired", "non-finite"]
    return table(
        heads([*names, "examples per domain", "seeds", "seconds in all"], (0, 1, 3, 4)), body
    )


def failures(rows: Sequence[Row]) -> str:
    """Every failed row with its message; empty if none failed."""
    body = [
        f'<tr><th scope="row">{escape(row.method)}</th><td class="left">{escape(row.dataset)}</td>'
        f'<td class="left">{escape(row.domain)}</td><td>{row.severity:g}</td><td>{row.seed}</td>'
        f'<td class="left">{row.split_role}</td><td class="text">{escape(row.message)}</td></tr>'
        for row in rows
        if not row.ok
    ]
    names = ["method", "dataset", "domain", "severity", "seed", "split role", "message"]
    return table(heads(names, (0, 1, 2, 5, 6)), body) if body else ""
