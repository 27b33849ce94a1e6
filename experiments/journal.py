"""Rows in a file of JSON lines: appended whole, never lost and never doubled.

``results.jsonl`` has one per trial; the diagnostics have files of their own.
"""

import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ml_collections

from experiments import launch

KEY = ("method", "dataset", "domain", "severity", "seed", "split_role")


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What identifies a row of :data:`KEY`."""
    return tuple(row[name] for name in KEY)


def made_with(config: ml_collections.ConfigDict, names: Sequence[str]) -> dict[str, Any]:
    """Values of a config by dotted key, as JSON has them: what a row says it was made with.

    A key that the config leaves out has its default, so that saying it changes no row.
    """
    values = launch.DEFAULTS | launch.flat(config)
    return json.loads(json.dumps({name: values[name] for name in names}))


def read(
    path: pathlib.Path, key: Callable[[dict[str, Any]], tuple[Any, ...]] = key_of
) -> tuple[list[dict[str, Any]], bool]:
    """The rows of a file, which is left as it is; whether its last line is whole.

    Args:
      path: of the file.
      key: what identifies a row.

    Raises:
      UserError: a line that is no row.
    """
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    found = []
    for number, line in enumerate(whole.decode("utf-8", "replace").splitlines(), start=1):
        try:
            row = json.loads(line)
            hash(key(row))
        except (ValueError, KeyError, TypeError) as error:
            raise launch.UserError(
                f"{path}, line {number}: not a result row ({error!r}). Remove the line, "
                "or use another --workdir."
            ) from error
        found.append(row)
    return found, len(whole) == len(data)


class Journal:
    """The rows of a work folder.

    Opening one drops a last line that a killed writer left unfinished, and the failed rows, so
    that these trials run again. The rows of a trial are one ``write``, flushed to the disk.

    Of several processes one alone opens the file; the others are given the rows that it had.
    ``identity`` is what identifies a row, where that is not :data:`KEY`.
    """

    def __init__(
        self,
        path: pathlib.Path,
        rows: Iterable[dict[str, Any]] | None = None,
        *,
        identity: Callable[[dict[str, Any]], tuple[Any, ...]] = key_of,
    ):
        self.path = path
        self._identity = identity
        self.failed: list[dict[str, Any]] = []
        self._rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        if rows is not None:
            self._rows = {identity(row): row for row in rows}
        elif path.exists():
            self._load()

    def _load(self) -> None:
        found, whole = read(self.path, self._identity)
        self._rows = {self._identity(row): row for row in found if row.get("status") == "ok"}
        if not whole or any(row.get("status") != "ok" for row in found):
            lines = [json.dumps(row) + "\n" for row in self._rows.values()]
            launch.write_atomically(self.path, "".join(lines))

    def get(self, **fields: Any) -> dict[str, Any] | None:
        """The finished row with these key fields, if there is one; other fields are ignored."""
        return self._rows.get(self._identity(fields))

    def rows(self) -> list[dict[str, Any]]:
        """All finished rows."""
        return list(self._rows.values())

    def add(self, *rows: dict[str, Any]) -> None:
        """Appends rows in one write; a second one of the same key is a programming error."""
        for row in rows:
            if (key := self._identity(row)) in self._rows:
                raise RuntimeError(f"the row {key} is already in {self.path}")
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        with launch.writing(self.path):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                end = os.fstat(descriptor).st_size
                try:
                    if os.write(descriptor, lines) != len(lines):
                        raise OSError(28, "No space left on device")
                    os.fsync(descriptor)
                except OSError:
                    os.ftruncate(descriptor, end)
                    raise
            finally:
                os.close(descriptor)
        for row in rows:
            if row["status"] == "ok":
                self._rows[self._identity(row)] = row
            else:
                self.failed.append(row)
