"""What made the rows of :mod:`experiments.diagnose`, and the record and the page of a method."""

import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections

from experiments import journal, launch, provenance
from experiments.report import alignment

ROLES = {"test": "reported", "validation": "validation"}
_SPLITS = {role: split for split, role in ROLES.items()}


def made_with(config: ml_collections.ConfigDict, split: str) -> dict[str, Any]:
    """What of a config a row depends on beside its settings, its cell and the model's parameters.

    Args:
      config: see ``experiments/configs``.
      split: ``test`` or ``validation``.
    """
    views = [name for name in launch.flat(config) if name.startswith("views.")]
    images = ("data.name", f"data.{split}", "adapt.corruption_seed")
    return journal.made_with(config, (*images, "model.dtype", *views))


def differences(
    row: dict[str, Any], fields: dict[str, Any], config: ml_collections.ConfigDict
) -> list[provenance.Difference]:
    """In what a row was made otherwise than another one of its method.

    Rows of a method are in one record, under one config, and in one correlation. Of the other
    split, the number of images and the learning rates may differ; a seed is one model.

    Args:
      row: a row.
      fields: the other one, or what it is to have.
      config: what the other one is made with.
    """
    names = []
    if row["split_role"] == fields["split_role"]:
        names += ["dataset", "num_examples", "learning_rates"]
    if row["seed"] == fields["seed"]:
        names += ["checkpoint"]

    def shared(row: dict[str, Any]) -> dict[str, Any]:
        settings = {f"settings.{name}": value for name, value in row["settings"].items()}
        return settings | row["config"] | {name: row.get(name) for name in names}

    now = fields | {"config": made_with(config, _SPLITS[row["split_role"]])}
    return provenance.differences(shared(row), shared(now))


def require_same(
    book: journal.Journal, fields: dict[str, Any], config: ml_collections.ConfigDict
) -> None:
    """Refuses rows of the method that were made otherwise than those to come.

    Args:
      book: the rows.
      fields: of the rows to come, of one seed.
      config: what they are made with.

    Raises:
      UserError: naming each field that differs, its stored and its present value.
    """
    for row in book.rows():
        if row["method"] != fields["method"]:
            continue
        if "config" not in row:
            raise launch.UserError(
                f"{book.path} has rows that do not say what made them, of an older version. Use "
                "another --workdir, or remove the file."
            )
        provenance.require_same(differences(row, fields, config), book.path)


def write(
    workdir: pathlib.Path, origin: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Writes the record of one method and its page, each as a whole, and says what is in them.

    Args:
      workdir: their folder.
      origin: what the record says beside rows and correlation.
      rows: of one method, at least one.

    Returns:
      The record.
    """
    reported = [row for row in rows if row["split_role"] == "reported"] or rows
    r = alignment.correlation(reported)
    correlation = {"inner_product_and_gain": r, "sets": len(reported)}
    record = {**origin, "correlation": correlation, "rows": rows}
    launch.write_json(workdir / "diagnostics.json", record)
    page = alignment.render({**record, "rows": reported})
    launch.write_atomically(workdir / "diagnostics.html", page)
    shown = "undefined" if r is None else f"{r:.3f}"
    print(
        f"{len(rows)} rows of {rows[0]['method']} in {workdir / 'diagnostics.jsonl'}; inner "
        f"product and gain: r = {shown}"
    )
    return record
