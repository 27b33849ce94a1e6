"""Joint training of the main and an auxiliary task: rotation, mae, contrastive or none.

Usage::

    python -m experiments.train --workdir=runs/demo [--config=experiments/configs/digits.py]

Trains one model per seed of the config and saves it, with its normalisation constants and
configuration, under ``WORKDIR/checkpoints/seed_K``. Run it again to resume: finished seeds are
skipped, an interrupted one continues from its last saved step.
"""

import functools
import math
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import tqdm

import ttt_jax as ttt
from experiments import auxiliary, launch, problem as problem_lib, provenance, writers
from experiments.methods import steps as steps_lib
from ttt_jax import checkpoint, data, models

SCHEDULES = ("cosine", "step")
OPTIMIZERS = ("sgd", "adamw")
_COUNTS = ("num_steps", "batch_size", "log_every", "save_every")


def optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """The optimizer, the weight decay and the schedule of a config."""
    train = config.train
    warmup = launch.setting(config, "train.warmup_steps")
    steps = train.num_steps - warmup
    if launch.setting(config, "train.schedule") == "cosine":
        rate = optax.cosine_decay_schedule(train.learning_rate, steps)
    else:
        # A tenth at 1/2 and at 5/6 of the training: epochs 75 and 125 of 150 (Sun et al. 2020).
        rate = optax.piecewise_constant_schedule(
            train.learning_rate, {steps // 2: 0.1, steps * 5 // 6: 0.1}
        )
    if warmup:
        climb = optax.linear_schedule(0.0, train.learning_rate, warmup)
        rate = optax.join_schedules([climb, rate], [warmup])
    if launch.setting(config, "train.optimizer") == "adamw":
        # As for the MAE of He et al. 2022: the second moment forgets faster than by default, and
        # only matrices decay.
        return optax.adamw(
            rate,
            b2=0.95,
            weight_decay=train.weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        )
    return optax.chain(
        optax.add_decayed_weights(train.weight_decay), optax.sgd(rate, momentum=train.momentum)
    )


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses a config that cannot be trained.

    Raises:
      ValueError: an unknown ``train.aux``, ``train.schedule`` or ``train.optimizer``, a
        ``train.main_select`` that no parameter matches or that leaves parameters untrained, a
        ``train.warmup_steps`` that is not shorter than the training, or fewer than one of
        ``train.num_steps``, ``train.batch_size``, ``train.log_every``, ``train.save_every`` or
        ``train.steps_per_call``.
      UserError: impossible seeds.
    """
    launch.check_seeds(config)
    counts = {name: config.train[name] for name in _COUNTS}
    counts["steps_per_call"] = launch.setting(config, "train.steps_per_call")
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"train.{name} must be at least 1; got {count}.")
    task = auxiliary.name_of(config)
    _check_main_select(launch.setting(config, "train.main_select"), task, config)
    for key, known in (("train.schedule", SCHEDULES), ("train.optimizer", OPTIMIZERS)):
        if (name := launch.setting(config, key)) not in known:
            raise ValueError(f"{key} must be one of {list(known)}; got {name!r}.")
    warmup = launch.setting(config, "train.warmup_steps")
    if not 0 <= warmup < config.train.num_steps:
        raise ValueError(
            f"train.warmup_steps must lie between 0 and the {config.train.num_steps} of "
            f"train.num_steps; got {warmup}."
        )


def _check_main_select(chosen: Any, task: str, config: ml_collections.ConfigDict) -> None:
    if chosen == "all":
        return
    if not isinstance(chosen, str):
        raise ValueError(
            "train.main_select must be 'all' or a pattern of parameters such as 'params/head.*'; "
            f"got {chosen!r}."
        )
    if task == "none":
        raise ValueError(
            f"train.main_select={chosen!r} leaves the other parameters to an auxiliary task; got "
            "train.aux='none'. Set train.aux, or train.main_select='all'."
        )
    source = problem_lib.load_data(config, "train", whole=False)
    shapes = problem_lib.shapes(problem_lib.build(config, source))
    try:
        steps_lib.selection({"select": chosen}).split(shapes)
    except ValueError as error:
        raise ValueError(f"train.main_select: {error}") from error


def make_step(problem: problem_lib.Problem, config: ml_collections.ConfigDict) -> Any:
    """The training step ``(variables, opt_state, images, labels, key) -> ...`` and its optimizer.

    Minimises cross-entropy plus ``aux_weight`` times the loss of the auxiliary task on the same
    augmented batch (Sun et al. 2020, Eq. 2); its third output holds both, by name. Cross-entropy
    has a gradient in the parameters of ``train.main_select`` alone.
    """
    task = auxiliary.name_of(config)
    optim = optimizer(config)
    chosen = launch.setting(config, "train.main_select")
    learning = None if chosen == "all" else steps_lib.selection({"select": chosen})
    config = config.train
    batch_norm = problem_lib.has_batch_norm(problem)
    model = problem.model("batch" if batch_norm else "running")
    aux = auxiliary.training_loss(task, problem, model)

    def losses(variables: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> Any:
        view_key, aux_key = jax.random.split(key)
        views = jax.vmap(problem.view)(images, jax.random.split(view_key, len(labels)))
        held = variables
        if learning is not None:
            fast, frozen = learning.split(variables)
            held = learning.merge(fast, jax.lax.stop_gradient(frozen))
        logits = model.classify(held, views)
        main = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        if aux is None:
            return main, (views, {"main": main})
        auxiliary_loss = aux(variables, views, aux_key)
        parts = {"main": main, task: auxiliary_loss}
        return main + config.aux_weight * auxiliary_loss, (views, parts)

    def with_statistics(variables: Any, views: jax.Array, key: jax.Array) -> Any:
        """Running statistics follow the batch: of the views, then of their four rotations."""
        passes = [(None, views)]
        if task == "rotation":
            turned = jnp.concatenate([jnp.rot90(views, k, (1, 2)) for k in range(4)])
            passes.append(("rotation", turned))
        for method, images in passes:
            collect = models.linen_statistics(problem.module, method)
            follow = ttt.statistics_adapter(collect, momentum=config.statistics_momentum)
            state = follow.init(variables)
            state, _ = follow.step(variables, state, problem.normalize(images), key)
            variables = follow.merge(variables, state)
        return variables

    def step(variables: Any, opt_state: Any, images: Any, labels: Any, key: Any) -> Any:
        grads, (views, parts) = jax.grad(losses, has_aux=True)(variables, images, labels, key)
        updates, opt_state = optim.update(grads["params"], opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        variables = {**variables, "params": params}
        if batch_norm:
            variables = with_statistics(variables, views, key)
        return variables, opt_state, parts

    return step, optim


class _SavedState:
    """The training state on disk: the newest complete save, older ones removed after it."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder

    def _saves(self) -> list[tuple[int, pathlib.Path]]:
        if not self._folder.is_dir():
            return []
        found = [path for path in self._folder.iterdir() if path.name.startswith("step_")]
        return sorted((int(path.name.removeprefix("step_")), path) for path in found)

    def load(self, like: Any) -> tuple[int, Any]:
        """The newest state that reads back whole, or step 0 and ``like``."""
        for step, path in reversed(self._saves()):
            try:
                return step, checkpoint.load(path, like=like).params
            except checkpoint.CheckpointError as error:
                print(f"training state {path} is not usable, trying an older one: {error}")
        return 0, like

    def save(self, step: int, state: Any) -> None:
        older = self._saves()
        checkpoint.save(self._folder / f"step_{step}", state)
        for _, path in older:
            shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


Blocks = Iterator[tuple[int, Any, dict[str, jax.Array]]]
"""After each block of steps: how many are done, the state, and the losses of the last step."""


def _one_by_one(
    step: Any, state: Any, source: data.Source, config: Any, seed: int, start: int
) -> Blocks:
    """A call per step, on a batch that the host reads."""
    run, root = jax.jit(step), jax.random.key(seed)
    size = config.train.batch_size
    batches = data.training_batches(source, batch_size=size, seed=seed, start_step=start)
    for done in range(start, config.train.num_steps):
        batch = next(batches)
        key = jax.random.fold_in(root, done)
        *state, parts = run(*state, batch.image, batch.label, key)
        yield done + 1, tuple(state), parts


def _many_per_call(
    step: Any, state: Any, source: data.Source, config: Any, seed: int, start: int
) -> Blocks:
    """The training set lies on the device and a call makes many steps: the host hands over places.

    A call ends where something is logged or saved.
    """
    train, root = config.train, jax.random.key(seed)
    most = launch.setting(config, "train.steps_per_call")
    block = math.gcd(train.log_every, train.save_every, train.num_steps)
    block = max(k for k in range(1, min(most, block) + 1) if block % k == 0)
    everything = source.take(np.arange(len(source)))
    pictures, labels = jnp.asarray(everything.image), jnp.asarray(everything.label)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state: Any, pictures: Any, labels: Any, places: Any, steps: Any) -> Any:
        def body(state: Any, turn: Any) -> Any:
            where, number = turn
            key = jax.random.fold_in(root, number)
            *state, parts = step(*state, pictures[where], labels[where], key)
            return tuple(state), parts

        state, parts = jax.lax.scan(body, state, (places, steps))
        return state, jax.tree.map(lambda leaf: leaf[-1], parts)

    order = data.training_places(source, batch_size=train.batch_size, seed=seed, start_step=start)
    for first in range(start, train.num_steps, block):
        places = np.stack([next(order) for _ in range(block)])
        state, parts = run(state, pictures, labels, places, np.arange(first, first + block))
        yield first + block, state, parts


