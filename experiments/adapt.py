"""Checkpoint + shifted data + a dict of predictors -> rows.

Usage::

    python -m experiments.adapt --workdir=runs/demo [--config=experiments/configs/digits.py]

Chooses settings on the validation corruptions (``WORKDIR/selection.json``), then evaluates every
method of the config on the clean test split and the 15 corruptions, each by itself or all in one
stream (``adapt.sequence``), or on the test split alone (``adapt.corruptions``). Appends one row per
(method, domain, severity, seed) to ``WORKDIR/results.jsonl``. Run it again to resume: finished
rows are kept and skipped, failed ones run again.

It uses all devices of its process. With ``--distributed``, several processes share the work: each
reads and adapts its own part of the images, batches and streams; the first one alone writes.
"""

import contextlib
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
import tqdm
from absl import flags

from experiments import (
    journal,
    launch,
    methods as methods_lib,
    outcome as outcome_lib,
    prefixes,
    problem as problem_lib,
    provenance,
    rows as rows_lib,
    runner as runner_lib,
    selection,
    spread,
    team as team_lib,
    trials as trials_lib,
    writers,
)
from experiments.methods import steps
from ttt_jax import checkpoint, data


def missing_methods(
    results: journal.Journal,
    methods: dict[str, methods_lib.Method],
    trial: trials_lib.Trial,
    fields: dict[str, Any],
) -> list[str]:
    """The methods that lack a row of a trial: it is there as a whole, or it is run again.

    Raises:
      UserError: the rows are those of another checkpoint.
    """
    missing = []
    for name in methods:
        rows = [
            results.get(method=name, domain=domain, severity=severity, **fields)
            for domain, severity in trial.cells
        ]
        for row in rows:
            if row is not None and row["checkpoint"] != fields["checkpoint"]:
                raise launch.UserError(
                    f"{results.path} has rows of another checkpoint ({row['checkpoint']}, now "
                    f"{fields['checkpoint']}). Use another --workdir, or remove the file."
                )
        if None in rows:
            missing.append(name)
    return missing


class _Seen(NamedTuple):
    """A trial, the methods it lacks, and what their outcomes are compared with.

    The last two are there on the first of several processes alone.
    """

    trial: trials_lib.Trial
    missing: list[str]
    source_class: np.ndarray | None
    probes: dict[str, np.ndarray]


def evaluate(
    results: journal.Journal,
    methods: dict[str, methods_lib.Method],
    baseline: methods_lib.Method,
    chosen: dict[str, dict[str, Any]],
    runner: runner_lib.Runner,
    source: data.Source,
    fields: dict[str, Any],
    trials: Sequence[trials_lib.Trial],
    groups: dict[str, np.ndarray],
    writer: writers.Writer,
) -> None:
    """Adds the missing rows of one seed and split role; a failing trial becomes failed rows."""
    probed = {method.probe for method in methods.values()} - {None}
    progress = tqdm.tqdm(
        total=len(trials) * len(methods),
        desc=f"{fields['split_role']} seed {fields['seed']}",
        disable=runner.team.index > 0 or not sys.stderr.isatty(),
    )
    todo = [(trial, missing_methods(results, methods, trial, fields)) for trial in trials]
    progress.update(sum(len(methods) - len(missing) for _, missing in todo))
    todo = [(trial, missing) for trial, missing in todo if missing]
    seen: list[_Seen] = []

    def add(name: str, some: Sequence[_Seen]) -> None:
        """Runs a method over trials and writes their rows."""
        method, settings = methods[name], chosen[name]
        batches = [
            runner.batches(source, one.trial, method.scope, place) for place, one in enumerate(some)
        ]
        try:
            outcomes = runner.run_all(name, method, settings, batches)
            if runner.team.index:
                return  # it has handed on what it did
            rows = [
                row
                for one, outcome in zip(some, outcomes, strict=True)
                for row in rows_lib.make_rows(
                    method, settings, one.trial, outcome, one.source_class, one.probes, groups
                )
            ]
        except runner_lib.TRIAL_ERRORS as error:
            message = f"{type(error).__name__}: {error}"[:500]
            rows = [
                {"domain": domain, "severity": severity, "status": "failed", "message": message}
                for one in some
                for domain, severity in one.trial.cells
            ]
        counts = steps.parameter_counts(settings, runner.shapes)
        rows = [{"method": name, **fields, **row, **counts} for row in rows]
        # Of several rows that were cut off while they were written, some are there already.
        results.add(*(row for row in rows if results.get(**row) is None))
        for row in rows:
            if row["status"] == "ok":
                scalar = f"{fields['split_role']}/{name}/{row['domain']}"
                if row["sequence"] == "gradual":
                    scalar += f"/{row['severity']}"
                writer.scalars(fields["seed"], {scalar: row["error"]})
        progress.update(len(some))
        progress.set_postfix_str(f"{some[0].trial.cells[0][0]} {name}")

    def load(one: tuple[trials_lib.Trial, list[str]]) -> list[data.DomainBatch]:
        trial, missing = one
        if "batch" in {methods[name].scope for name in missing}:
            runner.batches(source, trial, "batch")
        return runner.batches(source, trial)

    for (trial, missing), batches in zip(todo, runner_lib.ahead(load, todo), strict=True):
        plain = runner.run("source", baseline, {}, batches)
        found = None if plain is None else outcome_lib.predicted(plain.final)
        seen.append(_Seen(trial, missing, found, runner.probe(batches, probed)))
        for name in missing:
            if methods[name].scope != "stream":
                add(name, seen[-1:])
    # Streams go last, those of all trials side by side.
    for name, method in methods.items():
        if method.scope == "stream" and (some := [one for one in seen if name in one.missing]):
            add(name, some)
    progress.close()


