"""Checkpoint + a task's streams + the methods of a config -> rows.

Usage::

    python -m experiments.adapt --workdir=runs/demo [--config=experiments/configs/digits.py]

Chooses settings on the validation streams (``WORKDIR/selection.json``), then evaluates every method
of the config on the validation and the reported streams of its task. Appends one row per method,
stream, combination of tags and seed to ``WORKDIR/results.jsonl``. Run it again to resume: finished
rows are kept and skipped, failed ones run again.

It uses all devices of its process. With ``--distributed``, several processes share the work: each
takes methods on streams of its own; the first one alone writes.
"""

import contextlib
import functools
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import tqdm
from absl import flags

from experiments import (
    choice,
    examples,
    journal,
    launch,
    pristine as pristine_lib,
    provenance,
    result_rows,
    settings,
    tasks,
    team as team_lib,
    units,
    writers,
)
from ttt_jax import checkpoint, evaluation


class Part(NamedTuple):
    """A part of the rows of a config: those of some methods and streams, all where empty."""

    methods: Sequence[str] = ()
    domains: Sequence[str] = ()


def mesh_of(count: int) -> jax.sharding.Mesh | None:
    """The first ``count`` devices of this process, all for 0; None for one device.

    Raises:
      UserError: more than there are.
    """
    devices = jax.local_devices()
    if not 0 <= count <= len(devices):
        raise launch.UserError(
            f"--devices must lie between 0 (all) and {len(devices)}, all that this process has; "
            f"got {count}."
        )
    chosen = devices[: count or len(devices)]
    return jax.sharding.Mesh(np.asarray(chosen), ("data",)) if len(chosen) > 1 else None


def run(
    config: ml_collections.ConfigDict,
    folder: str,
    *,
    restore: str = "memory",
    checkpoint_path: str | None = None,
    trackers: Sequence[str] = (),
    part: Part = Part(),  # noqa: B008 (immutable)
    devices: int = 0,
    team: team_lib.Team = team_lib.ALONE,
) -> int:
    """Adapts every seed of a config; returns the exit status, 1 if any method failed on a stream.

    Args:
      config: see ``experiments/configs``.
      folder: the work folder.
      restore: how the pristine parameters come back between batches: ``memory``,
        ``fingerprint`` or ``orbax``.
      checkpoint_path: a checkpoint for all seeds; None takes the folder's own.
      trackers: where scalars go beside the folder, see :mod:`experiments.writers`.
      part: which rows to make.
      devices: how many of this process's devices to use; 0 for all.
      team: the processes that share the run.

    Raises:
      UserError: a part that there is not, impossible seeds, or a work folder that is not fit.
    """
    launch.check_seeds(config)
    first = team.index == 0
    workdir = launch.open_workdir(folder) if first else pathlib.Path(folder)
    with launch.locked(workdir) if first else contextlib.nullcontext():
        task = tasks.build(config)
        candidates = settings.candidates(config, task)
        if part.methods:
            wanted = launch.chosen("method", part.methods, candidates)
            candidates = {label: candidates[label] for label in candidates if label in wanted}
        mesh = mesh_of(devices)
        # Once all is checked: a config that cannot be run must not keep the folder.
        if first:
            count = 1 if mesh is None else mesh.size
            provenance.claim(workdir, config, devices=count, processes=team.count)
        journal_path, identity = workdir / "results.jsonl", result_rows.identity
        rows = journal.Journal(journal_path, identity=identity).rows() if first else None
        rows = team_lib.agreed(team, rows)
        results = journal.Journal(journal_path, None if first else rows, identity=identity)
        with writers.open_writer(workdir, trackers if first else ()) as writer:
            for seed in config.seeds:
                path = checkpoint_path or pristine_lib.path_of(workdir, seed)
                sharding = None
                if mesh is not None:
                    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
                held = pristine_lib.load(path, task, config, sharding=sharding)
                seed_run = _Seed(config, task, held, seed, restore, mesh)
                chosen = seed_run.choose(workdir / "selection.json", candidates, team)
                for role in ("validation", "reported"):
                    seed_run.evaluate(role, chosen, part, results, writer, team)
    return _summary(results, team)


