"""Decoders that differ in what mixes tokens alone, of equal size, and their training."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import tree_util

from ttt_jax import models

HEAD_SIZE = 64
NETS = ("attention", "window", "ttt_linear", "ttt_mlp")
# Of the gated MLP, so that products keep a shape that matrix units like.
_UNIT = 8
_DECAYED = ("kernel", "embedding", "head")


class Sizes(NamedTuple):
    """Of all nets.

    Attributes:
      vocabulary: V.
      width: of the residual stream; a multiple of ``head_size``.
      depth: layers.
      mlp_width: of the net with attention; the others have what makes them as large.
      window: tokens that a token sees in the net with a window.
      backbone: of the layers that learn.
      form: of TTT layers.
      attention: ``"fused"`` or ``"xla"``.
      dtype: the compute dtype.
      head_size: of all heads.
    """

    vocabulary: int
    width: int
    depth: int
    mlp_width: int
    window: int
    backbone: str
    form: str
    attention: str = "fused"
    dtype: Any = jnp.bfloat16
    head_size: int = HEAD_SIZE


def count(module: models.Decoder) -> int:
    """Parameters."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def net(name: str, sizes: Sizes) -> models.Decoder:
    """A decoder as large as that with attention, to a part in a thousand or so."""
    attends = name in ("attention", "window")
    made = models.Decoder(
        vocabulary=sizes.vocabulary,
        width=sizes.width,
        depth=sizes.depth,
        heads=sizes.width // sizes.head_size,
        mlp_width=sizes.mlp_width,
        window=sizes.window if name == "window" else None,
        context=1 << 20,
        mixer="attention" if attends else name,
        backbone=sizes.backbone,
        form="auto" if attends else sizes.form,
        attention=sizes.attention,
        dtype=sizes.dtype,
    )
    if attends:
        return made
    excess = count(made) - count(net("attention", sizes))
    units = round(excess / (3 * sizes.width * sizes.depth * _UNIT))
    return made.clone(mlp_width=sizes.mlp_width - _UNIT * units)


def fresh(module: models.Decoder, seed: int) -> Any:
    """Random parameters; by plain forms, as kernels are not made for two tokens."""
    plain = module.clone(attention="xla", form="dual")
    return jax.jit(plain.init)(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))


