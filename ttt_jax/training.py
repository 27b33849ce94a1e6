"""Training a task's model: the main loss, and the auxiliary one that it will adapt with."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ttt_jax import _arguments, _checks, _contract
from ttt_jax.base import AuxLoss, Key, Params, Selection
from ttt_jax.task import Examples, Task, TrainingData

__all__ = ["Auxiliary", "State", "Step", "batches_from", "blocks", "learned", "make_step"]

State = tuple[Params, Any]
"""``(params, opt_state)``."""

Step = Callable[[Params, Any, Examples, Key], tuple[Params, Any, dict[str, jax.Array]]]
"""``(params, opt_state, examples, key) -> (params, opt_state, losses by name)``."""


# The main loss must not meet the keys of views and of the auxiliary loss.
_LOSS_FOLD = 0x7FFFFFFF


class Auxiliary(NamedTuple):
    """The auxiliary task of training.

    Attributes:
      name: of its loss in logs.
      loss: over a batch of views, ``(params, x[N, ...], key) -> scalar``.
      weight: of its loss beside the main one's 1.
    """

    name: str
    loss: AuxLoss
    weight: float | jax.Array = 1.0


@_arguments.checked()
def make_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    *,
    auxiliary: Auxiliary | None = None,
    main_select: Selection | None = None,
    follow: Callable[[Params, Any, Key], Params] | None = None,
) -> Step:
    """One step on ``task.loss + weight * auxiliary`` over one augmented batch.

    Args:
      task: its ``augment`` draws one view of each instance, which both losses see.
      optimizer: over ``params["params"]`` (all of ``params`` if it has no such collection).
      auxiliary: what is learned beside the main task (Sun et al. 2020, Eq. 2).
      main_select: the parameters in which the main loss has a gradient; None for all.
      follow: ``follow(params, views, key) -> params`` after each step: running statistics that
        follow the batch.

    Returns:
      A :data:`Step`, to be compiled by the caller.
    """
    if auxiliary is not None:
        _checks.check_number("auxiliary.weight", auxiliary.weight)
        _contract.require_function("auxiliary.loss", auxiliary.loss, "(params, x, key) -> scalar")

    def losses(params: Params, examples: Examples, key: Key) -> Any:
        view_key, aux_key = jax.random.split(key)
        views = examples.x
        if task.augment is not None:
            keys = jax.random.split(view_key, examples.id.shape[0])
            views = jax.vmap(task.augment)(views, keys)
        held = params
        if main_select is not None:
            fast, frozen = main_select.split(params)
            held = main_select.merge(fast, jax.lax.stop_gradient(frozen))
        main = task.loss(held, examples._replace(x=views), jax.random.fold_in(key, _LOSS_FOLD))
        if auxiliary is None:
            return main, (views, {"main": main})
        value = auxiliary.loss(params, views, aux_key)
        return main + auxiliary.weight * value, (views, {"main": main, auxiliary.name: value})

    def step(params: Params, opt_state: Any, examples: Examples, key: Key) -> Any:
        grads, (views, parts) = jax.grad(losses, has_aux=True)(params, examples, key)
        updates, opt_state = optimizer.update(learned(grads), opt_state, learned(params))
        params = _with_learned(params, optax.apply_updates(learned(params), updates))
        if follow is not None:
            params = follow(params, views, key)
        return params, opt_state, parts

    return step


@_arguments.checked()
def learned(params: Params) -> Any:
    """What the optimizer sees: the collection ``params`` where there is one."""
    return params["params"] if isinstance(params, dict) and "params" in params else params


def _with_learned(params: Params, new: Any) -> Params:
    if isinstance(params, dict) and "params" in params:
        return {**params, "params": new}
    return new


@_arguments.checked(data=_arguments.iterable, start=_arguments.count(0))
def batches_from(data: Any, start: int) -> Iterator[Examples]:
    """Endless training batches from step ``start``.

    Args:
      data: what ``task.training(seed)`` returned: with ``steps`` it is asked for that step; else
        it is iterated again and again, and what was seen before is read over.
      start: the first step.

    Raises:
      ValueError: no batch in it.
    """
    if isinstance(data, TrainingData):
        return data.steps(start)
    return itertools.islice(_cycled(data), start, None)


def _cycled(data: Any) -> Iterator[Examples]:
    while True:
        empty = True
        for batch in data:
            empty = False
            yield batch
        if empty:
            raise ValueError("Training needs at least one batch; task.training(seed) has none.")


@_arguments.checked(
    state=_arguments.sequence(),
    start=_arguments.count(0),
    total=_arguments.count(0),
    steps_per_call=_arguments.count(),
)
def blocks(
    step: Step,
    state: State,
    data: Any,
    *,
    key: Key,
    start: int,
    total: int,
    steps_per_call: int = 1,
    stops: tuple[int, ...] = (),
) -> Iterator[tuple[int, State, dict[str, jax.Array]]]:
    """Runs training steps; step k uses ``fold_in(key, k)``.

    Args:
      step: see :func:`make_step`.
      state: ``(params, opt_state)`` before step ``start``.
      data: of ``task.training(seed)``.
      key: of the training.
      start: the first step.
      total: one past the last.
      steps_per_call: steps in one compiled call, at most; where the data lies on the device
        (``resident()`` and ``places(start)``) only positions are handed over.
      stops: numbers whose multiples end a call, such as those of logs and saves.

    Yields:
      ``(steps done, state, losses of the last step)`` after each call.
    """
    if steps_per_call == 1:
        run = jax.jit(step)
        for done, batch in zip(range(start, total), batches_from(data, start), strict=False):
            batch = batch._replace(tags={})
            *state, parts = run(*state, batch, jax.random.fold_in(key, done))
            yield done + 1, tuple(state), parts
        return
    divisor = math.gcd(total, *stops)
    block = max(k for k in range(1, min(steps_per_call, divisor) + 1) if divisor % k == 0)
    many, next_block = _many_per_call(step, data, key, start, block)
    for first in range(start, total, block):
        state, parts = many(state, next_block(), np.arange(first, first + block))
        yield first + block, state, parts


def _many_per_call(step: Step, data: Any, key: Key, start: int, block: int) -> Any:
    """A compiled call of several steps, and a function that gives its batches or positions."""
    resident = hasattr(data, "resident") and hasattr(data, "places")
    everything = jax.tree.map(jnp.asarray, data.resident()) if resident else None
    feed = data.places(start) if resident else batches_from(data, start)

    @functools.partial(jax.jit, donate_argnums=0)
    def call(state: Any, everything: Any, given: Any, steps: Any) -> Any:
        def body(state: Any, turn: Any) -> Any:
            batch, number = turn
            if resident:
                batch = jax.tree.map(lambda leaf: leaf[batch], everything)
            params, opt_state = state
            *state, parts = step(params, opt_state, batch, jax.random.fold_in(key, number))
            return tuple(state), parts

        state, parts = jax.lax.scan(body, state, (given, steps))
        return state, jax.tree.map(lambda leaf: leaf[-1], parts)

    def next_block() -> Any:
        parts: list[Any] = [next(feed) for _ in range(block)]
        if resident:
            return np.stack(parts)
        parts = [part._replace(tags={}) for part in parts]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *parts)

    return lambda state, given, steps: call(state, everything, given, steps), next_block
