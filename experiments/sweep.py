"""Many trials of one config file, in parallel, safe to kill at any moment.

Usage::

    python -m experiments.sweep --config=experiments/configs/digits_sweep.py --workdir=DIR
    python -m experiments.sweep --status=DIR

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
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from experiments import launch, trial as trial_lib, writers
from experiments.sweeping import (
    collect,
    job as job_lib,
    plan,
    pools,
    progress as progress_lib,
    state as state_lib,
)

_POLL_S = 0.3
_SHOW_EVERY_S = 1.0
_LOG_EVERY_S = 30.0
# Of one unit, in one run of the sweep: something kills it, such as the system for its memory.
_MOST_INTERRUPTIONS = 20
_SLURM_WORKERS = 256
_CANCEL_S = 10.0


class Limits(NamedTuple):
    """On one unit.

    Attributes:
      retries: how often one that failed is tried again.
      time_s: seconds of one attempt.
      memory_gb: resident memory of a process; 0 for no limit.
      pack: how many trials one process runs in turn, at most.
      trackers: where scalars go beside the folders of the units.
    """

    retries: int = 1
    time_s: float = 86400.0
    memory_gb: float = 0.0
    pack: int = 16
    trackers: Sequence[str] = ()


def packed(ready: Sequence[plan.Unit], room: int, workers: int, most: int) -> list[list[plan.Unit]]:
    """Shares units out over at most ``room`` processes.

    Only trials of the same pack share one, at most ``most``, and no more than an even share of all
    workers. Models have one each: they take long.
    """
    groups: dict[str, list[plan.Unit]] = {}
    for unit in ready:
        groups.setdefault(unit.pack or unit.id, []).append(unit)
    packs = []
    for group in groups.values():
        each = min(most, max(1, -(-len(group) // workers)))
        packs += [group[first : first + each] for first in range(0, len(group), each)]
    return packs[:room]


class _Interrupted(Exception):
    """The sweep was told to stop."""


class _Pack(NamedTuple):
    """Units that one job runs, and how they stood when it was submitted."""

    units: Sequence[plan.Unit]
    before: Sequence[state_lib.State]
    handle: pools.Handle


class _Sweep:
    """Submits what is ready, notices what ended, until all is done or has failed."""

    def __init__(
        self,
        config: str,
        workdir: pathlib.Path,
        units: Sequence[plan.Unit],
        pool: pools.Pool,
        limits: Limits,
    ):
        self._config, self._workdir, self._units = config, workdir, units
        self._pool, self._limits = pool, limits
        self._packs: list[_Pack] = []
        # What no job of this run can be at work on waits: it was interrupted.
        for unit in units:
            state = self._state(unit)
            if state.state == "running":
                self._write(unit, state, "interrupted", "the sweep ended")
            elif state.state == "blocked":
                state_lib.write(unit.folder(workdir), state._replace(state="waiting"))
        self._interrupted = {unit.id: self._state(unit).interruptions for unit in units}
        self._known = {unit.id: self._state(unit) for unit in units}

    def _state(self, unit: plan.Unit) -> state_lib.State:
        return state_lib.read(unit.folder(self._workdir))

    def states(self) -> dict[str, state_lib.State]:
        """The states of all units by id, in their order; those at work are read anew."""
        for pack in self._packs:
            self._known.update((unit.id, self._state(unit)) for unit in pack.units)
        return self._known

    def _write(self, unit: plan.Unit, state: state_lib.State, outcome: str, message: str) -> None:
        state = state_lib.ended(state, outcome, message, self._limits.retries)
        state_lib.write(unit.folder(self._workdir), state)

    def step(self) -> bool:
        """One round; whether anything is left to do.

        Raises:
          UserError: a unit met something that no other attempt would mend.
        """
        for pack in [pack for pack in self._packs if not pack.handle.alive()]:
            self._packs.remove(pack)
            self._settle(pack)
            self._known.update((unit.id, self._state(unit)) for unit in pack.units)
        states = self.states()
        for state in states.values():
            if state.state == "blocked":
                raise launch.UserError(state.message)
        at_work = {unit.id for pack in self._packs for unit in pack.units}
        ready = [
            unit
            for unit in self._units
            if unit.id not in at_work
            and states[unit.id].state == "waiting"
            and (unit.needs is None or states[unit.needs].state == "done")
        ]
        if ready and (room := self._pool.room()):
            some = packed(ready, room, self._pool.size, self._limits.pack)
            handles = self._pool.submit([self._job(units) for units in some])
            for units, handle in zip(some, handles, strict=True):
                before = [states[unit.id] for unit in units]
                self._packs.append(_Pack(units, before, handle))
        lost = {unit.id for unit in self._units if states[unit.id].state == "failed"}
        return bool(self._packs) or any(
            states[unit.id].state != "done" and unit.id not in lost and unit.needs not in lost
            for unit in self._units
        )

    def _settle(self, pack: _Pack) -> None:
        """Writes the states that a job which is gone could not."""
        after = [self._state(unit) for unit in pack.units]
        open_ = [n for n, state in enumerate(after) if state.state == "running"]
        if after == pack.before:
            # It never came to a unit: the first one stands for what is wrong.
            open_ = [n for n, state in enumerate(after) if state.state == "waiting"][:1]
        for n in open_:
            state = after[n] if after[n].state == "running" else state_lib.begun(after[n])
            self._write(pack.units[n], state, "interrupted", "its job was killed")
        for unit in pack.units:
            state = self._state(unit)
            killed = state.interruptions - self._interrupted[unit.id]
            if state.state == "waiting" and killed > _MOST_INTERRUPTIONS:
                message = f"killed {killed} times: {state.message}"
                state = state._replace(state="failed", message=message)
                state_lib.write(unit.folder(self._workdir), state)

    def _job(self, units: Sequence[plan.Unit]) -> job_lib.Job:
        retries, ids = self._limits.retries, [unit.id for unit in units]
        workdir = str(self._workdir)
        # Trials of one shape share their compiled programs.
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(self._workdir / "compiled"))
        return job_lib.Job(
            command=trial_lib.command(
                sys.executable, self._config, workdir, ids, retries, self._limits.trackers
            ),
            folders=[str(unit.folder(self._workdir)) for unit in units],
            environment={"JAX_COMPILATION_CACHE_DIR": cache},
            cores=(),
            owner=None,
            retries=retries,
            time_limit_s=self._limits.time_s,
            memory_limit_gb=self._limits.memory_gb,
        )

    def cancel(self) -> None:
        """Tells every job to stop, and waits a little for them."""
        for pack in self._packs:
            pack.handle.cancel()
        last = time.monotonic() + _CANCEL_S
        while time.monotonic() < last and any(pack.handle.alive() for pack in self._packs):
            time.sleep(0.1)


def run(
    config: str,
    folder: str,
    make_pool: Any,
    limits: Limits = Limits(),  # noqa: B008 (immutable)
    *,
    retry_failed: bool = False,
) -> int:
    """Runs a sweep to its end; returns the exit status, 1 if a trial failed.

    Args:
      config: path of the config file.
      folder: the folder of the sweep.
      make_pool: ``make_pool(folder)`` makes what runs the jobs, and keeps its files there.
      limits: on every unit.
      retry_failed: try again what failed for good in an earlier run.

    Raises:
      UserError: a config without trials, or a folder that another sweep uses or that cannot be
        written.
    """
    workdir = launch.open_workdir(folder).resolve()
    with launch.locked(workdir):
        units = plan.units(plan.variants(config))
        progress_lib.save(workdir, units)
        if retry_failed:
            for unit in units:
                if state_lib.read(unit.folder(workdir)).state == "failed":
                    state_lib.write(unit.folder(workdir), state_lib.State())
        trials = sum(unit.kind == "trial" for unit in units)
        before = progress_lib.measure(workdir, units).counts
        if collect.up_to_date(workdir, units):
            print(f"nothing to do: all {trials} trials are finished; {workdir / collect.TABLE}")
            return 0
        sweep = _Sweep(
            str(pathlib.Path(config).resolve()), workdir, units, make_pool(workdir / "jobs"), limits
        )
        if before["done"] or before["failed"]:
            print(f"{before['done']} of {trials} trials are finished, {before['failed']} failed")
        _loop(sweep, units)
        path = collect.write(workdir, collect.rows(workdir, units))
        counts = progress_lib.measure(workdir, units).counts
    print(f"{counts['done']} of {trials} trials done, {counts['failed']} failed; {path}")
    return 0 if counts["done"] == trials else 1


def _loop(sweep: _Sweep, units: Sequence[plan.Unit]) -> None:
    def stop(*_: object) -> None:
        raise _Interrupted

    live = sys.stdout.isatty()
    shown, lines = 0.0, 0
    handlers = {kind: signal.signal(kind, stop) for kind in (signal.SIGTERM, signal.SIGINT)}
    try:
        while sweep.step():
            if time.monotonic() - shown > (_SHOW_EVERY_S if live else _LOG_EVERY_S):
                shown = time.monotonic()
                measured = progress_lib.summarized(units, list(sweep.states().values()))
                columns = shutil.get_terminal_size().columns if live else None
                text = progress_lib.table(units, measured, columns)
                if live and lines:
                    print(f"\x1b[{lines}A\x1b[J", end="")
                print(text, flush=True)
                lines = text.count("\n") + 1
            time.sleep(_POLL_S)
    except _Interrupted:
        raise launch.UserError(
            "the sweep was told to stop; what is finished is kept. Run the same command to go on."
        ) from None
    finally:
        # Whatever ended the loop, no job may go on without it.
        for kind in handlers:
            signal.signal(kind, signal.SIG_IGN)
        sweep.cancel()
        for kind, handler in handlers.items():
            signal.signal(kind, handler)


def status(folder: str) -> str:
    """The table of the sweep of a folder."""
    workdir = pathlib.Path(folder)
    units = progress_lib.load(workdir)
    return progress_lib.table(units, progress_lib.measure(workdir, units))


def _pool_maker(values: Mapping[str, Any]) -> Any:
    if values["executor"] == "slurm":
        parameters = {
            "time": int(values["time_min"] * 1.1) + 5,
            "array_parallelism": values["workers"] or _SLURM_WORKERS,
        }
        for pair in values["slurm"]:
            name, _, value = pair.partition("=")
            if not name or not value:
                raise launch.UserError(f"--slurm takes name=value; got {pair!r}.")
            parameters[name] = int(value) if value.isdigit() else value
        return lambda folder: pools.SlurmPool(folder, parameters)
    found = pools.workers(values["workers"], values["cores"], pools.visible_gpus())
    return lambda folder: pools.LocalPool(folder, found)


def main(argv: Sequence[str]) -> int:
    """The program."""
    del argv
    values = {name: holder.value for name, holder in _FLAGS.items()}
    if values["status"]:
        print(status(values["status"]))
        return 0
    if not values["config"] or not values["workdir"]:
        raise launch.UserError("--config and --workdir are needed, or --status=DIR.")
    if values["trackers"]:
        launch.chosen("tracker", values["trackers"], writers.TRACKERS)
    limits = Limits(
        values["retries"],
        60 * values["time_min"],
        values["memory_gb"],
        values["pack"],
        values["trackers"],
    )
    return run(
        values["config"],
        values["workdir"],
        _pool_maker(values),
        limits,
        retry_failed=values["retry_failed"],
    )


if __name__ == "__main__":
    _FLAGS = {
        "config": flags.DEFINE_string("config", None, "Config file with sweep(add)."),
        "workdir": flags.DEFINE_string("workdir", None, "Folder of the sweep."),
        "status": flags.DEFINE_string("status", None, "Only say how far the sweep of DIR is."),
        "executor": flags.DEFINE_enum("executor", "local", ["local", "slurm"], "Where to run."),
        "workers": flags.DEFINE_integer(
            "workers", 0, "Trials at a time; 0: one per GPU, else per --cores cores.", 0
        ),
        "cores": flags.DEFINE_integer("cores", 0, "Cores of a local worker; 0: shared out.", 0),
        "retries": flags.DEFINE_integer("retries", 1, "Of a trial that fails.", 0),
        "retry_failed": flags.DEFINE_bool("retry_failed", False, "Try again what had failed."),
        "time_min": flags.DEFINE_float("time_min", 1440.0, "Minutes of one attempt, at most.", 0),
        "pack": flags.DEFINE_integer(
            "pack", 16, "Trials that share a process if they share data and shapes, at most.", 1
        ),
        "memory_gb": flags.DEFINE_float("memory_gb", 0.0, "Memory of a trial; 0: any.", 0),
        "trackers": writers.define_flag(),
        "slurm": flags.DEFINE_list(
            "slurm", [], "Further settings of submitit's SlurmExecutor, as partition=gpu."
        ),
    }
    launch.run(main)
