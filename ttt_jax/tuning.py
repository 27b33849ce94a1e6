"""Choosing settings on the validation streams of a task, and on nothing else; and what is fastest.

How many instances are in flight at once changes no result beyond rounding, only the speed: it is
chosen by the clock, not by a metric.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ttt_jax import _arguments, _checks, _chunks, _contract, batching
from ttt_jax.base import Key, Params, Predictor
from ttt_jax.evaluation import Evaluation, Method, Row
from ttt_jax.task import Task

__all__ = ["Trial", "best", "chunk_seconds", "fastest_chunk", "score", "tried"]


class Trial(NamedTuple):
    """How one candidate did on the validation streams.

    Attributes:
      scores: the metric that chooses, then those that decide between equals: means over the rows.
        Lower is better; a value that is not finite counts as infinity.
      message: what went wrong, empty if nothing; its scores are then infinite.
    """

    scores: Mapping[str, float]
    message: str = ""


@_arguments.checked(rows=_arguments.iterable)
def score(task: Task, rows: Iterable[Row]) -> Mapping[str, float]:
    """Means over rows of the metrics that choose, in order of importance.

    Args:
      task: its ``chooses`` and ``ties`` name the metrics.
      rows: of one candidate on validation streams.

    Raises:
      ValueError: no row.
    """
    rows = list(rows)
    if not rows:
        raise ValueError(
            f"score needs at least one validation row of {task.name} in rows; got {rows}."
        )
    if wrong := [row for row in rows if not hasattr(row, "values")]:
        raise TypeError(
            f"rows must hold rows of an evaluation; got {_contract.described(wrong[0])}."
        )
    names = (task.chooses, *task.ties)
    return {name: float(np.mean([row.values[name] for row in rows])) for name in names}


@_arguments.checked(method=None)
def tried(evaluation: Evaluation, task: Task, label: str, method: Method) -> Trial:
    """One candidate on all validation streams.

    Args:
      evaluation: of the role ``"validation"``.
      task: what is evaluated.
      label: of the method.
      method: the candidate.
    """
    rows: list[Row] = []
    for streams in evaluation.groups(method):
        rows += evaluation.rows(label, method, streams)
    return Trial(score(task, rows))


@_arguments.checked()
def best(trials: Sequence[Trial]) -> int:
    """The position of the trial with the lowest scores; the first of equals.

    Raises:
      ValueError: no trial.
    """
    if not trials:
        raise ValueError(f"best needs at least one trial in trials; got {trials}.")

    def key(index: int) -> tuple[float, ...]:
        values = trials[index].scores.values()
        if trials[index].message:
            return (np.inf,)
        return tuple(value if np.isfinite(value) else np.inf for value in values)

    return min(range(len(trials)), key=key)


@_arguments.checked(mesh=None)
def fastest_chunk(
    predictor: Predictor,
    params: Params,
    xs: Any,
    keys: Key,
    *,
    mesh: jax.sharding.Mesh | None = None,
    axis: str = "data",
    max_seconds: float = 120.0,
) -> int:
    """The ``chunk_size`` of :func:`ttt_jax.batched` that is fastest here, by trying.

    More in flight is not always faster: private copies of a convolution become one grouped
    convolution, for which most GPUs have slow kernels, and large images fill a device one at a
    time. Sizes 1, 2, 4, ... and the largest that fits into memory are compiled and timed, twice
    each, on as many instances as tell; see :func:`chunk_seconds`.

    Args:
      predictor: any one-instance predictor.
      params: its parameters.
      xs: instances ``[N, ...]`` of the shapes, and as many, as the calls to come have.
      keys: ``[N]`` typed keys.
      mesh: as for :func:`ttt_jax.batched`; the size is then per device.
      axis: the mesh axis that holds the instances.
      max_seconds: after these no other size is begun, compilation included; the largest that fits
        and one instance are always timed. What is returned is never slower than the largest.

    Returns:
      A size of at least 1.

    Raises:
      ValueError: what :func:`ttt_jax.batched` refuses, ``max_seconds`` < 0, or one instance that
        does not fit into memory.

    Examples:
      >>> import jax, jax.numpy as jnp, ttt_jax as ttt
      >>> predict = ttt.source(ttt.unbatched(lambda params, inputs: inputs @ params))
      >>> xs, keys = jnp.ones((8, 3)), ttt.sample_keys(jax.random.key(0), range(8))
      >>> size = fastest_chunk(predict, jnp.eye(3), xs, keys)
      >>> run = jax.jit(ttt.batched(predict, chunk_size=size))
    """
    seconds = chunk_seconds(
        predictor, params, xs, keys, mesh=mesh, axis=axis, max_seconds=max_seconds
    )
    return next(iter(seconds))


@_arguments.checked(mesh=None)
def chunk_seconds(
    predictor: Predictor,
    params: Params,
    xs: Any,
    keys: Key,
    *,
    mesh: jax.sharding.Mesh | None = None,
    axis: str = "data",
    max_seconds: float = 120.0,
) -> dict[int, float]:
    """Seconds per instance by ``chunk_size``, the fastest first; see :func:`fastest_chunk`.

    Compilation is not in them; the padding of the last chunk is. A size whose first call took over
    a second, and far longer than another one's, is not timed again: its figure holds the start.
    """
    _checks.check_number("max_seconds", max_seconds, 0.0)

    def run_of(size: int) -> Any:
        return batching.batched(predictor, chunk_size=size, mesh=mesh, axis=axis)

    # Says what is wrong with them before anything is compiled.
    jax.eval_shape(run_of(1), params, xs, keys)
    devices = 1 if mesh is None else mesh.shape[axis]
    return _chunks.seconds_by_size(
        run_of, (params,), (xs, keys), devices=devices, max_seconds=max_seconds
    )