def flop_per_token(module: models.Decoder, length: int) -> float:
    """Of the products of a forward pass; of a step of training three times that."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    leaves = tree_util.tree_leaves_with_path(shapes)
    matrices = sum(leaf.size for path, leaf in leaves if path[-1].key in _DECAYED)
    size = module.width // module.heads
    if module.mixer == "attention":
        window = min(module.window or length, length)
        seen = (window * (window + 1) / 2 + (length - window) * window) / length
        mixing = 4 * module.width * seen
    else:
        linear = module.heads * (8 * size**2 + 6 * size * module.chunk_size)
        mixing = linear * (8 if module.mixer == "ttt_mlp" else 1)
    return float(2 * matrices + module.depth * mixing)


class Training(NamedTuple):
    """How nets are trained.

    Attributes:
      loss: ``(params, batch, memory) -> (scalar, memory)``.
      draw: ``(data, key, memory) -> (batch, memory)``, inside the compiled program.
      memory: before the first step, what one step leaves to the next.
      steps_per_call: of a compiled call.
    """

    loss: Callable[[Any, Any, Any], tuple[jax.Array, Any]]
    draw: Callable[[Any, Any, Any], tuple[Any, Any]]
    memory: Any
    steps_per_call: int


def without_memory(
    loss: Callable[[Any, Any], jax.Array], draw: Callable[[Any, Any], Any], steps_per_call: int
) -> Training:
    """Of ``loss(params, batch)`` and ``draw(data, key)``: every step is as if it were the first."""
    return Training(
        lambda params, batch, memory: (loss(params, batch), memory),
        lambda data, key, memory: (draw(data, key), memory),
        (),
        steps_per_call,
    )


class Trained(NamedTuple):
    """What a training gave.

    Attributes:
      params: of the net.
      losses: the mean of each compiled call.
      seconds: of the calls after the first.
      steps: that were taken in those seconds.
      finished: whether all steps were taken, and all losses finite.
    """

    params: Any
    losses: list[float]
    seconds: float
    steps: int
    finished: bool


def _optimizer() -> optax.GradientTransformation:
    """AdamW as published for these layers, without its step size."""

    def decayed(params: Any) -> Any:
        return tree_util.tree_map_with_path(lambda path, leaf: path[-1].key in _DECAYED, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(0.1, mask=decayed),
    )


def schedule(step: jax.Array, total: jax.Array) -> jax.Array:
    """A tenth of the steps from 0 to 1, then a cosine to a hundredth."""
    warm = jnp.maximum(total / 10, 1.0)
    done = jnp.clip((step - warm) / jnp.maximum(total - warm, 1.0), 0.0, 1.0)
    falling = 0.01 + 0.99 * 0.5 * (1 + jnp.cos(jnp.pi * done))
    return jnp.where(step < warm, (step + 1) / warm, falling)


def program(training: Training) -> Callable[..., Any]:
    """``(state, data, key, rate, total, first) -> (state, mean loss)`` of some steps, compiled.

    One program serves all step sizes, lengths and seeds; data and weights are arguments.
    """
    optimizer = _optimizer()

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state: Any, data: Any, key: Any, rate: Any, total: Any, first: Any) -> Any:
        def step(state: Any, number: Any) -> Any:
            params, held, memory = state
            batch, memory = training.draw(data, jax.random.fold_in(key, number), memory)
            whole = jax.value_and_grad(training.loss, has_aux=True)
            (value, memory), grads = whole(params, batch, memory)
            updates, held = optimizer.update(grads, held, params)
            size = rate * schedule(number.astype(jnp.float32), total)
            params = jax.tree.map(lambda leaf, update: leaf - size * update, params, updates)
            return (params, held, memory), value

        state, values = jax.lax.scan(step, state, first + jnp.arange(training.steps_per_call))
        return state, values.mean()

    return run


def fit(
    run: Callable[..., Any],
    training: Training,
    start: Any,
    data: Any,
    *,
    seed: int,
    rate: float,
    calls: int,
    deadline: float,
) -> Trained:
    """Trains from ``start``.

    Args:
      run: of :func:`program`.
      training: of that program.
      start: parameters, which are given up.
      data: of ``draw``.
      seed: of the batches.
      rate: the highest step size.
      calls: of ``run``.
      deadline: of :func:`time.monotonic`, after which no call begins.
    """
    # A program gives up what it is given, and the memory begins more than one training.
    memory = jax.tree.map(jnp.copy, training.memory)
    state = start, _optimizer().init(start), memory
    steps_per_call = training.steps_per_call
    losses, seconds, total = [], 0.0, jnp.float32(calls * steps_per_call)
    for call in range(calls):
        if time.monotonic() > deadline:
            break
        begun = time.monotonic()
        first = jnp.int32(call * steps_per_call)
        state, value = run(state, data, jax.random.key(seed), jnp.float32(rate), total, first)
        losses.append(float(value))
        # The first call may compile.
        seconds += (time.monotonic() - begun) * (call > 0)
    whole = len(losses) == calls and all(value < float("inf") for value in losses)
    return Trained(state[0], losses, seconds, max(len(losses) - 1, 0) * steps_per_call, whole)


def differences(name: str, sizes: Sizes, tokens: jax.Array, loss: Any) -> dict[str, float]:
    """Relative differences of the fast forms to the plain ones, in the same dtype.

    Args:
      name: of a net.
      sizes: its own, but for one layer.
      tokens: ``[N, T]``, to read and to learn from.
      loss: ``(module) -> (params, batch) -> scalar``.

    Returns:
      Of the loss, and of the gradient of all parameters, as ``|a - b| / |b|``.
    """
    fast = net(name, sizes._replace(depth=1))
    plain = fast.clone(attention="xla", form="dual")
    params = fresh(plain, 0)
    (value, ours), (exact, due) = (
        jax.jit(jax.value_and_grad(loss(module)))(params, tokens) for module in (fast, plain)
    )
    gap = optax.tree.norm(jax.tree.map(jnp.subtract, ours, due))
    return {
        "loss": float(abs(value - exact) / exact),
        "gradient": float(gap / optax.tree.norm(due)),
    }


def summary(trained: Trained, rate: float, tokens: int) -> Mapping[str, Any]:
    """What a row says of a training with so many tokens a step."""
    speed = trained.steps * tokens / trained.seconds if trained.seconds else None
    return {
        "rate": rate,
        "finished": trained.finished,
        "tokens_per_second": None if speed is None else round(speed),
        "training_losses": [round(value, 4) for value in trained.losses],
    }
