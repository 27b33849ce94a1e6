"""Inner loops: the steps of an adapter chained on one instance."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _checks, _contract, _trees, _varying
from ttt_jax.base import Adapter, Key, Params, PyTree, StepInfo

__all__ = ["check_num_steps", "guarded", "inner_loop", "observed_loop"]


@_arguments.checked()
def guarded(adapter: Adapter) -> Adapter:
    """An adapter that does not take a step which is not finite: the state keeps its values."""
    _contract.require("adapter", adapter, Adapter)

    def step(params: Params, state: PyTree, x: Any, key: Key) -> tuple[PyTree, StepInfo]:
        stepped, info = adapter.step(params, state, x, key)
        return _trees.where(info.finite, stepped, state), info

    return adapter._replace(step=step)


def check_num_steps(num_steps: Any) -> int:
    """Returns ``num_steps`` as an int, or raises the one error that all callers share."""
    return _checks.check_count("num_steps", num_steps, 0)


@_arguments.checked()
def observed_loop(
    adapter: Adapter, num_steps: int, observe: Callable[[PyTree, StepInfo], Any] | None = None
) -> Callable[[Params, PyTree, Any, Key], tuple[PyTree, tuple[StepInfo, Any]]]:
    """An inner loop that also stacks ``observe(state, info)`` of every step.

    Inner step i uses ``fold_in(key, i)``. The first step is peeled from the scan: there all
    instances still share the pristine weights, so under ``vmap`` its forward pass stays an
    ordinary batched one instead of a grouped one.

    Args:
      adapter: the adapter whose step is repeated.
      num_steps: S, at least 1.
      observe: evaluated inside the scan body, so the states of all steps are never stacked.

    Returns:
      ``(params, state, x, key) -> (state, (StepInfo[S], observations[S]))``.
    """
    num_steps = check_num_steps(num_steps)
    _contract.require("adapter", adapter, Adapter)
    look = observe or (lambda state, info: ())

    def run(params: Params, state: PyTree, x: Any, key: Key) -> Any:
        _contract.require_key("An inner loop", key)

        def body(state: PyTree, i: Any) -> Any:
            stepped, info = adapter.step(params, state, x, jax.random.fold_in(key, i))
            return _varying.alike(stepped, state), (info, look(stepped, info))

        state, first = body(state, 0)
        first = jax.tree.map(lambda leaf: leaf[None], first)
        if num_steps == 1:
            return state, first
        state = _varying.carry(lambda state: body(state, 1)[0], state)
        state, rest = jax.lax.scan(body, state, jnp.arange(1, num_steps))
        joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, rest)
        return state, joined

    return run


@_arguments.checked()
def inner_loop(
    adapter: Adapter, num_steps: int
) -> Callable[[Params, PyTree, Any, Key], tuple[PyTree, StepInfo]]:
    """Several inner steps on one instance.

    Args:
      adapter: the adapter whose step is repeated; step i uses ``fold_in(key, i)``.
      num_steps: S, at least 0; static.

    Returns:
      ``(params, state, x, key) -> (state, StepInfo[S])``. Steps that are not finite are taken
      like any other here; :func:`~ttt_jax.episodic` and :func:`~ttt_jax.online` deal with them.

    Raises:
      TypeError: ``adapter`` is no :class:`~ttt_jax.Adapter`; when called: ``key`` is no key.
      ValueError: ``num_steps`` is negative or not an integer.
    """
    _contract.require("adapter", adapter, Adapter)
    check_num_steps(num_steps)

    def run(params: Params, state: PyTree, x: Any, key: Key) -> tuple[PyTree, StepInfo]:
        if num_steps == 0:
            empty = jnp.zeros((0,), jnp.float32)
            return state, StepInfo(empty, empty, jnp.zeros((0,), bool))
        state, (infos, _) = observed_loop(adapter, num_steps)(params, state, x, key)
        return state, infos

    return run
