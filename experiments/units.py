"""Units of an evaluation: one method on streams that go side by side; which are missing, and done.

A unit is the least that is run, written and skipped as a whole.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections

from experiments import journal, launch, pristine, result_rows, settings, team as team_lib
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
      run: the model of a seed: its evaluations, and its bound candidates.
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
    todo: dict[str, list[str]] = {
        label: [name for name in names if (label, name, *here) not in finished] for label in chosen
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


def done(
    run: Any,
    role: str,
    units: Sequence[Unit],
    fields: Mapping[str, Any],
    folder: pathlib.Path,
    team: team_lib.Team,
) -> Iterator[list[dict[str, Any]]]:
    """Runs units, one per process at a time; the first process gets the rows of all.

    Args:
      run: as in :func:`missing`.
      role: as in :func:`missing`.
      units: to be run.
      fields: of the rows.
      folder: the work folder.
      team: the processes that share them.
    """
    for start in range(0, len(units), team.count):
        part = units[start : start + team.count]
        rows: list[dict[str, Any]] = []
        if team.index < len(part):
            rows = _rows(run, role, part[team.index], fields, folder)
        reports = team.collect(json.dumps(rows).encode())
        for report in reports or ():
            if lines := json.loads(report):
                yield lines


def _rows(
    run: Any, role: str, unit: Unit, fields: Mapping[str, Any], folder: pathlib.Path
) -> list[dict[str, Any]]:
    evaluation = run.evaluation_of(role)
    candidate = unit.candidate
    try:
        rows = evaluation.rows(candidate.label, run.bound(candidate), unit.streams)
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
        of_stream = [row for row in rows if row.stream == stream]
        result_rows.write_instances(folder / "instances", of_stream, fields)
        lines += [
            result_rows.line(candidate, row, fields, len(of_stream)) | counts for row in of_stream
        ]
    return lines


def _parameter_counts(run: Any, candidate: Candidate) -> dict[str, int]:
    """How many parameters a candidate adapts, and of how many."""
    return settings.parameter_counts(candidate.select, pristine.layout(run.task))
