"""Streams: adaptation that carries its state from one instance to the next."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from ttt_jax import _trees, inner
from ttt_jax.base import Adapter, Info, Key, Params, PyTree, Reset, Stream, StreamInfo

# Inner step i uses fold_in(key, i); the reset must not meet any of those keys.
_RESET_FOLD = 0x7FFFFFFF


class Carry(NamedTuple):
    """What a stream keeps between instances: the adapter's state and the reset's."""

    state: PyTree
    reset: PyTree


def online(
    adapter: Adapter,
    apply: Callable[[Params, Any], Any],
    *,
    num_steps: int = 1,
    reset: Reset,
    predict: str = "after",
) -> Stream:
    """Adapts along a stream, keeping what was learned until ``reset`` fires.

    One step: ``predict="before"`` predicts; ``num_steps`` inner steps are made;
    ``predict="after"`` predicts; then the reset is applied. An inner step that is not finite is
    not taken: parameters, optimizer state and memory keep their values, ``ok`` is False, and
    the output comes from the last finite state.

    Args:
      adapter: what one inner step is; inner step i of an instance uses ``fold_in(key, i)``, so
        with ``resets.every(1)`` a stream equals :func:`~ttt_jax.episodic`.
      apply: one-instance function ``(params, x) -> output``.
      num_steps: S inner steps per instance, static.
      reset: see :mod:`ttt_jax.resets`.
      predict: ``"after"`` (TTT) or ``"before"`` the update (Tent, EATA, SAR, CoTTA).

    Returns:
      A :class:`~ttt_jax.Stream`; ``step(params, carry, x, key) -> (carry, (output,
      StreamInfo))``. Scan it with ``jax.lax.scan(lambda c, xk: stream.step(params, c, *xk),
      stream.init(params), (xs, keys))``.

    Raises:
      ValueError: ``num_steps`` is negative, or ``predict`` is neither word.
    """
    inner.check_num_steps(num_steps)
    if predict not in ("before", "after"):
        raise ValueError(f"predict must be 'before' or 'after', got {predict!r}.")
    loop = inner.inner_loop(inner.guarded(adapter), num_steps)

    def init(params: Params) -> Carry:
        return Carry(adapter.init(params), reset.init())

    def step(
        params: Params, carry: Carry, x: Any, key: Key
    ) -> tuple[Carry, tuple[Any, StreamInfo]]:
        before = carry.state
        state, infos = loop(params, before, x, key)
        output = apply(adapter.merge(params, before if predict == "before" else state), x)
        info = Info(
            loss=infos.loss,
            grad_norm=infos.grad_norm,
            ok=infos.finite.all(),
            updated=_trees.differs(before, state),
        )
        reset_carry, state, fired = reset.apply(
            carry.reset,
            state,
            adapter.init(params),
            output,
            info,
            jax.random.fold_in(key, _RESET_FOLD),
        )
        return Carry(state, reset_carry), (output, StreamInfo(*info, reset=fired))

    return Stream(init, step)