class Shared:
    """What runs in one process share that differ in seeds and settings of methods alone.

    Attributes:
      compiled: compiled programs, see :class:`experiments.runner.Runner`.

    With ``whole=False`` no split is read as a whole.
    """

    def __init__(self, *, whole: bool = True) -> None:
        self.compiled: dict[Any, Any] = {}
        self._whole = whole
        self._sources: dict[str, data.Source] = {}

    def source(self, config: ml_collections.ConfigDict, split: str) -> data.Source:
        """A split of the data set, read once."""
        if split not in self._sources:
            self._sources[split] = problem_lib.load_data(config, split, whole=self._whole)
        return self._sources[split]


class Part(NamedTuple):
    """A part of the rows of a config: those of some methods and domains, all where empty."""

    methods: Sequence[str] = ()
    domains: Sequence[str] = ()

    def of(self, *trials: Sequence[trials_lib.Trial]) -> list[list[trials_lib.Trial]]:
        """The trials of several roles that have a domain of the part.

        Raises:
          UserError: a domain that no trial has.
        """
        if not self.domains:
            return [list(some) for some in trials]
        domains = [[{domain for domain, _ in one.cells} for one in some] for some in trials]
        known = sorted(set().union(*(names for some in domains for names in some)))
        wanted = set(launch.chosen("domain", self.domains, known))
        return [
            [one for one, names in zip(some, has, strict=True) if names & wanted]
            for some, has in zip(trials, domains, strict=True)
        ]


def run(
    config: ml_collections.ConfigDict,
    folder: str,
    *,
    restore: str = "memory",
    checkpoint_path: str | None = None,
    trackers: Sequence[str] = (),
    part: Part = Part(),  # noqa: B008 (immutable)
    shared: Shared | None = None,
    known: prefixes.Prefixes | None = None,
    devices: int = 0,
    team: team_lib.Team = team_lib.ALONE,
) -> int:
    """Adapts every seed of a config; returns the exit status, 1 if any trial failed.

    Args:
      config: see ``experiments/configs``.
      folder: the work folder.
      restore: how the pristine parameters come back between batches: ``memory``,
        ``fingerprint`` or ``orbax``.
      checkpoint_path: a checkpoint for all seeds; None takes the folder's own.
      trackers: where scalars go beside the folder, see :mod:`experiments.writers`.
      part: which rows to make.
      shared: of runs in this process whose configs differ in seeds and methods' settings alone.
      known: of runs whose configs differ in numbers of inner steps alone.
      devices: how many of this process's devices to use; 0 for all.
      team: the processes that share the run.

    Raises:
      UserError: a part that there is not, impossible seeds, or a work folder that is not fit.
    """
    launch.check_seeds(config)
    first = team.index == 0
    workdir = launch.open_workdir(folder) if first else pathlib.Path(folder)
    with launch.locked(workdir) if first else contextlib.nullcontext():
        shared = Shared(whole=team.count == 1) if shared is None else shared
        place = (known, spread.local(devices), team)
        return _run(config, workdir, restore, checkpoint_path, trackers, part, shared, *place)


