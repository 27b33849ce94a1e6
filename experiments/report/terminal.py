"""What the program prints: the first sentences, the table by domain, notes, failures."""

import textwrap

import pandas as pd

from experiments.report import charts, documents, intervals, notes, table
from experiments.report.table import Data

_WIDTH = 120
_LISTED = 5
_MARKS = (
    f"* lowest of the column; ~ {intervals.AT_CHANCE}, not seen to be better than a constant answer"
)


def render(data: Data) -> str:
    """Returns the lines, joined."""
    results, parts = data.results, []
    parts.append(textwrap.fill(" ".join(notes.lead(data)), _WIDTH))
    for role in ("reported", "validation"):
        if results.primary and len(data.rows(role)):
            name = charts.title_of(results.primary)
            chose = " (settings are chosen on these)" if role == "validation" else ""
            parts.append(f"{role} rows{chose}, {name}; {_MARKS}")
            parts.append(sweep_table(data, role) if results.trials else error_table(data, role))
    if (lines := documents.lines(data)) is not None:
        parts.append(lines.to_string(na_rep="-"))
    said = [*results.notes, *notes.notes(data)]
    parts += [textwrap.fill(f"note: {note}", _WIDTH) for note in said]
    failed = table.failures(data)
    lines = [
        f"failed, {len(part):,} row{'s' if len(part) > 1 else ''}: {textwrap.shorten(why, 100)}"
        for why, part in failed[:_LISTED]
    ]
    if len(failed) > _LISTED:
        lines.append(f"and {len(failed) - _LISTED} more reasons")
    return "\n\n".join([*parts, *(["\n".join(lines)] if lines else [])])


def error_table(data: Data, role: str = "reported") -> str:
    """Returns methods by domains as text, in blocks of columns where one is too wide."""
    means = table.means(data, role=role).assign(domain="mean")
    factor = charts.scale_of(data.results.primary)
    columns = {}
    for domain, lines in [*table.by_domain(data, role=role).groupby("domain"), ("mean", means)]:
        low = {*table.marked(lines)["method"]} if data.ranks else set()
        lines = lines.assign(chance=intervals.at_chance(lines))
        columns[domain] = {
            line["method"]: f"{factor * line['mean']:.{1 if factor > 1 else 3}f}"
            + ("+" if line["partial"] else "")
            + (
                f"±{factor * line['half']:.{1 if factor > 1 else 3}f}"
                if domain == "mean" and line["half"] > 0
                else ""
            )
            + ("*" if line["method"] in low else "")
            + ("~" if line["chance"] else "")
            for _, line in lines.iterrows()
        }
    frame = pd.DataFrame(columns).reindex([m for m in data.methods if m in {*means["method"]}])
    frame = frame[[name for name in (*data.domains, "mean") if name in columns]]
    text = frame.to_string(na_rep="-", line_width=_WIDTH)
    return "\n".join(line.rstrip(" \\") for line in text.splitlines())


def sweep_table(data: Data, role: str) -> str:
    """Returns means over all settings of a sweep, and gains, with their intervals."""
    factor = charts.scale_of(data.results.primary)

    def shown(lines: pd.DataFrame, sign: str, factor: int = factor) -> pd.Series:
        halves = [f" ± {x:.1f}" if x >= 0 else "" for x in factor * lines["half"].astype(float)]
        return (factor * lines["mean"]).map(f"{{:{sign}.1f}}".format) + halves

    lines = table.means(data, role=role).set_index("method")
    columns = {"rows": lines["rows"].map("{:,}".format), "all settings": shown(lines, "")}
    gains = table.means(data, "gain", role=role).set_index("method")
    seen = intervals.unseen(gains).map({True: f" ({intervals.UNSEEN})", False: ""})
    columns["gain"] = (shown(gains, "+", charts.scale_of("gain")) + seen).reindex(lines.index)
    return pd.DataFrame(columns).rename_axis(None).to_string(na_rep="-")
