"""Inner steps of the fast-weight layer over one chunk, and the checks of what it is given."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ttt_jax import _contract
from ttt_jax.layers.memories import Memory
from ttt_jax.layers.retentions import Retention


class Rates(NamedTuple):
    """What a network gives a fast-weight layer beside queries, keys and values.

    Attributes:
      gate: ``[T]``, the step size of each token; or a tree of them, laid out as the weights.
      retain: ``[S, ...]``, the rate of retention of each inner step; None for 1. S is T where a
        token is a step, and the number of chunks, begun ones too, where a chunk is.
      momentum: ``[S]``, for :func:`inner_optimizers.momentum`; None for an optimizer without.
      scale: ``[chunk_size]``, which part of what the chunk has changed the token at a position
        reads; None for all. The next chunk begins with what the last position read.
    """

    gate: Any
    retain: jax.Array | None = None
    momentum: jax.Array | None = None
    scale: jax.Array | None = None


class FastState(NamedTuple):
    """What a fast-weight layer has learned.

    Attributes:
      weights: before the link of the retention; a pytree.
      optimizer: the state of the inner optimizer.
      kept: what the retention remembers of the initial weights.
      recent: keys, targets and gates of the last ``window - 1`` tokens; ``()`` before the first,
        and without a window.
    """

    weights: Any
    optimizer: Any
    kept: Any
    recent: Any = ()


class Rule(NamedTuple):
    """The arguments of :func:`ttt_jax.layers.fast_weight` that are no arrays."""

    memory: Memory
    loss: Callable[[Any, Any], jax.Array]
    retention: Retention
    optimizer: optax.GradientTransformationExtraArgs
    reads: str
    step: str
    window: int


class Chunk(NamedTuple):
    """Tokens of a chunk; rates of steps are given to each of their tokens."""

    q: jax.Array
    k: Any
    v: Any
    gate: Any
    steps: dict[str, jax.Array]


def check(
    rule: Rule,
    rows: Any,
    rates: Rates,
    segments: jax.Array | None,
    chunk_size: int,
) -> None:
    """Raises ``ValueError`` for lengths that do not fit, and choices that there are not."""
    for name, options in (("reads", ("before", "after")), ("step", ("token", "chunk"))):
        if getattr(rule, name) not in options:
            raise ValueError(f"{name} must be one of {options}; got {getattr(rule, name)!r}.")
    q, k, v = rows
    if not q.shape[0]:
        raise ValueError(f"q must have at least one token; got shape {q.shape}.")
    if k.shape != q.shape:
        raise ValueError(f"k must have shape {q.shape}, as q; got {k.shape}.")
    for name, tree in (("v", v), ("rates.gate", rates.gate)):
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(tree)]
        if not shapes or any(shape[:1] != q.shape[:1] for shape in shapes):
            raise ValueError(
                f"{name} must have T = {q.shape[0]} rows, as q; got "
                f"{_contract.described(tree)}, shapes {shapes}."
            )
    if segments is not None:
        _check_segments(rule, segments, q.shape[0])
    tokens = rule.step == "token" or segments is not None
    steps = q.shape[0] if tokens else -(-q.shape[0] // chunk_size)
    for name in ("retain", "momentum"):
        rate = getattr(rates, name)
        if rate is not None and rate.shape[:1] != (steps,):
            raise ValueError(
                f"rates.{name} must have {steps} rows, one for each "
                f"{'token' if tokens else 'inner step'}; got shape {rate.shape}."
            )
    if rates.scale is not None and rates.scale.shape != (chunk_size,):
        raise ValueError(
            f"rates.scale must have shape {(chunk_size,)}, a factor for each position of a chunk; "
            f"got {rates.scale.shape}."
        )
    if rule.retention.first and rule.step == "token" and chunk_size > 1:
        raise ValueError(
            "retention decays before the gradient, which only one step of a chunk can follow; got "
            f"chunk_size={chunk_size} with step='token'. Use chunk_size=1, step='chunk' or "
            "retentions.decay(first=False)."
        )


def _check_segments(rule: Rule, segments: jax.Array, tokens: int) -> None:
    if segments.shape != (tokens,):
        raise ValueError(
            f"segments must have shape {(tokens,)}, a number for each token; got {segments.shape}."
        )
    if rule.step == "chunk" and rule.reads == "after":
        raise ValueError(
            "segments with step='chunk' need reads='before', as chunks that read themselves would "
            "hold weights for each token; got reads='after'. Use step='token', or read the "
            "sequences apart."
        )


def check_state(rule: Rule, state: FastState, gate: Any) -> None:
    """Raises ``ValueError`` for gates that are not laid out as the weights, or another's state."""
    due: Any = jax.tree.structure(jax.eval_shape(rule.optimizer.init, state.weights))
    if due != (got := jax.tree.structure(state.optimizer)):
        raise ValueError(
            f"state.optimizer must be of the layer's optimizer, {due}; got {got}: give fast_state "
            "the same optimizer."
        )
    window = rule.window
    layout: Any = jax.tree.structure(gate)
    if layout != jax.tree.structure(state.weights) and not jax.tree_util.all_leaves([gate]):
        raise ValueError(
            "rates.gate must be one array [T], or a tree of them laid out as the weights; got "
            f"{layout} for {jax.tree.structure(state.weights)}."
        )
    lengths = {np.shape(leaf)[0] for leaf in jax.tree.leaves(state.recent)}
    if lengths and lengths != {window - 1}:
        raise ValueError(
            f"window must be {lengths.pop() + 1}, that of the state; got {window}. Keep the window "
            "of the first call."
        )