def _run(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    restore: str,
    checkpoint_path: str | None,
    trackers: Sequence[str],
    part: Part,
    shared: Shared,
    known: prefixes.Prefixes | None,
    devices: spread.Devices,
    team: team_lib.Team,
) -> int:
    test, validation = shared.source(config, "test"), shared.source(config, "validation")
    problem = problem_lib.build(config, test)
    plain = problem_lib.build(config, test, shared_kernels=True)
    methods = methods_lib.build(config, problem, plain)
    if part.methods:
        wanted = launch.chosen("method", part.methods, methods)
        methods = {name: methods[name] for name in methods if name in wanted}
    baseline = methods_lib.baseline(plain)
    trials_lib.check(config)
    groups: dict[str, np.ndarray] = {}
    if launch.setting(config, "data.imbalance") != 1:
        labels = problem_lib.load_data(config, "train", whole=False).labels()
        groups = rows_lib.class_groups(labels, test.num_classes)
    # Once all is checked: a config that cannot be run must not keep the folder.
    if team.index == 0:
        provenance.claim(workdir, config, devices=devices.count, processes=team.count)
        results = journal.Journal(workdir / "results.jsonl")
    rows = team_lib.agreed(team, results.rows() if team.index == 0 else None)
    if team.index:
        results = journal.Journal(workdir / "results.jsonl", rows)
    with writers.open_writer(workdir, () if team.index else trackers) as writer:
        for seed in config.seeds:
            path = checkpoint_path or problem_lib.checkpoint_path(workdir, seed)
            pristine = problem_lib.load_checkpoint(path, problem, config, sharding=devices.copied)
            runner = runner_lib.Runner(
                config,
                plain,
                pristine,
                seed=seed,
                restore=restore,
                compiled=shared.compiled,
                known=known,
                devices=devices,
                team=team,
            )
            checked = trials_lib.checked(config, validation, seed)
            reported = trials_lib.reported(config, test, seed)
            choosing = trials_lib.choosing(config, validation, seed)
            chosen = selection.choose(
                workdir / "selection.json", methods, runner, validation, choosing
            )
            checked, reported = part.of(checked, reported)
            roles = (("validation", validation, checked), ("reported", test, reported))
            for role, source, trials in roles:
                fields = {
                    "dataset": source.title,
                    "seed": seed,
                    "split_role": role,
                    "checkpoint": pristine.fingerprint,
                }
                evaluate(
                    results,
                    methods,
                    baseline,
                    chosen,
                    runner,
                    source,
                    fields,
                    trials,
                    groups,
                    writer,
                )
    failed = team_lib.agreed(team, len(results.failed))
    if team.index:
        return int(failed > 0)
    print(f"{len(results.rows())} rows in {results.path}, {failed} failed trials")
    for line in rows_lib.not_adapted(results.rows()):
        print(line, file=sys.stderr)
    for row in results.failed:
        print(f"failed: {row['method']} on {row['domain']}: {row['message']}", file=sys.stderr)
    return 1 if results.failed else 0


def main(argv: Sequence[str]) -> int:
    """The program."""
    del argv
    where = team_lib.Rendezvous(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if not _DISTRIBUTED.value and where != team_lib.Rendezvous():
        raise launch.UserError(
            "--coordinator, --num_processes and --process_id need --distributed."
        )
    joined = team_lib.joined(where._replace(patience_s=_PATIENCE.value))
    with joined if _DISTRIBUTED.value else contextlib.nullcontext(team_lib.ALONE) as team:
        return run(
            _CONFIG.value,
            _WORKDIR.value,
            restore=_RESTORE.value,
            checkpoint_path=_CHECKPOINT.value,
            trackers=_TRACKERS.value,
            part=Part(
                launch.given("methods", _METHODS.value), launch.given("domains", _DOMAINS.value)
            ),
            devices=_DEVICES.value,
            team=team,
        )


if __name__ == "__main__":
    _CONFIG, _WORKDIR = launch.define_flags()
    _RESTORE = flags.DEFINE_enum(
        "restore",
        "memory",
        list(checkpoint.MODES),
        "How the pristine parameters come back between batches.",
    )
    _CHECKPOINT = flags.DEFINE_string(
        "checkpoint", None, "Checkpoint to adapt; default: WORKDIR/checkpoints/seed_SEED."
    )
    _TRACKERS = writers.define_flag()
    _METHODS = flags.DEFINE_list("methods", None, "Only these methods of the config.")
    _DOMAINS = flags.DEFINE_list("domains", None, "Only these domains, such as clean,fog.")
    _DEVICES = flags.DEFINE_integer("devices", 0, "Devices of each process to use; 0: all.")
    _DISTRIBUTED = flags.DEFINE_bool(
        "distributed", False, "Share the work with other processes; under Slurm JAX finds them."
    )
    _COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of the first process.")
    _NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
    _PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.")
    _PATIENCE = flags.DEFINE_integer(
        "initialization_timeout", 300, "Seconds to wait for all processes at the start.", 1
    )
    launch.run(main)
