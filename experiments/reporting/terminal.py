"""The same error table for a terminal: 120 columns, plain where colours would be noise."""

import textwrap
from collections.abc import Sequence

from experiments.reporting import summary
from experiments.reporting.page import lead, notes_of
from experiments.reporting.rows import Row
from experiments.reporting.tables import Grid, Stat, by_dataset, short

_WIDTH = 120


def _cell(stat: Stat | None, failed: bool, spread: bool) -> str:
    if stat is None:
        return "fail" if failed else "-"
    text = f"{100 * stat.mean:.1f}" + ("+" if stat.partial else "")
    return text + (f"±{100 * stat.stderr:.1f}" if spread and stat.stderr is not None else "")


def error_table(grid: Grid, *, color: bool = False, width: int = _WIDTH) -> str:
    """The error table (%) as text; in several blocks of columns if it is too wide for one.

    Args:
      grid: the rows of one dataset and role.
      color: bold for the lowest of a column; otherwise a ``*`` follows it.
      width: the number of characters of a line.

    Returns:
      The lines, joined. ``+`` after a number means that seeds are missing, ``fail`` a failed
      run, ``-`` no measurement. Where the standard errors do not fit, they follow in a line
      of their own.
    """
    means = {m: grid.mean(m) for m in grid.methods}
    for spread in (True, False):
        blocks = _blocks(_columns(grid, means, spread), ["method", *grid.methods], color, width)
        if len(blocks) == 1:
            break
    text = "\n\n".join("\n".join(block) for block in blocks)
    known = {m: s for m, s in means.items() if s is not None and s.stderr is not None}
    if not spread and known:
        listed = ", ".join(f"{m} {_cell(stat, False, True)}" for m, stat in known.items())
        text += "\n\n" + textwrap.fill(f"mean ± standard error over the seeds: {listed}", width)
    return text


def _columns(
    grid: Grid, means: dict[str, Stat | None], spread: bool
) -> list[list[tuple[str, bool]]]:
    """Heading and cells of every column, each with whether it is the lowest."""
    columns = []
    for domain in grid.domains:
        stats = {m: grid.cell(m, domain) for m in grid.methods}
        low = grid.lowest(stats)
        cells = [(_cell(stats[m], grid.failed(m, domain), False), m in low) for m in grid.methods]
        columns.append([(short(domain), False), *cells])
    low = grid.lowest(means)
    cells = [(_cell(means[m], False, spread), m in low) for m in grid.methods]
    columns.append([("mean", False), *cells])
    return columns


def _blocks(
    columns: list[list[tuple[str, bool]]], names: list[str], color: bool, width: int
) -> list[list[str]]:
    first = max(map(len, names))
    blocks: list[list[str]] = []
    used = width
    for cells in columns:
        texts = [text + ("*" if low and not color else "") for text, low in cells]
        wide = max(map(len, texts))
        if used + 1 + wide > width:
            blocks.append([name.ljust(first) for name in names])
            used = first
        used += 1 + wide
        for line, (text, (_, low)) in enumerate(zip(texts, cells, strict=True)):
            padded = text.rjust(wide)
            blocks[-1][line] += " " + (f"\x1b[1m{padded}\x1b[0m" if low and color else padded)
    return blocks


def render(rows: Sequence[Row], *, notes: Sequence[str] = (), color: bool = False) -> str:
    """Everything the program prints: headline, table, validation table, notes, failures."""
    parts: list[str] = []
    reported, validation = by_dataset(rows, "reported"), by_dataset(rows, "validation")
    for dataset, grid in reported.items():
        head = summary.headline(grid)
        parts.append(f"{dataset}: {lead(grid, head)}")
        if head.clean_more_wrong is not None:
            parts[-1] += (
                f" On clean: {100 * (head.clean_change or 0):+.1f} points "
                f"({head.clean_more_wrong:+.1f} images wrong per seed)."
            )
        mark = "bold" if color else "*"
        parts.append(
            f"Error (%), {mark} lowest of the column, mean over the corruptions without clean\n"
            + error_table(grid, color=color)
        )
        if found := notes_of(grid):
            parts.append("\n".join(f"note: {note}".replace("†", "+") for note in found))
    for dataset, grid in validation.items():
        parts.append(
            f"{dataset}, validation corruptions (chosen on these), error (%)\n"
            + error_table(grid, color=color)
        )
    parts.extend(f"note: {note}" for note in notes)
    failed = [
        f"failed: {row.method} on {row.domain}, severity {row.severity:g}, seed {row.seed}, "
        f"{row.split_role}: {row.message}"
        for row in rows
        if not row.ok
    ]
    if failed:
        parts.append("\n".join(failed))
    return "\n\n".join(parts)
