"""The records of several ``experiments.diagnose`` as one.

Rows stay as they are. Those of ranges of images make no row of all: its medians, choices and
numbers of classes cannot be had from theirs.
"""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from experiments import diagnose_record, launch, provenance, result_rows
from experiments.merging import parts as parts_lib
from experiments.merging.parts import Part

RECORD, BOOK = "diagnostics.json", "diagnostics.jsonl"


def read(folder: pathlib.Path) -> Part:
    """A part with the rows of its record's method.

    Raises:
      UserError: as :func:`parts.read`, or there are rows that the record lacks.
    """
    part = parts_lib.read(folder, RECORD, BOOK)
    rows = part.record.get("rows") or []
    method = rows[0]["method"] if rows else None
    if not rows or [row for row in part.rows if row["method"] == method] != rows:
        raise launch.UserError(
            f"{folder / RECORD} is damaged, or lacks rows of its method that {BOOK} has; run "
            "experiments.diagnose there again, to its end."
        )
    if any("config" not in row for row in rows):
        raise launch.UserError(
            f"{folder / BOOK} has rows that do not say what made them, of an older version; run "
            "that part again in a new folder."
        )
    return part._replace(rows=rows)


def joined(parts: Sequence[Part]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The config and the rows of all parts, in their order.

    Raises:
      UserError: the parts are not those of one record, or two have the same row.
    """
    parts_lib.require_equal(
        (fact for part in parts for fact in _fixed(part)),
        "parts of a record differ in corruptions, severities, split and seeds alone, and rows of "
        "two ranges of images cannot be joined",
    )
    found: dict[tuple[Any, ...], Part] = {}
    for part in parts:
        for row in part.rows:
            first = found.setdefault(result_rows.identity(row), part)
            if first is not part:
                raise launch.UserError(
                    f"a row is of one part, but {parts_lib.label(row)} is in {first.folder} and in "
                    f"{part.folder}; leave one of the two out."
                )
    rows = [row for part in parts for row in part.rows]
    seeds = sorted({row["seed"] for row in rows})
    return parts[0].record["config"] | {"seeds": seeds}, rows


def _fixed(part: Part) -> Iterator[tuple[str, Any, Part]]:
    """What all rows of a record share, of a seed and of a split."""
    for row in part.rows:
        yield "method", row["method"], part
        yield "settings", row["settings"], part
        yield f"checkpoint of seed {row['seed']}", row["checkpoint"], part
        for name in ("config", "dataset", "num_examples", "learning_rates"):
            yield f"{row['split_role']} {name}", row[name], part


def write(
    workdir: pathlib.Path, parts: Sequence[Part], rows: Sequence[dict[str, Any]], origin: Any
) -> None:
    """Writes a work folder: the record, which ``origin`` begins, its page, and the rows."""
    # The rows last: with the record alone the merge can be made again.
    diagnose_record.write(workdir, provenance.origin(parts[0].record) | origin, rows)
    launch.write_atomically(workdir / BOOK, "".join(json.dumps(row) + "\n" for row in rows))
