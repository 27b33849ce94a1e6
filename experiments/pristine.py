"""The checkpoints of a work folder: where they lie, and what they must agree on with a config."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections

from ttt_jax import checkpoint
from ttt_jax.task import Task

_FORMS = ("dtype", "conv", "attention")


def path_of(workdir: pathlib.Path, seed: int) -> pathlib.Path:
    """Where the pristine checkpoint of a seed lies."""
    return workdir / "checkpoints" / f"seed_{seed}"


def paths(
    workdir: pathlib.Path, seeds: Sequence[int], given: str | None = None
) -> dict[int, pathlib.Path]:
    """The checkpoint of every seed: that of the folder, or a given one for all.

    Raises:
      FileNotFoundError: naming the first that there is not.
    """
    found = {seed: pathlib.Path(given) if given else path_of(workdir, seed) for seed in seeds}
    for seed, path in found.items():
        if not path.exists():
            raise FileNotFoundError(
                f"there is no checkpoint of seed {seed} at {path}; train one first: python -m "
                "experiments.train with the same --workdir, --config and seeds, or name another "
                "with --checkpoint."
            )
    return found


def metadata(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What a checkpoint must agree on with the config that uses it."""
    constants = {name: config.data[name] for name in ("mean", "std") if name in config.data}
    # The compute dtype and the forms of layers change no parameter.
    model = {name: value for name, value in config.model.items() if name not in _FORMS}
    return {**constants, "model": model, "dataset": config.data.name}


def layout(task: Task) -> Any:
    """Shapes and dtypes of the parameters of a task."""
    return jax.eval_shape(task.init, jax.random.key(0))


def load(
    path: str | pathlib.Path,
    task: Task,
    config: ml_collections.ConfigDict,
    *,
    sharding: Any = None,
) -> checkpoint.Pristine:
    """The pristine checkpoint, checked against the task and the config's constants.

    Args:
      path: of the checkpoint.
      task: whose layout it must have.
      config: see ``experiments/configs``.
      sharding: as in :func:`ttt_jax.checkpoint.load`: where the parameters are put.

    Raises:
      CheckpointError: damaged, of another layout, or made with other constants.
    """
    pristine = checkpoint.load(path, like=layout(task), sharding=sharding)
    pristine.require(**metadata(config))
    return pristine