class _Seed:
    """The model of one seed: its evaluations by role, and its measured source statistics."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        task: Any,
        held: checkpoint.Pristine,
        seed: int,
        restore: str,
        mesh: Any,
    ):
        self.task = task
        self._config, self._held = config, held
        self._seed, self._restore, self._mesh = seed, restore, mesh
        self._pictured: Callable[..., evaluation.Evaluation] = evaluation.Evaluation
        self._bound: dict[int, evaluation.Parametric] = {}
        self._evaluations: dict[str, evaluation.Evaluation] = {}

    def evaluation_of(self, role: str) -> evaluation.Evaluation:
        """That of a role, made once; all share compiled programs with all other seeds."""
        if role not in self._evaluations:
            make = self._pictured if role == "reported" else evaluation.Evaluation
            self._evaluations[role] = make(
                self.task,
                lambda: self._held.restore(self._restore),
                role=role,
                seed=self._seed,
                chunk_size=self._config.adapt.chunk_size,
                mesh=self._mesh,
                parallel_streams=launch.setting(self._config, "adapt.parallel_streams"),
            )
            self._evaluations[role].programs = units.programs(self._config, self._mesh)
        return self._evaluations[role]

    def bound(self, candidate: settings.Candidate) -> evaluation.Parametric:
        """The candidate with the statistics that it measures, once."""
        if id(candidate.bind) not in self._bound:
            params = self._held.restore("memory")
            self._bound[id(candidate.bind)] = candidate.bind(params, self._seed)
        return self._bound[id(candidate.bind)]

    def choose(
        self,
        path: pathlib.Path,
        candidates: Mapping[str, Sequence[settings.Candidate]],
        team: team_lib.Team,
    ) -> dict[str, settings.Candidate]:
        """The candidate per method that the validation streams choose."""
        label = examples.shown(candidates)
        if label and team.index == 0 and self._seed == self._config.seeds[0]:
            pictured = functools.partial(examples.PicturedEvaluation, label=label)
            self._pictured = functools.partial(pictured, path=path.parent / "examples.npz")
        passes = launch.setting(self._config, "adapt.selection_passes")
        runs = choice.Runs(
            self.task,
            self.evaluation_of("choosing" if passes > 1 else "validation"),
            self.bound,
            seed=self._seed,
            fingerprint=self._held.fingerprint,
            errors=units.ERRORS,
        )
        return choice.choose(path, candidates, self.task, runs, team)

    def evaluate(
        self,
        role: str,
        chosen: Mapping[str, settings.Candidate],
        part: Part,
        results: journal.Journal,
        writer: writers.Writer,
        team: team_lib.Team,
    ) -> None:
        """Adds the missing rows of one role; a failing unit becomes failed rows."""
        fields = {
            "dataset": self.task.name,
            "seed": self._seed,
            "split_role": role,
            "checkpoint": self._held.fingerprint,
            "chooses": self.task.chooses,
        }
        result_rows.require_checkpoint(results, fields)
        work = units.missing(self, role, chosen, part.domains, results, fields)
        bar = tqdm.tqdm(
            total=len(work),
            desc=f"{role} seed {self._seed}",
            disable=team.index > 0 or not sys.stderr.isatty(),
        )
        for rows in units.done(self, role, work, fields, results.path.parent, team):
            bar.update(1)
            results.add(*(row for row in rows if results.get(**row) is None))
            for row in rows:
                if row["status"] == "ok":
                    name = f"{role}/{row['method']}/{row['stream']}"
                    writer.scalars(self._seed, {name: row[self.task.chooses]})
        bar.close()


def _summary(results: journal.Journal, team: team_lib.Team) -> int:
    failed = team_lib.agreed(team, len(results.failed))
    if team.index:
        return int(failed > 0)
    print(f"{len(results.rows())} rows in {results.path}, {failed} failed")
    for line in result_rows.not_adapted(results.rows()):
        print(line, file=sys.stderr)
    for row in results.failed:
        print(f"failed: {row['method']} on {row['stream']}: {row['message']}", file=sys.stderr)
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