def begun(state: FastState, rows: tuple[Any, Any, Any], window: int) -> FastState:
    """The state with a window of tokens that have a gate of 0, where it has none yet."""
    if window == 1 or jax.tree.leaves(state.recent):
        return state
    # Of values that the loss takes, as those of the first token are.
    k, v, gate = jax.tree.map(lambda leaf: jnp.repeat(leaf[:1], window - 1, 0), rows)
    return state._replace(recent=(k, v, jax.tree.map(jnp.zeros_like, gate)))


def _windowed(state: FastState, chunk: Chunk, window: int) -> tuple[Any, Any]:
    """Keys, targets and gates of the window's earlier tokens and the chunk's; and those kept."""
    tokens = (chunk.k, chunk.v, chunk.gate)
    if window == 1:
        return tokens, ()
    rows = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), state.recent, tokens)
    return rows, jax.tree.map(lambda leaf: leaf[leaf.shape[0] - window + 1 :], rows)


def _decayed(rule: Rule, state: FastState, steps: dict[str, jax.Array]) -> Any:
    if "retain" not in steps:
        return state.weights
    return rule.retention.decay(state.weights, steps["retain"], state.kept)


def _stepped(rule: Rule, state: FastState, gradient: Any, steps: dict[str, jax.Array]) -> FastState:
    """One inner step; rates ``[...]`` of this step alone."""
    more = {name: rate for name, rate in steps.items() if name == "momentum"}
    updates, optimizer = rule.optimizer.update(gradient, state.optimizer, state.weights, **more)
    weights = optax.apply_updates(_decayed(rule, state, steps), updates)
    weights = rule.retention.after(weights, state.kept)
    return state._replace(weights=weights, optimizer=optimizer)


def _differentiated(rule: Rule, state: FastState, steps: dict[str, jax.Array]) -> Any:
    """The weights at which gradients are taken."""
    base = _decayed(rule, state, steps) if rule.retention.first else state.weights
    return rule.retention.link(base)


def _weighed(gate: Any, gradient: Any) -> Any:
    """A token's gradient times its step size, or each leaf times its own."""
    if jax.tree_util.all_leaves([gate]):
        return jax.tree.map(lambda leaf: gate.astype(leaf.dtype) * leaf, gradient)
    return jax.tree.map(lambda leaf, size: size.astype(leaf.dtype) * leaf, gradient, gate)


def _mix(start: Any, end: Any, part: jax.Array) -> Any:
    return jax.tree.map(lambda a, b: a + part.astype(a.dtype) * (b - a), start, end)


def read_before(rule: Rule, state: FastState, q: jax.Array) -> jax.Array:
    """What queries ``[C, d]`` read from the weights of a state."""
    weights = rule.retention.link(state.weights)
    return jax.vmap(lambda each: rule.memory.read(weights, each))(q)


