"""What a sweep is going to do: its trials, and what each will write. Nothing is written."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments import examples, launch, pristine, settings, tasks, train
from experiments.sweeping import collect, plan, progress
from experiments.sweeping.plan import Variant
from ttt_jax import evaluation
from ttt_jax.task import Task

_ROLES = ("reported", "validation")
_OF_ALL = "metrics.jsonl, run.json, state.json"


class _Rows(NamedTuple):
    """Of a trial: its rows by role, and its files beside those of all units."""

    methods: tuple[str, ...]
    counts: dict[str, int]
    files: str


def show(path: str, folder: str, given: Mapping[str, Any] = plan.NOTHING) -> int:
    """Prints the units of a sweep as :func:`experiments.sweep.run` would begin it.

    Args:
      path: of the config file.
      folder: of the sweep.
      given: values of the config for all trials, by dotted key.

    Returns:
      The exit status, 0.

    Raises:
      UserError: what the sweep would be refused for, or trials that would fail at their start.
    """
    workdir = pathlib.Path(folder)
    _require_folder(workdir)
    variants = plan.variants(path, given)
    units = plan.units(variants)
    states = progress.measure(workdir, units).states
    variant_of = dict(zip((u.id for u in units if u.kind == "trial"), variants, strict=True))
    models = {unit.needs: variant_of[unit.id] for unit in units if unit.kind == "trial"}
    print(f"{_many(len(variants), 'trial')}, {_many(len(models), 'model')} in {workdir}/")
    known = _Known()
    total, faults = 0, []
    for unit, state in zip(units, states, strict=True):
        print(f"{unit.kind} {unit.id} ({state.state}): {unit.label}")
        place = f"  {unit.folder(workdir).relative_to(workdir)}/:"
        if unit.kind == "model":
            print(f"{place} checkpoints/seed_{models[unit.id].seed}/, {_OF_ALL}")
            continue
        try:
            rows = known.rows(variant_of[unit.id])
        except launch.MENDABLE as error:
            faults.append(f"{unit.id} ({unit.label}): {error}")
            print(f"  cannot run: {error}")
            continue
        count = sum(rows.counts.values())
        total += count
        of_roles = ", ".join(f"{number} {role}" for role, number in rows.counts.items())
        seed = variant_of[unit.id].seed
        print(f"  methods {', '.join(rows.methods)}; seed {seed}, model {unit.needs}")
        written = f"results.jsonl of {_many(count, 'row')} ({of_roles}), {rows.files}"
        print(f"{place} {written}, {_OF_ALL}")
    if faults:
        raise launch.UserError(f"{len(faults)} of {len(variants)} trials cannot run: {faults[0]}")
    print(f"  {progress.PLAN}, {collect.TABLE} of {_many(total, 'row')}, compiled/")
    print("  and log.txt where a process begins. This was a dry run: nothing is written.")
    return 0


def _many(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _require_folder(workdir: pathlib.Path) -> None:
    """Refuses a folder that cannot be written, or is in use, without a trace in it."""
    there = next(part for part in (workdir, *workdir.absolute().parents) if part.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "cannot be written" if there.is_dir() else "is a file and no folder"
        raise launch.UserError(f"cannot write {workdir}: {there} {what}; choose another --workdir.")
    if (workdir / ".lock").exists():
        with launch.locked(workdir):
            pass


class _Known:
    """What trials share: tasks, and how many rows a method has on each of their streams."""

    def __init__(self) -> None:
        self._tasks: dict[str, Task] = {}
        self._cells: dict[tuple[str, int], dict[str, dict[str, int]]] = {}

    def rows(self, variant: Variant) -> _Rows:
        """The rows of a trial, whose parts are checked as the trial does at its start."""
        config, part = variant.config, variant.part
        task = self._task(variant)
        candidates = settings.candidates(config, task)
        methods = tuple(name for name in candidates if name in (part.methods or candidates))
        for name in methods:
            for candidate in candidates[name]:
                settings.parameter_counts(candidate.select, pristine.layout(task))
        cells = self._cells_of(variant, task)
        if part.domains:
            named = sorted({name for streams in cells.values() for name in streams})
            launch.chosen("domain", part.domains, named)
        kept = {
            role: [number for name, number in streams.items() if name in (part.domains or streams)]
            for role, streams in cells.items()
        }
        units = len(methods) * sum(map(len, kept.values()))
        shown = {label: candidates[label] for label in methods}
        files = f"{_many(units, 'file')} in instances/, selection.json"
        if config.get("task", "images") == "images" and examples.shown(shown) and kept["reported"]:
            files += ", perhaps examples.npz"
        counts = {role: len(methods) * sum(numbers) for role, numbers in kept.items()}
        return _Rows(methods, counts, files)

    def _task(self, variant: Variant) -> Task:
        key = plan.pack_key(variant)
        if key not in self._tasks:
            task = tasks.build(variant.config)
            train.check(variant.config, task)
            self._tasks[key] = task
        return self._tasks[key]

    def _cells_of(self, variant: Variant, task: Task) -> dict[str, dict[str, int]]:
        key = plan.pack_key(variant), variant.seed
        if key not in self._cells:
            self._cells[key] = {role: _counts(task, role, variant.seed) for role in _ROLES}
        return self._cells[key]


def _counts(task: Task, role: str, seed: int) -> dict[str, int]:
    """Rows of a method on every stream; of streams that say it themselves nothing is read."""
    run = evaluation.Evaluation(task, None, role=role, seed=seed)
    found = {}
    for name, stream in task.streams(role, seed).items():
        number = getattr(stream, "num_cells", None)
        found[name] = len(run.cells(name)) if number is None else number
    return found
