"""Many trials of one config file, in parallel, safe to kill at any moment.

Usage::

    python -m experiments.sweep --config=experiments/configs/digits_sweep.py --workdir=DIR
    python -m experiments.sweep --status=DIR

``--dry_run`` checks all, prints every trial and what it will write, and writes nothing.
The config file's ``sweep(add)`` says which trials there are. They run in processes of their own, on
this machine (``--executor=local``, one worker per GPU or core) or as an array of Slurm jobs
(``--executor=slurm``); up to ``--pack`` trials that differ in seeds and settings of methods alone
share a process and its compiled programs. A trial is known by a digest of its configuration, of the
code and of the data: one that is finished is not run again, one that has changed is. One that fails
is tried again ``--retries`` times; one that is killed goes on where it was. At the end
``DIR/results.parquet`` has the rows of all trials, with a column ``trial``. Run the same command
again to go on after a kill.
"""

import os
import pathlib
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from experiments import config_files, launch, provenance, trial, writers
from experiments.sweeping import collect, plan, pools, preview, progress, state as state_lib, work
from experiments.sweeping.process import Job, Limits

_SHOW_EVERY_S = 1.0
_LOG_EVERY_S = 30.0


class _Interrupted(Exception):
    """The sweep was told to stop, by a signal."""


def run(
    config: str,
    folder: str,
    make_pool: Callable[[Job], pools.Pool],
    limits: Limits = Limits(),  # noqa: B008 (immutable)
    *,
    trackers: Sequence[str] = (),
    retry_failed: bool = False,
    overrides: Mapping[str, Any] = plan.NOTHING,
) -> int:
    """Runs a sweep to its end; returns the exit status, 1 if a trial failed.

    Args:
      config: path of the config file.
      folder: the folder of the sweep.
      make_pool: makes what runs a job, as often as there is something to do.
      limits: on every unit.
      trackers: where scalars go beside the folders of the units.
      retry_failed: try again what failed for good in an earlier run.
      overrides: values of the config for all trials, by dotted key.

    Raises:
      UserError: a config without trials, or a folder that another sweep uses or that cannot be
        written.
    """
    workdir = launch.open_workdir(folder).resolve()
    with launch.locked(workdir):
        units = plan.units(plan.variants(config, overrides))
        progress.save(workdir, units)
        for unit in collect.damaged(workdir, units):
            print(f"{unit.folder(workdir)} lacks what it had made, so it is done again")
            state_lib.write(unit.folder(workdir), state_lib.State())
        before = progress.measure(workdir, units).counts
        trials = sum(before.values())
        if before["done"] == trials and collect.up_to_date(workdir, units):
            print(f"nothing to do: all {trials} trials are finished; {workdir / collect.TABLE}")
            return 0
        if before["done"] or before["failed"]:
            print(f"{before['done']} of {trials} trials are finished, {before['failed']} failed")
        file = str(pathlib.Path(config).resolve())
        command = trial.command(file, str(workdir), trackers, overrides)
        # Trials of one shape share their compiled programs.
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(workdir / "compiled"))
        environment = {"JAX_COMPILATION_CACHE_DIR": cache, provenance.COMMAND: provenance.command()}
        job = Job(str(workdir), command, environment, limits)
        pool = make_pool(job)
        work.reopen([unit.folder(workdir) for unit in units], retry_failed=retry_failed)
        _tend(pool, workdir, units)
        path = collect.write(workdir, collect.rows(workdir, units))
        now = progress.measure(workdir, units)
    print(*progress.faults(workdir, units, now), sep="", end="", file=sys.stderr)
    print(f"{now.counts['done']} of {trials} trials done, {now.counts['failed']} failed; {path}")
    return 0 if now.counts["done"] == trials else 1