def _windowed_sums(leaf: jax.Array, window: int, position: jax.Array) -> jax.Array:
    """``[window - 1 + C, ...] -> [C, ...]``: of each token and those before it.

    A position of 0 begins anew: before it are the ``window - 1`` rows of the state.
    """
    index = jnp.arange(position.shape[0], dtype=jnp.int32)

    def earlier(age: int) -> jax.Array:
        own = window - 1 + jnp.where(age <= position, index, position) - age
        return leaf[own]

    return functools.reduce(jnp.add, map(earlier, range(window)))


def by_token(
    rule: Rule,
    state: FastState,
    chunk: Chunk,
    scale: jax.Array | None,
    position: jax.Array | None = None,
) -> tuple[FastState, jax.Array]:
    """A chunk whose tokens are a step each, all of gradients at its beginning.

    With ``position``, int ``[C]``, a token of position 0 begins again from the state.
    """
    first = {name: rate[0] for name, rate in chunk.steps.items()}
    weights = _differentiated(rule, state, first)

    def gradient(k: jax.Array, v: Any) -> Any:
        return jax.grad(lambda w: rule.loss(rule.memory.predict(w, k), v))(weights)

    (keys, targets, gates), recent = _windowed(state, chunk, rule.window)
    gradients = jax.vmap(_weighed)(gates, jax.vmap(gradient)(keys, targets))
    start, size = state.weights, chunk.q.shape[0]
    if rule.window > 1:
        at = jnp.arange(size, dtype=jnp.int32) if position is None else position
        gradients = jax.tree.map(lambda leaf: _windowed_sums(leaf, rule.window, at), gradients)
    parts = jnp.ones(size, jnp.float32) if scale is None else scale
    begins = None
    if position is not None:
        parts, begins = parts[position], position == 0

    def seen(held: FastState, part: jax.Array) -> Any:
        return held.weights if scale is None else _mix(start, held.weights, part)

    def advance(held: FastState, x: Any) -> Any:
        q, of_token, steps, part, begin = x
        if begin is not None:
            held = jax.tree.map(lambda a, b: jnp.where(begin, a, b), state, held)
        held = _stepped(rule, held, of_token, steps)
        used = seen(held, part) if rule.reads == "after" else start
        return held, rule.memory.read(rule.retention.link(used), q)

    end, out = jax.lax.scan(advance, state, (chunk.q, gradients, chunk.steps, parts, begins))
    return end._replace(weights=seen(end, parts[-1]), recent=recent), out


def by_chunk(
    rule: Rule, state: FastState, chunk: Chunk, scale: jax.Array | None
) -> tuple[FastState, jax.Array]:
    """A chunk that is one step."""
    steps = {name: rate[0] for name, rate in chunk.steps.items()}
    weights = _differentiated(rule, state, steps)
    (keys, targets, gates), recent = _windowed(state, chunk, rule.window)

    def total(w: Any, gate: jax.Array) -> jax.Array:
        losses = jax.vmap(lambda k, v: rule.loss(rule.memory.predict(w, k), v))(keys, targets)
        return (gate.astype(losses.dtype) * losses).sum()

    if jax.tree_util.all_leaves([gates]):
        gradient = jax.grad(total)(weights, gates)
    else:
        gradient = _of_each_leaf(total, weights, gates)
    end = _stepped(rule, state, gradient, steps)

    def seen(part: jax.Array | None) -> Any:
        return end.weights if part is None else _mix(state.weights, end.weights, part)

    def read(q: jax.Array, part: jax.Array | None) -> jax.Array:
        used = state.weights if rule.reads == "before" else seen(part)
        return rule.memory.read(rule.retention.link(used), q)

    out = jax.vmap(read, (0, None if scale is None else 0))(chunk.q, scale)
    weights = seen(None if scale is None else scale[-1])
    return end._replace(weights=weights, recent=recent), out


def _of_each_leaf(total: Callable[[Any, jax.Array], jax.Array], weights: Any, gates: Any) -> Any:
    """The gradient of each leaf, of the losses with the leaf's own step sizes."""
    leaves, structure = jax.tree.flatten(weights)

    def gradient(index: int, gate: jax.Array) -> jax.Array:
        def of_leaf(leaf: jax.Array) -> jax.Array:
            replaced = [*leaves[:index], leaf, *leaves[index + 1 :]]
            return total(jax.tree.unflatten(structure, replaced), gate)

        return jax.grad(of_leaf)(leaves[index])

    made = [gradient(index, gate) for index, gate in enumerate(jax.tree.leaves(gates))]
    return jax.tree.unflatten(structure, made)