def train(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, seed: int, writer: writers.Writer
) -> pathlib.Path:
    """Trains one seed, resuming what is there; returns the path of its checkpoint."""
    target = problem_lib.checkpoint_path(workdir, seed)
    if target.exists():
        print(f"seed {seed}: {target} is already trained")
        return target
    source = problem_lib.load_data(config, "train")
    problem = problem_lib.build(config, source, shared_kernels=True)
    step, optim = make_step(problem, config)
    variables = problem_lib.initial(problem, seed)
    saved = _SavedState(workdir / "training" / f"seed_{seed}")
    start, begun = saved.load((variables, optim.init(variables["params"])))
    variables = begun[0]
    total = config.train.num_steps
    feed: Callable[..., Blocks] = _one_by_one
    if launch.setting(config, "train.steps_per_call") > 1:
        feed = _many_per_call
    progress = tqdm.tqdm(
        desc=f"train seed {seed}", initial=start, total=total, disable=not sys.stderr.isatty()
    )
    for done, state, parts in feed(step, begun, source, config, seed, start):
        progress.update(done - progress.n)
        logged, saving = done % config.train.log_every == 0, done % config.train.save_every == 0
        if logged or saving or done == total:
            losses = {name: float(value) for name, value in parts.items()}
            _require_finite(losses, done)
        if logged or done == total:
            writer.scalars(done, {f"train/{name}_loss": loss for name, loss in losses.items()})
            progress.set_postfix({name: f"{loss:.3f}" for name, loss in losses.items()})
        if saving and done < total:
            saved.save(done, state)
        variables = state[0]
    accuracy = _accuracy(problem, variables, problem_lib.load_data(config, "validation"))
    metadata = problem_lib.checkpoint_metadata(config) | {
        "seed": seed,
        "aux": auxiliary.name_of(config),
        "num_steps": config.train.num_steps,
        "validation_accuracy": accuracy,
    }
    checkpoint.save(target, variables, metadata=metadata)
    saved.remove()
    print(f"seed {seed}: validation accuracy {accuracy:.4f}, saved {target}")
    return target


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


