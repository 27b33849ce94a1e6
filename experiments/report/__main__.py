"""Writes one self-contained HTML page from the rows of a run or of a sweep, and prints a table.

Usage::

    python -m experiments.report --workdir=runs/demo
    python -m experiments.report runs/sweep --figures=figures

reads ``results.jsonl`` (and ``selection.json``, ``run.json``, ``instances/`` and ``examples.npz``,
if they are there) and writes ``report.html`` beside it; of a sweep, finished or not, it reads
``results.parquet`` or the rows in the folders of its trials; of a kept ``.json`` file of rows it
writes ``FILE.html``.
"""

import os
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from experiments import journal, launch
from experiments.report import charts, page, read, table, terminal
from experiments.report.read import ReportError

_FAILED = 2


def write(workdir: str | os.PathLike[str]) -> tuple[pathlib.Path, table.Data]:
    """Writes ``report.html`` into the folder of a run or of a sweep; returns it and its data.

    Raises:
      ReportError: the results are missing, empty, malformed or doubled.
      UserError: the page cannot be written.
    """
    folder = pathlib.Path(workdir)
    data = table.prepare(read.results(folder))
    target = folder.with_suffix(".html") if folder.is_file() else folder / "report.html"
    launch.write_atomically(target, page.render(data, name=folder.resolve().name))
    return target, data


def export(workdir: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Writes a run as one JSON file to be kept: where it came from, what was chosen, its rows.

    Args:
      workdir: the folder that holds ``results.jsonl``.
      target: the file, ``{"command", "device", ..., "selection", "rows": [...]}``.

    Raises:
      ReportError: the folder is no run's.
      UserError: the file cannot be written.
    """
    folder = pathlib.Path(workdir)
    if not journal.files(folder / "results.jsonl"):
        raise ReportError(
            "--export keeps a run as one file; the rows of a sweep are one already, "
            f"results.parquet; {folder} has no results.jsonl."
        )
    rows, _ = read.json_lines(folder / "results.jsonl")
    run, _ = read.side_file(folder / "run.json")
    selection, _ = read.side_file(folder / "selection.json")
    launch.write_json(target, {**run, "selection": selection, "rows": rows})


def save_figures(data: table.Data, folder: str | os.PathLike[str]) -> list[pathlib.Path]:
    """Writes every chart as ``NAME.png`` and ``NAME.pdf``; returns their paths."""
    target = launch.open_workdir(str(folder))
    written = []
    for name, chart in charts.figures(data).items():
        for kind in ("png", "pdf"):
            written.append(target / f"{name}.{kind}")
            with launch.replacing(written[-1]) as draft:
                chart.save(draft, format=kind, scale_factor=2 if kind == "png" else 1)
    return written


def run(
    workdir: str | os.PathLike[str],
    export_to: str | None = None,
    figures_to: str | None = None,
) -> int:
    """Writes the page and prints the table.

    Args:
      workdir: the folder of a run or of a sweep.
      export_to: also write the run as one JSON file.
      figures_to: also write the charts as PNG and PDF into this folder.

    Returns:
      The exit status: 0, or 2 when no report can be made (the reason is on stderr).
    """
    try:
        if export_to is not None:
            export(workdir, export_to)
        path, data = write(workdir)
        written = [path, *(save_figures(data, figures_to) if figures_to else [])]
    except (ReportError, launch.UserError, OSError) as error:
        print(f"error: {launch.sentence(error)}", file=sys.stderr)
        return _FAILED
    text = "\n\n".join([terminal.render(data), "\n".join(f"wrote {path}" for path in written)])
    # A terminal without Unicode gets "+-" rather than a traceback.
    encoding = sys.stdout.encoding or "ascii"
    if text.encode(encoding, "replace").decode(encoding) != text:
        text = text.replace("±", "+-").encode(encoding, "replace").decode(encoding)
    print(text)
    return 0


def main(argv: Sequence[str]) -> int:
    """Runs the program; the folder comes from ``--workdir`` or from the only argument."""
    values = flags.FLAGS
    given = [*([values.workdir] if values.workdir else []), *argv[1:]]
    if len(given) != 1:
        raise launch.UserError(
            "give exactly one results folder, as --workdir=DIR or as the only argument; got "
            f"{', '.join(given) or 'none'}."
        )
    return run(given[0], values.export, values.figures)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the program's flags; not at import, as other programs have a ``workdir`` too."""
    texts = {
        "workdir": "The folder of a run or of a sweep; report.html is written there.",
        "export": "Also write the run as one JSON file, to be kept.",
        "figures": "Also write the charts as PNG and PDF into this folder.",
    }
    for name, text in texts.items():
        flags.DEFINE_string(name, None, text, flag_values=values)


if __name__ == "__main__":
    define_flags()
    launch.run(main, arguments=True)
