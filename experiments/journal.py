"""Rows in a file of JSON lines: appended whole, never lost and never doubled.

``results.jsonl`` has one per trial; the diagnostics have files of their own. Each process of a run
that is shared has a file of its own beside it, and reads those of all.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
from absl import flags

from experiments import launch
from experiments.config_keys import DEFAULTS

# Of rows that do not say their tags, as those of earlier releases.
_TAGS = ("domain", "severity", "document", "source")


class Shard(NamedTuple):
    """One of ``count`` processes that share a work folder; ``index`` counts from 0."""

    index: int = 0
    count: int = 1

    def takes(self, position: int) -> bool:
        """Whether the unit at a position of the list of all units is this process's."""
        return position % self.count == self.index

    @property
    def name(self) -> str:
        """Part of the names of its files; empty for the only process."""
        return "" if self.count == 1 else f".{self.index}-of-{self.count}"


WHOLE = Shard()


def shard(text: str) -> Shard:
    """The shard that ``i/N`` means.

    Raises:
      UserError: no such text, or ``i`` is not from 0 to N - 1.
    """
    index, _, count = text.partition("/")
    if index.isdigit() and count.isdigit() and int(index) < int(count):
        return Shard(int(index), int(count))
    raise launch.UserError(
        "--shard must be i/N, the i-th of N processes, where i counts from 0 to N - 1; got "
        f"{text!r}. Write --shard=0/2 and --shard=1/2 for two."
    )


@contextlib.contextmanager
def locked(folder: pathlib.Path, shard: Shard) -> Iterator[None]:
    """Holds a work folder, which shards share; no two programs write the same file of rows.

    Raises:
      BusyError: another program uses the folder, or is the same shard.
    """
    if shard == WHOLE:
        with launch.locked(folder):
            yield
    else:
        with launch.locked(folder, shared=True), launch.locked(folder, f".lock{shard.name}"):
            yield


def define_flag() -> flags.FlagHolder[Any]:
    """Defines ``--shard``; not at import, as programs are imported too."""
    text = "i/N: this is the i-th, from 0, of N processes that share the work folder."
    return flags.DEFINE_string("shard", "0/1", text)


def files(path: pathlib.Path) -> list[pathlib.Path]:
    """The files of rows that there are: ``path`` and those of shards beside it."""
    shards = sorted(path.parent.glob(f"{path.stem}.*-of-*{path.suffix}"))
    return [path, *shards] if path.exists() else shards


def identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What identifies a row: its method, stream and tags, data, seed and role."""
    names = ("method", "dataset", "seed", "split_role")
    tags = [
        [name, row[name]] for name in sorted(row.get("tags", _TAGS)) if row.get(name) is not None
    ]
    stream = row.get("stream", row.get("domain"))
    return (*(row[name] for name in names), json.dumps([stream, tags]))


def made_with(config: ml_collections.ConfigDict, names: Sequence[str]) -> dict[str, Any]:
    """Values of a config by dotted key, as JSON has them: what a row says it was made with.

    A key that the config leaves out has its default, so that saying it changes no row.
    """
    values = DEFAULTS | launch.flat(config)
    return json.loads(json.dumps({name: values[name] for name in names}))


def read(
    path: pathlib.Path, key: Callable[[Mapping[str, Any]], tuple[Any, ...]] = identity
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

    A shard reads the rows of all and writes a file of its own. Without one, the rows of all shards
    become one file.

    Args:
      path: of the file.
      shard: of the process.
      identity: what identifies a row.
    """

    def __init__(
        self,
        path: pathlib.Path,
        *,
        shard: Shard = WHOLE,
        identity: Callable[[Mapping[str, Any]], tuple[Any, ...]] = identity,
    ):
        self.path = path.with_name(f"{path.stem}{shard.name}{path.suffix}")
        self._all = path
        self._identity = identity
        self.failed: list[dict[str, Any]] = []
        self._rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        others = [file for file in files(path) if file != path]
        self._load(self.path, others if shard == WHOLE else [])
        if shard != WHOLE:
            self.reread()

    def reread(self) -> "Journal":
        """Takes the rows that other shards have added; returns this journal."""
        for other in files(self._all):
            rows, _ = read(other, self._identity)
            self._take(rows)
        return self

    def _take(self, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            if row.get("status") == "ok":
                self._rows.setdefault(self._identity(row), row)

    def _load(self, path: pathlib.Path, more: Sequence[pathlib.Path]) -> None:
        changed = bool(more)
        for file in [path] * path.exists() + [*more]:
            rows, whole = read(file, self._identity)
            changed |= not whole or any(row.get("status") != "ok" for row in rows)
            self._take(rows)
        if changed:
            lines = [json.dumps(row) + "\n" for row in self._rows.values()]
            launch.write_atomically(path, "".join(lines))
        for file in more:
            file.unlink()

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
        launch.append(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        for row in rows:
            if row["status"] == "ok":
                self._rows[self._identity(row)] = row
            else:
                self.failed.append(row)
