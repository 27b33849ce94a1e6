"""Units of an evaluation: one method on streams that go side by side; which are missing, and done.

A unit is the least that is run, written and skipped as a whole.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections

from experiments import journal, launch, pristine, result_rows, settings
from experiments.settings import Candidate

# What makes a unit failed rows instead of ending the run.
ERRORS = (ValueError, TypeError, FloatingPointError, jax.errors.JaxRuntimeError)

_FREE = ("seeds", "methods")
_PROGRAMS: dict[str, dict[Any, Any]] = {}


class Unit(NamedTuple):
    """A candidate and the streams that it goes over at once."""

    candidate: Candidate
    streams: tuple[str, ...]


def programs(config: ml_collections.ConfigDict, mesh: Any) -> dict[Any, Any]:
    """Compiled programs of runs that differ in seeds, settings of methods and examples alone."""
    values = {k: v for k, v in json.loads(config.to_json()).items() if k not in _FREE}
    # How many examples a call has is part of a program's own key.
    values["data"].pop("test", None)
    devices = None if mesh is None else mesh.size
    # What is read beside the source prediction is part of its program.
    probes = sorted({str(options.get("probe")) for options in config.methods.values()})
    return _PROGRAMS.setdefault(json.dumps([values, probes, devices], sort_keys=True), {})


def missing(
    run: Any,
    role: str,
    chosen: Mapping[str, Candidate],
    streams: Sequence[str],
    results: journal.Journal,
    fields: Mapping[str, Any],
) -> list[Unit]:
    """The units that lack a row.

    Methods that forget come first, stream by stream; those that carry a state come last, all
    their streams side by side.

    Args:
      run: the model of a seed: its evaluations, its bound candidates, and its ``shard``, which
        takes pairs of a method and a stream.
      role: of the streams.
      chosen: a candidate per method.
      streams: only these, all where empty.
      results: the rows that there are.
      fields: of the rows: dataset, seed, split_role.

    Raises:
      UserError: a stream that no role has.
    """
    evaluation = run.evaluation_of(role)
    names = evaluation.streams
    if streams:
        roles = ("validation", "reported")
        known = sorted({name for each in roles for name in run.evaluation_of(each).streams})
        launch.chosen("domain", streams, known)
        names = tuple(name for name in names if name in streams)
    finished = result_rows.finished(results.rows())
    here = (fields["seed"], fields["split_role"])
    # Along the diagonal, so that no process has all streams of the slowest method.
    todo: dict[str, list[str]] = {
        label: [
            name
            for column, name in enumerate(names)
            if run.shard.takes(line + column) and (label, name, *here) not in finished
        ]
        for line, label in enumerate(chosen)
    }
    units = [
        Unit(chosen[label], (name,))
        for name in names
        for label in chosen
        if chosen[label].scope != "stream" and name in todo[label]
    ]
    for label, candidate in chosen.items():
        if candidate.scope == "stream" and todo[label]:
            groups = evaluation.groups(run.bound(candidate), todo[label])
            units += [Unit(candidate, group) for group in groups]
    return units


def rows(
    run: Any, role: str, unit: Unit, fields: Mapping[str, Any], folder: pathlib.Path
) -> list[dict[str, Any]]:
    """The rows of a unit, failed ones where it fails.

    Args:
      run: as in :func:`missing`.
      role: as in :func:`missing`.
      unit: to be run.
      fields: of the rows.
      folder: the work folder.
    """
    evaluation = run.evaluation_of(role)
    candidate = unit.candidate
    try:
        made = evaluation.rows(candidate.label, run.bound(candidate), unit.streams)
    except ERRORS as error:
        return [
            line
            for stream in unit.streams
            for line in result_rows.failed(
                candidate, error, fields, stream, evaluation.cells(stream)
            )
        ]
    counts = _parameter_counts(run, candidate)
    lines = []
    for stream in unit.streams:
        of_stream = [row for row in made if row.stream == stream]
        result_rows.write_instances(folder / "instances", of_stream, fields)
        chances = result_rows.chances(run.task, evaluation.batches(stream))
        lines += [
            result_rows.line(candidate, row, fields, len(of_stream)) | counts | chance
            for row, chance in zip(of_stream, chances, strict=True)
        ]
    return lines


def _parameter_counts(run: Any, candidate: Candidate) -> dict[str, int]:
    """How many parameters a candidate adapts, and of how many."""
    return settings.parameter_counts(candidate.select, pristine.layout(run.task))
