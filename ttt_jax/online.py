"""Streams: adaptation that carries its state from one instance to the next."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _contract, _scans, _trees, inner
from ttt_jax.base import (
    Adapter,
    Info,
    Key,
    Params,
    Predictor,
    PyTree,
    Reset,
    Stream,
    StreamInfo,
)

__all__ = ["Carry", "episode", "online", "unroll"]

# Inner step i uses fold_in(key, i); the reset must not meet any of those keys.
_RESET_FOLD = 0x7FFFFFFF


class Carry(NamedTuple):
    """What a stream keeps between instances: the adapter's state and the reset's."""

    state: PyTree
    reset: PyTree


@_arguments.checked()
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
      stream.init(params), (xs, keys))``. In a ``jax.shard_map`` of your own the state is each
      device's own: start from ``jax.lax.pcast(stream.init(params), axis, to="varying")``.

    Raises:
      TypeError: ``adapter``, ``apply`` or ``reset`` is another thing, or a factory not called.
      ValueError: ``num_steps`` is negative, or ``predict`` is neither word.
    """
    _contract.require_function("apply", apply, "(params, x) -> output")
    _contract.require("reset", reset, Reset)
    inner.check_num_steps(num_steps)
    if predict not in ("before", "after"):
        raise ValueError(f"predict must be 'before' or 'after', got {predict!r}.")
    loop = inner.inner_loop(inner.guarded(adapter), num_steps)

    def init(params: Params) -> Carry:
        return Carry(adapter.init(params), reset.init())

    def step(
        params: Params, carry: Carry, x: Any, key: Key
    ) -> tuple[Carry, tuple[Any, StreamInfo]]:
        _contract.require_key("A stream", key)
        before = carry.state
        state, infos = loop(params, before, x, key)
        output = apply(adapter.merge(params, before if predict == "before" else state), x)
        info = Info(
            loss=infos.loss,
            grad_norm=infos.grad_norm,
            ok=infos.finite.all(),
            updated=_trees.differs(before, state),
            aux=infos.aux,
        )
        reset_carry, state, fired = reset.apply(
            carry.reset,
            state,
            adapter.init(params),
            output,
            info,
            jax.random.fold_in(key, _RESET_FOLD),
        )
        return Carry(state, reset_carry), (output, StreamInfo(**info._asdict(), reset=fired))

    return Stream(init, step)


@_arguments.checked()
def episode(stream: Stream) -> Predictor:
    """A predictor that makes one step of a stream from its pristine start, and forgets.

    Unlike :func:`~ttt_jax.episodic` it predicts when the stream does: with ``predict="before"``
    the output is that of the pristine state, as every first step of the stream gives it.

    Args:
      stream: any stream, for example :func:`ttt_jax.methods.tent`.

    Returns:
      A predictor with the output and the ``Info`` of that step. A step that is not finite leaves
      the last finite state to predict, as in a stream.
    """
    _contract.require("stream", stream, Stream)

    def predict(params: Params, x: Any, key: Key) -> tuple[Any, Info]:
        _, (output, info) = stream.step(params, stream.init(params), x, key)
        return output, Info(info.loss, info.grad_norm, info.ok, info.updated, info.aux)

    return predict


@_arguments.checked(remat=_arguments.count(0))
def unroll(stream: Stream, *, remat: int | None = 0) -> Predictor:
    """A predictor that runs a stream, from pristine, along the leading axis of one instance.

    A document is an instance ``x[T, ...]`` of T chunks. Chunk t is given ``fold_in(key, t)``, and
    what was learned ends with the instance. Under :func:`~ttt_jax.batched` thousands of documents
    go side by side.

    Args:
      stream: its instances are the chunks, for example :func:`online` with ``predict="before"``,
        which scores a chunk before it learns from it.
      remat: chunks between two states that a gradient through the stream keeps, see
        :func:`ttt_jax.meta.scan`: 0 for what every chunk leaves, None for about ``sqrt(T)``.

    Returns:
      A predictor with output ``[T, ...]``. Its ``Info`` has the ``T * num_steps`` inner steps of
      all chunks in a row; ``ok`` if all chunks are, ``updated`` if any is.

    Raises:
      ValueError: when called: leaves of ``x`` without one common leading axis T >= 1.
    """
    _contract.require("stream", stream, Stream)

    def predict(params: Params, x: Any, key: Key) -> tuple[Any, Info]:
        _contract.require_key("unroll", key, maps=True)
        num_chunks = _num_chunks(x)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(num_chunks))

        def step(carry: Any, chunk: Any) -> Any:
            return stream.step(params, carry, *chunk)

        start = stream.init(params)
        _, (outputs, info) = _scans.rematerialized(step, start, (x, keys), remat)
        loss, grad_norm, aux = jax.tree.map(
            lambda leaf: leaf.reshape((-1,) + leaf.shape[2:]), (info.loss, info.grad_norm, info.aux)
        )
        return outputs, Info(loss, grad_norm, info.ok.all(), info.updated.any(), aux)

    return predict


def _num_chunks(x: Any) -> int:
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(x)}
    if len(lengths) != 1 or lengths & {(), (0,)}:
        raise ValueError(
            "unroll needs an instance whose leaves share one leading axis of at least one chunk; "
            f"got leading axes {sorted(lengths)}. Stack the chunks, and pad the last with a mask."
        )
    return int(next(iter(lengths))[0])
