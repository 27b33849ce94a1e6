"""One self-contained HTML page and a terminal table from the rows of a run or of a sweep.

Usage::

    python -m experiments.report --workdir=runs/demo
    python -m experiments.report runs/sweep

reads ``results.jsonl`` (and ``selection.json`` and ``run.json``, if they are there) and writes
``report.html`` beside it; of a sweep, finished or not, it reads ``results.parquet`` or the rows in
the folders of its trials. It computes nothing with a model and needs no plotting package.
"""

import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from absl import app, flags

from experiments.reporting import page, terminal
from experiments.reporting.rows import ReportError, Row, read_rows, read_side_file
from experiments.reporting.sweep import (
    page as sweep_page,
    source as sweep_source,
    terminal as sweep_terminal,
)
from experiments.sweeping import collect

_FAILED = 2


class Report(NamedTuple):
    """What a report was made of.

    Attributes:
      path: the page that was written.
      rows: every row read, failed ones included.
      notes: what reading the files brought up.
    """

    path: pathlib.Path
    rows: list[Row]
    notes: list[str]


def write(workdir: str | os.PathLike[str]) -> Report:
    """Writes ``report.html`` into a run's folder.

    Args:
      workdir: the folder that holds ``results.jsonl``.

    Returns:
      The :class:`Report`.

    Raises:
      ReportError: the results are missing, empty, malformed or doubled, or the page cannot be
        written.
    """
    folder = pathlib.Path(workdir)
    rows, notes = read_rows(folder / "results.jsonl")
    run, run_notes = read_side_file(folder / "run.json")
    selection, selection_notes = read_side_file(folder / "selection.json")
    notes += run_notes + selection_notes
    text = page.render(rows, notes=notes, run=run, selection=selection, name=str(folder.resolve()))
    return Report(_put(folder / "report.html", text), rows, notes)


def _put(target: pathlib.Path, text: str) -> pathlib.Path:
    # A reader never sees half a page: the old one stays until the new one is complete.
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, target)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise ReportError(f"{target}: cannot be written: {error.strerror}.") from error
    return target


def write_sweep(workdir: str | os.PathLike[str]) -> tuple[pathlib.Path, str]:
    """Writes ``report.html`` into a sweep's folder.

    Args:
      workdir: the folder of a sweep, which may be at work.

    Returns:
      The page's path, and the text the program prints.

    Raises:
      ReportError: a damaged file, no row yet, or the page cannot be written.
    """
    folder = pathlib.Path(workdir)
    sweep = sweep_source.read(folder)
    path = _put(folder / "report.html", sweep_page.render(sweep, name=str(folder.resolve())))
    return path, f"{sweep_terminal.render(sweep)}\n\nwrote {path}"


def export(workdir: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Writes a run as one JSON file to be kept: where it came from, what was chosen, its rows.

    Args:
      workdir: the folder that holds ``results.jsonl``.
      target: the file, ``{"command", "device", ..., "selection", "rows": [...]}``.

    Raises:
      ReportError: the results are missing or malformed, or the file cannot be written.
    """
    folder = pathlib.Path(workdir)
    read_rows(folder / "results.jsonl")
    text = (folder / "results.jsonl").read_text(encoding="utf-8")
    # A line that a killed writer left unfinished is not a row.
    lines = [line for line in text[: text.rfind("\n") + 1].splitlines() if line.strip()]
    run, _ = read_side_file(folder / "run.json")
    selection, _ = read_side_file(folder / "selection.json")
    record = {**(run or {}), "selection": selection, "rows": [json.loads(line) for line in lines]}
    try:
        pathlib.Path(target).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{target}: cannot be written: {error.strerror}.") from error


def show(report: Report, *, color: bool = False) -> str:
    """The text the program prints for a report."""
    text = terminal.render(report.rows, notes=report.notes, color=color)
    return f"{text}\n\nwrote {report.path}"


def _print(text: str) -> None:
    # A terminal without Unicode gets "+-" rather than a traceback.
    encoding = sys.stdout.encoding or "ascii"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.replace("±", "+-").encode(encoding, "replace").decode(encoding)
    print(text)


def run(workdir: str | os.PathLike[str], export_to: str | None = None) -> int:
    """Writes the page and prints the table.

    Args:
      workdir: the folder that holds ``results.jsonl``, or that of a sweep.
      export_to: also write the run as one JSON file.

    Returns:
      The exit status: 0, or 2 when no report can be made (the reason is on stderr).
    """
    try:
        if sweep_source.is_sweep(pathlib.Path(workdir)):
            if export_to is not None:
                raise ReportError(
                    f"--export keeps a run as one file; the rows of the sweep {workdir} are one "
                    f"already, {collect.TABLE}."
                )
            _print(write_sweep(workdir)[1])
            return 0
        report = write(workdir)
        if export_to is not None:
            export(workdir, export_to)
    except ReportError as error:
        print(f"report: {error}", file=sys.stderr)
        return _FAILED
    _print(show(report, color=sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
    return 0


def main(argv: Sequence[str]) -> int:
    """The program; the folder comes from ``--workdir`` or from the only argument."""
    given = [*([flags.FLAGS.workdir] if flags.FLAGS.workdir else []), *argv[1:]]
    if len(given) != 1:
        raise app.UsageError(
            "give exactly one results folder, as --workdir=DIR or as the only argument; "
            f"got {', '.join(given) or 'none'}"
        )
    return run(given[0], flags.FLAGS.export)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the program's flags; not at import, as other programs have a ``workdir`` too."""
    flags.DEFINE_string(
        "workdir",
        None,
        "The folder of a run (results.jsonl) or of a sweep; report.html is written there.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "export", None, "Also write the run as one JSON file, to be kept.", flag_values=values
    )


if __name__ == "__main__":
    define_flags()
    app.run(main)
