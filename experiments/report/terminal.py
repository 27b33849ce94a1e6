"""What the program prints: the first sentences, the table by domain, notes, failures."""

import textwrap

import pandas as pd

from experiments.report import charts, notes, page, table
from experiments.report.table import Data

_WIDTH = 120
_LISTED = 5


def render(data: Data) -> str:
    """Returns the lines, joined."""
    results = data.results
    parts = []
    if results.trials is not None:
        counts = ", ".join(f"{n:,} {name}" for name, n in results.trials.items() if n)
        parts.append(f"{sum(results.trials.values()):,} trials: {counts}; {len(data.frame):,} rows")
    parts.append(textwrap.fill(page.lead(data), _WIDTH))
    for role in ("reported", "validation"):
        if results.primary and len(data.rows(role)):
            name = charts.title_of(results.primary)
            chose = " (settings are chosen on these)" if role == "validation" else ""
            parts.append(f"{role} rows{chose}, {name}; * lowest of the column")
            parts.append(_sweep_table(data, role) if results.trials else error_table(data, role))
    parts += [
        textwrap.fill(f"note: {note}", _WIDTH) for note in [*results.notes, *notes.notes(data)]
    ]
    failed = table.failures(data)
    lines = [
        f"failed, {len(part):,} row{'s' if len(part) > 1 else ''}: {textwrap.shorten(why, 100)}"
        for why, part in failed[:_LISTED]
    ]
    if len(failed) > _LISTED:
        lines.append(f"and {len(failed) - _LISTED} more reasons")
    return "\n\n".join([*parts, *(["\n".join(lines)] if lines else [])])


def error_table(data: Data, role: str = "reported", *, width: int = _WIDTH) -> str:
    """Returns methods by domains as text, in blocks of columns where one is too wide."""
    by_domain, means = table.by_domain(data, role=role), table.means(data, role=role)
    lines = pd.concat([by_domain, means.assign(domain="mean")], ignore_index=True)
    factor = charts.scale_of(data.results.primary)
    columns = [["method", *(m for m in data.methods if m in set(lines["method"]))]]
    for domain in [*(d for d in data.domains if d in set(by_domain["domain"])), "mean"]:
        held = lines[lines["domain"] == domain]
        low = set(table.lowest(held)["method"])
        texts = {
            line["method"]: f"{factor * line['mean']:.{1 if factor > 1 else 3}f}"
            + ("+" if line["partial"] else "")
            + (f"±{factor * line['half']:.1f}" if domain == "mean" and line["half"] > 0 else "")
            + ("*" if line["method"] in low else "")
            for _, line in held.iterrows()
        }
        columns.append([domain, *(texts.get(method, "-") for method in columns[0][1:])])
    first = max(map(len, columns[0]))
    blocks: list[list[str]] = []
    for column in columns[1:]:
        wide = max(map(len, column))
        if not blocks or len(blocks[-1][0]) + 1 + wide > width:
            blocks.append([name.ljust(first) for name in columns[0]])
        blocks[-1] = [
            f"{line} {cell.rjust(wide)}" for line, cell in zip(blocks[-1], column, strict=True)
        ]
    return "\n\n".join("\n".join(block) for block in blocks)


def _sweep_table(data: Data, role: str) -> str:
    """Means over all settings of a sweep, and gains, with their intervals."""
    lines = table.means(data, role=role).set_index("method")
    gains = table.means(data, "gain", role=role).set_index("method")
    factor = charts.scale_of(data.results.primary)
    wide = max(6, *(len(name) for name in lines.index))
    text = [f"{'method':{wide}}  {'rows':>8}  {'all settings':>14}  {'gain':>14}"]
    for name, line in lines.iterrows():
        values = (
            [_shown(line, factor), _shown(gains.loc[name], factor, "+")]
            if (name in gains.index)
            else [_shown(line, factor), "-"]
        )
        text.append(f"{name:{wide}}  {line['rows']:8,}  {values[0]:>14}  {values[1]:>14}")
    return "\n".join(text)


def _shown(line: pd.Series, factor: int, sign: str = "") -> str:
    text = f"{factor * line['mean']:{sign}.1f}"
    return text if pd.isna(line["half"]) else f"{text} ± {factor * line['half']:.1f}"
