"""Checkpoint + a task's streams + the methods of a config -> rows.

Usage::

    python -m experiments.adapt --workdir=runs/demo [--config=experiments/configs/digits.py]

Chooses settings on the validation streams (``WORKDIR/selection.json``), then evaluates every method
of the config on the validation and the reported streams of its task. Appends one row per method,
stream, combination of tags and seed to ``WORKDIR/results.jsonl``. Run it again to resume: finished
rows are kept and skipped, failed ones run again.

It uses all devices of its process. Several processes, on any machines that see the folder, share
the work with ``--shard=i/N``: each takes every N-th pair of a method and a stream, and appends to a
file of its own, ``results.i-of-N.jsonl``. No process waits for another one's rows. A run without
``--shard`` makes what is missing, and one file of all rows.
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from absl import flags

from experiments import (
    config_check,
    config_files,
    journal,
    launch,
    pristine as pristine_lib,
    provenance,
    result_rows,
    seed_run,
    settings,
    tasks,
    writers,
)
from ttt_jax import checkpoint


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
    shard: journal.Shard = journal.WHOLE,
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
      shard: which of the processes that share the folder this one is.

    Raises:
      UserError: a config that cannot be run, a part that there is not, or a work folder that is
        not fit.
    """
    config_check.check(config)
    config_check.check_domains(config, part.domains)
    workdir = launch.open_workdir(folder)
    with journal.locked(workdir, shard):
        paths = pristine_lib.paths(workdir, config.seeds, checkpoint_path)
        task = tasks.build(config)
        candidates = settings.candidates(config, task)
        if part.methods:
            wanted = launch.chosen("method", part.methods, candidates)
            candidates = {label: candidates[label] for label in candidates if label in wanted}
        mesh = mesh_of(devices)
        # Once all is checked: a config that cannot be run must not keep the folder.
        count = 1 if mesh is None else mesh.size
        with launch.locked(workdir, ".lock.run", wait=True):
            data = tasks.at_hand(config)
            provenance.claim(workdir, config, data, devices=count, shards=shard.count)
        results = journal.Journal(workdir / "results.jsonl", shard=shard)
        with writers.open_writer(workdir, trackers) as writer:
            for seed in config.seeds:
                sharding = None
                if mesh is not None:
                    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
                held = pristine_lib.load(paths[seed], task, config, sharding=sharding)
                model = seed_run.SeedRun(config, task, held, seed, restore, mesh, workdir, shard)
                chosen = model.choose(workdir / "selection.json", candidates)
                for role in ("validation", "reported"):
                    model.evaluate(role, chosen, part.domains, results, writer)
    return _summary(results, shard)


def _summary(results: journal.Journal, shard: journal.Shard) -> int:
    of_all = "" if shard == journal.WHOLE else " and the files of other shards"
    print(f"{len(results.rows())} rows in {results.path}{of_all}, {len(results.failed)} failed")
    for line in result_rows.not_adapted(results.rows()):
        print(line, file=sys.stderr)
    for row in results.failed:
        print(f"failed: {row['method']} on {row['stream']}: {row['message']}", file=sys.stderr)
    return 1 if results.failed else 0


def main(argv: Sequence[str]) -> int:
    """The program."""
    del argv
    part = Part(launch.given("methods", _METHODS.value), launch.given("domains", _DOMAINS.value))
    return run(
        _CONFIG.value,
        _WORKDIR.value,
        restore=_RESTORE.value,
        checkpoint_path=_CHECKPOINT.value,
        trackers=_TRACKERS.value,
        part=part,
        devices=_DEVICES.value,
        shard=journal.shard(_SHARD.value),
    )


if __name__ == "__main__":
    _CONFIG, _WORKDIR = config_files.define_flags()
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
    _SHARD = journal.define_flag()
    launch.run(main)
