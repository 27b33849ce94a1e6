"""Joint training of a task's model: its main loss, and an auxiliary one to adapt with.

Usage::

    python -m experiments.train --workdir=runs/demo [--config=experiments/configs/digits.py]

Trains one model per seed of the config and saves it, with its constants and configuration, under
``WORKDIR/checkpoints/seed_K``. Run it again to resume: finished seeds are skipped, an interrupted
one continues from its last saved step.
"""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import optax
import tqdm

from experiments import (
    config_check,
    config_files,
    launch,
    pristine,
    provenance,
    settings,
    tasks,
    writers,
)
from ttt_jax import checkpoint, evaluation, training, tuning
from ttt_jax.task import Task


def check(config: ml_collections.ConfigDict, task: Task) -> None:
    """Refuses a config that cannot be trained.

    Raises:
      ValueError: an unknown ``train.aux``, ``train.schedule`` or ``train.optimizer``, a
        ``train.main_select`` that no parameter matches or that leaves parameters untrained, a
        ``train.warmup_steps`` that is not shorter than the training, or a model with BatchNorm
        without ``train.statistics_momentum``.
    """
    # Needed at the end of the training: a split that is missing is said now.
    task.streams("validation", config.seeds[0])
    if "follow" in task.heads() and "statistics_momentum" not in config.train:
        raise ValueError(
            "the config lacks train.statistics_momentum, which a model with BatchNorm needs; add "
            "it, such as 0.95."
        )
    auxiliary = settings.auxiliary(config, task)
    _check_main_select(launch.setting(config, "train.main_select"), auxiliary, task)
    settings.training_optimizer(config)


def _check_main_select(chosen: Any, auxiliary: Any, task: Task) -> None:
    if chosen == "all":
        return
    if not isinstance(chosen, str):
        raise ValueError(
            "train.main_select must be 'all' or a pattern of parameters such as 'params/head.*'; "
            f"got {chosen!r}."
        )
    if auxiliary is None:
        raise ValueError(
            f"train.main_select={chosen!r} leaves the other parameters to an auxiliary task; got "
            "train.aux='none'. Set train.aux, or train.main_select='all'."
        )
    try:
        settings.selection(chosen).split(pristine.layout(task))
    except ValueError as error:
        raise ValueError(f"train.main_select: {error}") from error


def make_step(
    config: ml_collections.ConfigDict, task: Task, optim: optax.GradientTransformation
) -> training.Step:
    """The training step of a config."""
    chosen = launch.setting(config, "train.main_select")
    return training.make_step(
        task,
        optim,
        auxiliary=settings.auxiliary(config, task),
        main_select=None if chosen == "all" else settings.selection(chosen),
        follow=task.heads().get("follow"),
    )


def train(
    config: ml_collections.ConfigDict,
    task: Task,
    workdir: pathlib.Path,
    seed: int,
    writer: writers.Writer,
) -> pathlib.Path:
    """Trains one seed, resuming what is there; returns the path of its checkpoint."""
    target = pristine.path_of(workdir, seed)
    if target.exists():
        print(f"seed {seed}: {target} is already trained")
        return target
    optim = settings.training_optimizer(config)
    # Compiled, a pretrained model's parameters would be constants of the program.
    pretrained = config.train.num_steps == 0
    params = (task.init if pretrained else jax.jit(task.init))(jax.random.key(seed))
    saved = checkpoint.Saves(workdir / "training" / f"seed_{seed}")
    start, state = saved.load((params, optim.init(training.learned(params))))
    total, every = config.train.num_steps, (config.train.log_every, config.train.save_every)
    bar = tqdm.tqdm(desc=f"train seed {seed}", initial=start, total=total, disable=None)
    blocks = training.blocks(
        make_step(config, task, optim),
        state,
        task.training(seed),
        key=jax.random.key(seed),
        start=start,
        total=total,
        steps_per_call=launch.setting(config, "train.steps_per_call"),
        stops=every,
    )
    for done, state, parts in blocks:
        bar.update(done - bar.n)
        logged, saving = done % every[0] == 0, done % every[1] == 0
        if logged or saving or done == total:
            losses = {name: float(value) for name, value in parts.items()}
            _require_finite(losses, done)
        if logged or done == total:
            named = {f"train/{name}_loss": loss for name, loss in losses.items()}
            writer.scalars(done, named, seed)
            bar.set_postfix({name: f"{loss:.3f}" for name, loss in losses.items()})
        if saving and done < total:
            saved.save(done, state)
    score = validation(task, state[0], seed)
    metadata = pristine.metadata(config) | {
        "seed": seed,
        "aux": launch.setting(config, "train.aux"),
        "num_steps": config.train.num_steps,
        f"validation_{task.chooses}": score,
    }
    checkpoint.save(target, state[0], metadata=metadata)
    saved.remove()
    what = "pretrained, nothing to train; " if pretrained else ""
    print(f"seed {seed}: {what}validation {task.chooses} {score:.4f}, saved {target}")
    return target


def validation(task: Task, params: Any, seed: int) -> float:
    """Mean of the metric that chooses over the validation streams, unadapted."""
    run = evaluation.Evaluation(task, params, role="validation", seed=seed)
    return tuning.tried(run, task, "source", evaluation.source_of(task)).scores[task.chooses]


def _require_finite(losses: dict[str, float], done: int) -> None:
    """Ends a training that diverged, before its state is saved.

    Raises:
      UserError: naming the losses.
    """
    if not all(map(math.isfinite, losses.values())):
        shown = ", ".join(f"{name} {loss}" for name, loss in losses.items())
        raise launch.UserError(
            f"the training diverged: after step {done} the losses are {shown}. Lower "
            "train.learning_rate, in another --workdir if this one has saved states."
        )


def run(config: ml_collections.ConfigDict, folder: str, *, trackers: Sequence[str] = ()) -> None:
    """Trains every seed of a config that has no checkpoint yet."""
    # Before the folder is claimed: a config that cannot be trained must not keep it.
    config_check.check(config, adapts=False)
    task = tasks.build(config)
    check(config, task)
    data = tasks.at_hand(config)
    workdir = launch.open_workdir(folder)
    with launch.locked(workdir), writers.open_writer(workdir, trackers) as writer:
        provenance.claim(workdir, config, data)
        for seed in config.seeds:
            train(config, task, workdir, seed, writer)


def main(argv: Sequence[str]) -> None:
    """The program."""
    del argv
    run(_CONFIG.value, _WORKDIR.value, trackers=_TRACKERS.value)


if __name__ == "__main__":
    _CONFIG, _WORKDIR = config_files.define_flags()
    _TRACKERS = writers.define_flag()
    launch.run(main)
