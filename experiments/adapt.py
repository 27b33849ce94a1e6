"""Checkpoint + shifted data + a dict of predictors -> rows.

Usage::

    python -m experiments.adapt --workdir=runs/demo [--config=experiments/configs/digits.py]

Chooses settings on the validation corruptions (``WORKDIR/selection.json``), then evaluates every
method of the config on the clean test split and the 15 corruptions, and appends one row per
(method, domain, severity, seed) to ``WORKDIR/results.jsonl``. Run it again to resume: finished
rows are kept and skipped, failed ones run again.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
import tqdm
from absl import flags

from experiments import (
    journal,
    launch,
    methods as methods_lib,
    problem as problem_lib,
    runner as runner_lib,
    selection,
    writers,
)
from ttt_jax import checkpoint, data


def make_row(
    method: methods_lib.Method,
    settings: dict[str, Any],
    outcome: runner_lib.Outcome,
    source_wrong: np.ndarray,
    probe: dict[str, float],
) -> dict[str, Any]:
    """The measured part of a result row."""
    wrong = outcome.wrong()
    count = len(wrong)
    forwards, backwards = method.cost(settings)
    row: dict[str, Any] = {
        "status": "ok",
        "error": float(wrong.mean()),
        "num_examples": count,
        "num_steps": settings.get("num_steps", 0),
        "scope": method.scope,
        "reset": method.reset,
        "predict": method.predict,
        "seconds": outcome.seconds,
        "compile_seconds": outcome.compile_seconds,
        "samples_per_second": count / outcome.seconds,
        "turned_right": float((source_wrong & ~wrong).mean()),
        "turned_wrong": float((~source_wrong & wrong).mean()),
        "forwards_per_sample": forwards,
        "backwards_per_sample": backwards,
        "non_finite": int((~outcome.ok).sum()),
        "resets": outcome.resets,
        "settings": settings,
    }
    if method.traced:
        by_step = outcome.logits.argmax(-1) != outcome.label[:, None]
        row["error_by_step"] = [float(value) for value in by_step.mean(axis=0)]
    if method.probe is not None and outcome.aux is not None:
        after = outcome.aux[:, -1] if method.traced else outcome.aux
        row["aux_loss_before"] = probe[method.probe]
        row["aux_loss_after"] = float(np.nanmean(after))
    return row


def evaluate(
    results: journal.Journal,
    methods: dict[str, methods_lib.Method],
    baseline: methods_lib.Method,
    chosen: dict[str, dict[str, Any]],
    runner: runner_lib.Runner,
    source: data.Source,
    fields: dict[str, Any],
    domains: Sequence[tuple[str, int]],
    writer: writers.Writer,
) -> None:
    """Adds the missing rows of one seed and split role; a failing trial becomes a failed row."""
    progress = tqdm.tqdm(
        total=len(domains) * len(methods),
        desc=f"{fields['split_role']} seed {fields['seed']}",
        disable=not sys.stderr.isatty(),
    )
    for domain, severity in domains:
        trial = {**fields, "dataset": source.name, "domain": domain, "severity": severity}
        missing = []
        for name in methods:
            row = results.get(method=name, **trial)
            if row is None:
                missing.append(name)
            elif row["checkpoint"] != fields["checkpoint"]:
                raise launch.UserError(
                    f"{results.path} has rows of another checkpoint ({row['checkpoint']}, now "
                    f"{fields['checkpoint']}). Use another --workdir, or remove the file."
                )
        progress.update(len(methods) - len(missing))
        if not missing:
            continue
        batches = runner.batches(source, domain, severity)
        source_wrong = runner.run("source", baseline, {}, batches).wrong()
        probe = runner.probe(batches)
        for name in missing:
            row = {"method": name, **trial}
            try:
                outcome = runner.run(name, methods[name], chosen[name], batches)
                row |= make_row(methods[name], chosen[name], outcome, source_wrong, probe)
            except runner_lib.TRIAL_ERRORS as error:
                row |= {"status": "failed", "message": f"{type(error).__name__}: {error}"[:500]}
            results.add(row)
            if row["status"] == "ok":
                scalars = {f"{fields['split_role']}/{name}/{domain}": row["error"]}
                writer.scalars(fields["seed"], scalars)
            progress.update()
            progress.set_postfix_str(f"{domain} {name}")
    progress.close()


def run(
    config: ml_collections.ConfigDict,
    folder: str,
    *,
    restore: str = "memory",
    checkpoint_path: str | None = None,
    tensorboard: bool = False,
) -> int:
    """Adapts every seed of a config; returns the exit status, 1 if any trial failed.

    Args:
      config: see ``experiments/configs``.
      folder: the work folder.
      restore: how the pristine parameters come back between batches: ``memory``,
        ``fingerprint`` or ``orbax``.
      checkpoint_path: a checkpoint for all seeds; None takes the folder's own.
      tensorboard: whether to write TensorBoard events too.
    """
    workdir = launch.open_workdir(folder)
    with launch.locked(workdir):
        return _run(config, workdir, restore, checkpoint_path, tensorboard)


def _run(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    restore: str,
    checkpoint_path: str | None,
    tensorboard: bool,
) -> int:
    launch.claim(workdir, config)
    results = journal.Journal(workdir / "results.jsonl")
    test = problem_lib.load_data(config, "test")
    validation = problem_lib.load_data(config, "validation")
    problem = problem_lib.build(config, test)
    plain = problem_lib.build(config, test, shared_kernels=True)
    methods = methods_lib.build(config, problem, plain)
    baseline = methods_lib.baseline(plain)
    severity = config.adapt.severity
    checked = [(name, severity) for name in data.corruptions.VALIDATION_CORRUPTIONS]
    reported = [("clean", 0)] + [(name, severity) for name in data.corruptions.CORRUPTIONS]
    roles = (("validation", validation, checked), ("reported", test, reported))
    with writers.open_writer(workdir, tensorboard=tensorboard) as writer:
        for seed in config.seeds:
            path = checkpoint_path or problem_lib.checkpoint_path(workdir, seed)
            pristine = problem_lib.load_checkpoint(path, problem, config)
            runner = runner_lib.Runner(config, plain, pristine, seed=seed, restore=restore)
            chosen = selection.choose(
                workdir / "selection.json", methods, runner, validation, severity
            )
            for role, source, domains in roles:
                fields = {"seed": seed, "split_role": role, "checkpoint": pristine.fingerprint}
                evaluate(
                    results, methods, baseline, chosen, runner, source, fields, domains, writer
                )
    print(f"{len(results.rows())} rows in {results.path}, {len(results.failed)} failed trials")
    for row in results.failed:
        print(f"failed: {row['method']} on {row['domain']}: {row['message']}", file=sys.stderr)
    return 1 if results.failed else 0


def main(argv: Sequence[str]) -> int:
    """The program."""
    del argv
    return run(
        _CONFIG.value,
        _WORKDIR.value,
        restore=_RESTORE.value,
        checkpoint_path=_CHECKPOINT.value,
        tensorboard=_TENSORBOARD.value,
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
    _TENSORBOARD = flags.DEFINE_bool("tensorboard", False, "Also write TensorBoard events.")
    launch.run(main)