def _tend(pool: pools.Pool, workdir: pathlib.Path, units: Sequence[plan.Unit]) -> None:
    """Has the pool work, and shows how far it is, until every unit is done or has failed."""

    def stop(signal_number: int, _: object) -> None:
        for kind in handlers:  # once is enough
            signal.signal(kind, signal.SIG_IGN)
        raise _Interrupted(signal_number)

    live, shown, lines = sys.stdout.isatty(), 0.0, 0
    handlers = {kind: signal.signal(kind, stop) for kind in (signal.SIGTERM, signal.SIGINT)}
    try:
        now = progress.measure(workdir, units)
        while now.wanted:
            for state in now.states:
                if state.state == "blocked":
                    raise launch.UserError(state.message)
            if time.monotonic() - shown > (_SHOW_EVERY_S if live else _LOG_EVERY_S):
                shown = time.monotonic()
                columns = shutil.get_terminal_size().columns if live else None
                text = progress.table(units, now, columns)
                print(f"\x1b[{lines}A\x1b[J{text}" if live and lines else text, flush=True)
                lines = text.count("\n") + 1
            pool.tend(now)
            now = progress.measure(workdir, units, now)
    except _Interrupted as cause:
        kind = KeyboardInterrupt if cause.args[0] == signal.SIGINT else launch.UserError
        raise kind(
            "the sweep was told to stop; what is finished is kept. Run the same command to go on."
        ) from None
    finally:
        # Whatever ended the loop, no job may go on without it.
        for kind in handlers:
            signal.signal(kind, signal.SIG_IGN)
        pool.end()
        for kind, handler in handlers.items():
            signal.signal(kind, handler)


def status(folder: str) -> str:
    """The table of the sweep of a folder."""
    workdir = pathlib.Path(folder)
    units = progress.load(workdir)
    return progress.table(units, progress.measure(workdir, units))


def main(argv: Sequence[str]) -> int:
    """The program."""
    del argv
    values = flags.FLAGS
    if values.status:
        print(status(values.status))
        return 0
    if not values["config"].present or not values.workdir:
        raise launch.UserError("--config and --workdir are needed, or --status=DIR.")
    config = config_flags.get_config_filename(values["config"])
    if values.trackers:
        launch.chosen("tracker", values.trackers, writers.TRACKERS)
    make_pool = pools.maker(values)
    overrides = config_flags.get_override_values(values["config"])
    if values.dry_run:
        return preview.show(config, values.workdir, overrides)
    return run(
        config,
        values.workdir,
        make_pool,
        Limits(values.retries, 60 * values.time_min, values.memory_gb, values.pack),
        trackers=values.trackers,
        retry_failed=values.retry_failed,
        overrides=overrides,
    )


def _define_flags() -> None:
    config_files.define_config(None)
    flags.DEFINE_string("workdir", None, "Folder of the sweep.")
    flags.DEFINE_string("status", None, "Only say how far the sweep of DIR is.")
    flags.DEFINE_bool("dry_run", False, "Only print the trials and what each will write.")
    flags.DEFINE_enum("executor", "local", ["local", "slurm"], "Where to run.")
    flags.DEFINE_integer(
        "workers", 0, "Trials at a time; 0: one per GPU, else per --cores cores.", 0
    )
    flags.DEFINE_integer("cores", 0, "Cores of a local worker; 0: shared out.", 0)
    flags.DEFINE_integer("retries", 1, "Of a trial that fails.", 0)
    flags.DEFINE_bool("retry_failed", False, "Try again what had failed.")
    flags.DEFINE_float("time_min", 1440.0, "Minutes of one attempt, at most.", 0)
    flags.DEFINE_integer(
        "pack", 16, "Trials that share a process if they share data and shapes, at most.", 1
    )
    flags.DEFINE_float("memory_gb", 0.0, "Memory of a trial; 0: any.", 0)
    writers.define_flag()
    flags.DEFINE_list(
        "slurm", [], "Further settings of submitit's SlurmExecutor, as partition=gpu."
    )


if __name__ == "__main__":
    _define_flags()
    launch.run(main)
