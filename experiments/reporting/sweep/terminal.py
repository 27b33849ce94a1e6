"""What a sweep's report prints: counts, a line per method, failures by message."""

import collections
import re
import statistics
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments.reporting.sweep.columns import Columns, derived, method_order, plain
from experiments.reporting.sweep.source import Sweep
from experiments.reporting.tables import Stat, over_seeds

_LISTED = 5
_WIDTH = 110


class MethodStats(NamedTuple):
    """One method over all settings of a sweep; error and gain are fractions."""

    method: str
    rows: int
    error: Stat | None
    gain: Stat | None


def method_stats(columns: Columns, gain: Sequence[Any], role: str) -> list[MethodStats]:
    """Means over each seed's rows, then over the seeds, of the rows of one split role."""
    errors: dict[str, dict[int, list[float]]] = {}
    gained: dict[str, dict[int, list[float]]] = {}
    rows = zip(
        columns["method"],
        columns["split_role"],
        columns["seed"],
        columns["error"],
        gain,
        strict=True,
    )
    for method, of, seed, error, more in rows:
        if method is None or of != role or error is None:
            continue
        errors.setdefault(method, {}).setdefault(seed, []).append(error)
        if more is not None:
            gained.setdefault(method, {}).setdefault(seed, []).append(more)
    seeds = len({seed for found in errors.values() for seed in found})

    def stat(found: dict[int, list[float]]) -> Stat | None:
        return over_seeds(map(statistics.fmean, found.values()), seeds)

    return [
        MethodStats(
            method,
            sum(map(len, errors[method].values())),
            stat(errors[method]),
            stat(gained.get(method, {})),
        )
        for method in method_order(columns)
        if method in errors
    ]


def _shown(stat: Stat | None, sign: str = "") -> str:
    if stat is None:
        return "-"
    text = f"{100 * stat.mean:{sign}.1f}"
    return text if stat.stderr is None else f"{text} ± {100 * stat.stderr:.1f}"


def messages(columns: Columns) -> list[tuple[str, int]]:
    """Messages of failed rows, the first of those that differ in numbers alone, and how many."""
    counts: collections.Counter[str] = collections.Counter()
    first: dict[str, str] = {}
    for status, message in zip(columns["status"], columns["message"], strict=True):
        if status != "ok":
            text = message or "no message recorded"
            form = re.sub(r"\d+", "#", text)
            first.setdefault(form, text)
            counts[form] += 1
    return [(first[form], count) for form, count in counts.most_common()]


def render(sweep: Sweep) -> str:
    """The lines, joined."""
    columns = plain(sweep.table)
    gain = derived(columns)["gain"]
    counts = ", ".join(f"{n:,} {name}" for name, n in sweep.counts.items() if n or name == "done")
    parts = [f"{sweep.trials:,} trials: {counts}; {sweep.table.num_rows:,} rows"]
    for role in ("reported", "validation"):
        found = method_stats(columns, gain, role)
        if found:
            width = max(6, *(len(stats.method) for stats in found))
            lines = [f"{'method':{width}}  {'rows':>8}  {'error (%)':>13}  {'gain (points)':>14}"]
            lines += [
                f"{s.method:{width}}  {s.rows:8,}  {_shown(s.error):>13}  {_shown(s.gain, '+'):>14}"
                for s in found
            ]
            title = f"{role} rows, mean over all settings of the sweep, ± over the seeds"
            parts.append("\n".join([title, *lines]))
    parts += [f"note: {note}" for note in sweep.notes]
    failed = messages(columns)
    lines = [
        f"failed, {count:,} row{'s' if count > 1 else ''}: {textwrap.shorten(text, _WIDTH)}"
        for text, count in failed[:_LISTED]
    ]
    if len(failed) > _LISTED:
        lines.append(f"and {len(failed) - _LISTED} more messages")
    return "\n\n".join([*parts, *(["\n".join(lines)] if lines else [])])
