"""Training of one decoder on all tasks, the demonstrations of those to be solved included."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.arc import sources
from ttt_jax import losses, models

_BETAS = {"b1": 0.9, "b2": 0.98, "eps": 1e-10}
_MOMENTUM = 0.95


class Training(NamedTuple):
    """Settings of the training.

    Attributes:
      num_steps: in all.
      warmup: steps in which the step sizes rise.
      decay_from: share of the steps after which they fall, to zero at the end.
      matrices: step size of Muon, for the matrices of the layers.
      tables: of Adam, for the embeddings.
      others: of Adam, for the rest.
      weight_decay: of the matrices.
      first_share: demonstrations of the tasks to be solved among all examples, at the begin.
      last_share: at the end; linear in between.
    """

    num_steps: int
    warmup: int = 150
    decay_from: float = 0.15
    matrices: float = 2.5e-3
    tables: float = 1e-2
    others: float = 3e-3
    weight_decay: float = 0.1
    first_share: float = 0.35
    last_share: float = 0.6


def shares_of(training: Training) -> list[float]:
    """By step, the share of demonstrations of the tasks to be solved."""
    return np.linspace(training.first_share, training.last_share, training.num_steps).tolist()


def optimizer_of(training: Training) -> optax.GradientTransformation:
    """Muon for the matrices of the layers, Adam for tables and the rest (Jordan, 2024)."""
    decay = max(1.0 - training.decay_from, 1e-9)

    def schedule(peak: float) -> Callable[[Any], Any]:
        def at(step: Any) -> Any:
            left = 1.0 - step / training.num_steps
            rising = (step + 1) / max(training.warmup, 1)
            return peak * jnp.minimum(1.0, rising) * jnp.clip(left / decay, 0.0, 1.0)

        return at

    def axes(params: Any) -> Any:
        stacked = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
        return jax.tree.map(lambda leaf: stacked, params)

    # Momentum of float32 is made orthogonal in 16 bits, as published: Muon with no momentum of its
    # own, behind that of Nesterov. Its iteration knows no scale.
    muon = optax.chain(
        optax.trace(_MOMENTUM, nesterov=True),
        _each(lambda leaf: leaf.astype(jnp.bfloat16)),
        optax.contrib.scale_by_muon(
            beta=0.0, nesterov=False, mu_dtype=jnp.bfloat16, weight_dimension_numbers=axes
        ),
        _each(_of_equal_size),
        optax.add_decayed_weights(training.weight_decay),
        optax.scale_by_learning_rate(schedule(training.matrices)),
    )
    adam = {
        name: optax.adam(schedule(peak), **_BETAS)
        for name, peak in (("tables", training.tables), ("others", training.others))
    }
    return optax.multi_transform({"matrices": muon, **adam}, _kinds)


def _each(change: Callable[[jax.Array], jax.Array]) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, params: jax.tree.map(change, updates))


def _of_equal_size(update: jax.Array) -> jax.Array:
    """A root mean square of 0.2 for matrices of any shape (Liu et al., 2025, section 2.2)."""
    return 0.2 * max(update.shape[1:]) ** 0.5 * update.astype(jnp.float32)


def _kinds(params: Any) -> Any:
    def kind(path: Any, leaf: Any) -> str:
        names = jax.tree_util.keystr(path)
        if "kernel" in names:
            return "matrices"
        return "tables" if any(name in names for name in ("token", "task", "view")) else "others"

    return jax.tree_util.tree_map_with_path(kind, params)


class State(NamedTuple):
    """What a training goes on from."""

    step: int
    params: Any
    opt_state: Any


def begin(net: models.GridDecoder, training: Training, rows: sources.Rows, seed: int) -> State:
    """The state before the first step."""
    empty = sources.grid_sequences.empty(*rows)._asdict()
    params = jax.jit(net.init)(jax.random.key(seed), empty)
    return State(0, params, optimizer_of(training).init(params))


class Stops(NamedTuple):
    """When a training ends before its last step, and when it is kept.

    Attributes:
      at: the step before which it ends.
      seconds: of :func:`time.perf_counter`, after which no step begins.
      keep_every: steps after which ``keep`` is called.
      keep: takes the state.
    """

    at: int
    seconds: float = float("inf")
    keep_every: int = 0
    keep: Callable[[State], None] = lambda state: None


# Steps that the host is ahead of the device at most.
_AHEAD = 16


def train(
    net: models.GridDecoder,
    training: Training,
    state: State,
    batches: Any,
    stops: Stops,
    log: Callable[[str], None],
    curve: list[dict[str, float]],
    every: int = 200,
) -> State:
    """Steps until a stop.

    Args:
      net: the decoder.
      training: settings.
      state: where it begins.
      batches: packed batches of the steps from there on.
      stops: when it ends.
      log: takes a line of progress.
      curve: is given a row per line, what was measured on the way.
      every: steps of a line.
    """
    loss = losses.packed_sequences(net.apply, report=True)
    optimizer = optimizer_of(training)

    @jax.jit
    def step(params: Any, opt_state: Any, batch: Any) -> Any:
        key = jax.random.key(0)  # the loss draws nothing
        (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, aux

    pending: list[dict[str, jax.Array]] = []
    last, tokens = time.perf_counter(), 0
    for batch in batches:
        if state.step >= stops.at or time.perf_counter() > stops.seconds:
            break
        tokens += int((batch["segment"] >= 0).sum())
        params, opt_state, aux = step(*state[1:], batch)
        state = State(state.step + 1, params, opt_state)
        pending.append(aux)
        jax.block_until_ready(pending[-_AHEAD:][0])
        if state.step % every == 0 or state.step == stops.at:
            values = {name: float(np.mean([each[name] for each in pending])) for name in pending[0]}
            now = time.perf_counter()
            row = {"step": state.step, "seconds": now - last, "tokens": tokens, **values}
            curve.append(row)
            log(
                f"step {state.step}: {(now - last) / len(pending) * 1e3:.1f} ms, "
                f"{tokens / (now - last):,.0f} tokens/s, nats {row['nats']:.4f}, "
                f"exact {row['exact']:.3f}"
            )
            last, tokens, pending = now, 0, []
        if stops.keep_every and state.step % stops.keep_every == 0:
            stops.keep(state)
    jax.block_until_ready(state.params)
    return state
