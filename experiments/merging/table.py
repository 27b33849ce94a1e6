"""The tables of several ``experiments.adapt`` as one."""

import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from experiments import choice, launch, result_rows, tasks
from experiments.merging import parts as parts_lib, ranges
from experiments.merging.parts import Part
from ttt_jax.task import Metric

RECORD, BOOK, CHOICE = "run.json", "results.jsonl", "selection.json"
# Where a part may differ: its examples and seeds, and what changes no result.
_FREE = ("data.test", "seeds", "data.dir", "data.in_memory")
_FREE += ("adapt.chunk_size", "adapt.parallel_streams")


def read(folder: pathlib.Path) -> Part:
    """A part, whose record has its ``selection`` too; errors as :func:`parts.read`."""
    part = parts_lib.read(folder, RECORD, BOOK, CHOICE)
    part.record["selection"] = choice.read(folder / CHOICE)
    return part


def joined(parts: Sequence[Part]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The config and the rows of all parts, in order of appearance.

    Raises:
      UserError: the parts are not those of one table.
    """
    _require_one_table(parts)
    config = json.loads(json.dumps(parts[0].record["config"]))
    config["seeds"] = sorted({seed for part in parts for seed in part.record["config"]["seeds"]})
    # Beside ranges, a part with all images may have what cannot be cut.
    test, _ = ranges.joined(part.test for part in parts)
    if "test" in config["data"]:
        config["data"]["test"] = test
    found: dict[tuple[Any, ...], list[tuple[Part, dict[str, Any]]]] = {}
    for part in parts:
        for row in part.rows:
            found.setdefault(result_rows.identity(row), []).append((part, row))
    metrics = functools.cache(lambda: tasks.build(ml_collections.ConfigDict(config)).metrics)
    rows = []
    for held in found.values():
        try:
            rows.append(_row(held, test, metrics))
        except (ValueError, launch.UserError) as error:
            raise launch.UserError(
                f"the rows of {parts_lib.label(held[0][1])} cannot be joined: "
                f"{str(error).rstrip('.')}."
            ) from error
    return config, rows


def write(
    workdir: pathlib.Path, parts: Sequence[Part], rows: Sequence[dict[str, Any]], origin: Any
) -> None:
    """Writes a work folder: what the parts chose, their rows, and ``origin`` as its record."""
    chosen: dict[str, Any] = {}
    tried: list[Any] = []
    for part in parts:
        selection = part.record["selection"]
        new = {name: value for name, value in selection["chosen"].items() if name not in chosen}
        tried += [entry for entry in selection["tried"] if entry["method"] in new]
        chosen |= new
    first = {name: v for name, v in parts[0].record.items() if name not in ("runs", "selection")}
    launch.write_json(workdir / RECORD, first | origin)
    selection = parts[0].record["selection"] | {"chosen": chosen, "tried": tried}
    launch.write_json(workdir / CHOICE, selection)
    launch.write_atomically(workdir / BOOK, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} rows of {len(parts)} parts in {workdir / BOOK}")


def _require_one_table(parts: Sequence[Part]) -> None:
    """Parts of one table share config, settings and the models of their seeds."""

    def fixed(part: Part) -> dict[str, Any]:
        config = launch.DEFAULTS | launch.flat(ml_collections.ConfigDict(part.record["config"]))
        return {name: value for name, value in config.items() if name not in _FREE}

    parts_lib.require_equal(
        (("config", fixed(part), part) for part in parts),
        f"parts of a table differ in {', '.join(_FREE)} alone",
    )
    parts_lib.require_equal(
        (
            (name, settings, part)
            for part in parts
            for name, settings in part.record["selection"]["chosen"].items()
        ),
        "settings are chosen once for a table, so put the selection.json of the first part into "
        "the other work folders, then run experiments.adapt there",
    )
    parts_lib.require_equal(
        (
            (f"checkpoint of seed {row['seed']}", row["checkpoint"], part)
            for part in parts
            for row in part.rows
        ),
        "a seed is one model, so make all its parts with the same --checkpoint",
    )


def _row(
    held: Sequence[tuple[Part, dict[str, Any]]],
    test: str,
    metrics: Callable[[], Mapping[str, Metric]],
) -> dict[str, Any]:
    """The one row of several of one identity.

    Raises:
      ValueError: they contradict each other, or do not make the whole of ``test``.
    """
    first, row = held[0]
    if row["split_role"] != "reported":
        for part, other in held[1:]:
            if difference := result_rows.difference(row, other, rounding=True):
                name, value, differing = difference
                raise ValueError(
                    f"of the same images {name} is {value!r} in {first.folder} and {differing!r} "
                    f"in {part.folder}; make them with the same checkpoint and code"
                )
        return row
    if ranges.joined(part.test for part, _ in held) != (test, True):
        listed = ", ".join(f"{part.test} in {part.folder}" for part, _ in held)
        raise ValueError(
            f"it is there for {listed}, which must adjoin without overlap and be {test} together; "
            "run what is missing, leave out what is double, and write a range up to the end of "
            "the split as test[100:]"
        )
    return result_rows.joined([row for _, row in held], metrics()) if len(held) > 1 else row