def _accuracy(problem: problem_lib.Problem, variables: Any, source: data.Source) -> float:
    apply = jax.jit(problem.model().classify)
    right = 0
    for start in range(0, len(source), 512):
        batch = source.take(np.arange(start, min(start + 512, len(source))))
        right += int((jnp.argmax(apply(variables, batch.image), -1) == batch.label).sum())
    return right / len(source)


def run(config: ml_collections.ConfigDict, folder: str, *, trackers: Sequence[str] = ()) -> None:
    """Trains every seed of a config that has no checkpoint yet."""
    # Before the folder is claimed: a config that cannot be trained must not keep it.
    check(config)
    for split in ("train", "validation"):
        problem_lib.load_data(config, split, whole=False)
    workdir = launch.open_workdir(folder)
    with (
        launch.locked(workdir),
        writers.open_writer(workdir, trackers) as writer,
    ):
        provenance.claim(workdir, config)
        for seed in config.seeds:
            train(config, workdir, seed, writer)


def main(argv: Sequence[str]) -> None:
    """The program."""
    del argv
    run(_CONFIG.value, _WORKDIR.value, trackers=_TRACKERS.value)


if __name__ == "__main__":
    _CONFIG, _WORKDIR = launch.define_flags()
    _TRACKERS = writers.define_flag()
    launch.run(main)
