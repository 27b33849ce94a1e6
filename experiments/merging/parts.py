"""Work folders that are to be joined: what is read, agreed in, and not replaced."""

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments import journal, launch, provenance, result_rows
from experiments.merging import ranges


class Part(NamedTuple):
    """A work folder with rows.

    Attributes:
      folder: where it is.
      rows: its rows, at least one, all finished.
      record: how they were made, with ``config``.
    """

    folder: pathlib.Path
    rows: list[dict[str, Any]]
    record: dict[str, Any]

    @property
    def test(self) -> str:
        """The split string of its examples, ``test`` where the config has none."""
        return str(self.record["config"]["data"].get("test", "test"))


def read(folder: pathlib.Path, record: str, book: str, *others: str) -> Part:
    """The part in a folder, of its record, its file of rows, and more JSON files it must have.

    Raises:
      UserError: files are missing or damaged, or there are failed rows.
    """
    for name in (book, record, *others):
        if not (folder / name).exists():
            raise launch.UserError(
                f"a part is a work folder in which experiments.adapt has finished; {folder} has no "
                f"{name}. With parts of experiments.diagnose say --program=diagnose."
            )
    rows, _ = journal.read(folder / book, result_rows.identity)
    failed = [row for row in rows if row.get("status") != "ok"]
    if failed or not rows:
        raise launch.UserError(
            f"{folder} has {len(failed)} failed of {len(rows)} rows; run that part again first."
        )
    try:
        held = json.loads((folder / record).read_text(encoding="utf-8"))
        dict(held["config"]["data"]), list(held["config"]["seeds"])
    except (ValueError, KeyError, TypeError) as error:
        raise launch.UserError(
            f"{folder / record} is damaged ({error!r}); run that part again."
        ) from error
    return Part(folder, rows, held)


def require_equal(values: Iterable[tuple[str, Any, Part]], rule: str) -> None:
    """Requires that all values of a name are equal.

    Args:
      values: name, value and the part that has it.
      rule: what parts must agree in, and what to do where they do not.

    Raises:
      UserError: the rule, and the first difference; of dicts, their first key that differs.
    """
    first: dict[str, tuple[Any, Part]] = {}
    for name, value, part in values:
        before, origin = first.setdefault(name, (value, part))
        if value == before:
            continue
        if isinstance(value, dict):
            key = next(key for key in before | value if before.get(key) != value.get(key))
            name, before, value = f"{name}.{key}", before.get(key), value.get(key)
        raise launch.UserError(
            f"{rule}; {name} is {before!r} in {origin.folder} and {value!r} in {part.folder}."
        )


def label(row: Mapping[str, Any]) -> str:
    """The row in words."""
    names = ("method", "stream", "domain", "severity", "seed", "split_role")
    return ", ".join(f"{name} {row[name]}" for name in names if row.get(name) is not None)


def origins(part: Part) -> list[dict[str, Any]]:
    """Where the rows of a part were made: of a merged one, its parts and what was added to it."""
    nested: list[dict[str, Any]] = part.record.get("parts", [])
    runs = {"runs": part.record["runs"]} if "runs" in part.record else {}
    own = {"folder": str(part.folder), "test": part.test, "rows": len(part.rows)}
    own |= provenance.origin(part.record) | runs
    return nested if nested and not runs else [*nested, own]


def require_more(
    workdir: pathlib.Path, record: str, book: str, test: str, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Refuses to replace rows that were measured.

    Args:
      workdir: the work folder to write.
      record: the name of its record.
      book: the name of its file of rows.
      test: the split string of the new rows.
      rows: the new ones.

    Raises:
      UserError: rows that are no merge's, or that the new ones lack.
    """
    if not (workdir / book).exists():
        return
    old = read(workdir, record, book) if (workdir / record).exists() else None
    if old is None or "parts" not in old.record:
        raise launch.UserError(
            f"{workdir} has rows that experiments.merge did not make; choose another --workdir."
        )
    lost = {*map(result_rows.identity, old.rows)} - {*map(result_rows.identity, rows)}
    if lost or ranges.joined([old.test, test])[0] != ranges.joined([test])[0]:
        raise launch.UserError(
            f"{workdir} is a table of {old.test} with {len(old.rows)} rows, {len(lost)} of which "
            f"these parts lack; they are of {test}. Name all parts, or choose another --workdir."
        )
