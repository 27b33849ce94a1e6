"""``results.jsonl``: one row per trial, appended whole, never lost and never doubled."""

import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from experiments import launch

KEY = ("method", "dataset", "domain", "severity", "seed", "split_role")


def read(path: pathlib.Path) -> tuple[list[dict[str, Any]], bool]:
    """The rows of a file, which is left as it is; whether its last line is whole.

    Raises:
      UserError: a line that is no row.
    """
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    found = []
    for number, line in enumerate(whole.decode("utf-8", "replace").splitlines(), start=1):
        try:
            row = json.loads(line)
            hash(tuple(row[name] for name in KEY))
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
    """

    def __init__(self, path: pathlib.Path, rows: Iterable[dict[str, Any]] | None = None):
        self.path = path
        self.failed: list[dict[str, Any]] = []
        self._rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        if rows is not None:
            self._rows = {self.key(row): row for row in rows}
        elif path.exists():
            self._load()

    def _load(self) -> None:
        found, whole = read(self.path)
        self._rows = {self.key(row): row for row in found if row.get("status") == "ok"}
        if not whole or any(row.get("status") != "ok" for row in found):
            lines = [json.dumps(row) + "\n" for row in self._rows.values()]
            launch.write_atomically(self.path, "".join(lines))

    @staticmethod
    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        """What identifies a row."""
        return tuple(row[name] for name in KEY)

    def get(self, **fields: Any) -> dict[str, Any] | None:
        """The finished row with these key fields, if there is one; other fields are ignored."""
        return self._rows.get(self.key(fields))

    def rows(self) -> list[dict[str, Any]]:
        """All finished rows."""
        return list(self._rows.values())

    def add(self, *rows: dict[str, Any]) -> None:
        """Appends rows in one write; a second one of the same key is a programming error."""
        for row in rows:
            if (key := self.key(row)) in self._rows:
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
                self._rows[self.key(row)] = row
            else:
                self.failed.append(row)
