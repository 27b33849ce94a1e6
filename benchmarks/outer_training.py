"""Decoders, losses and passages of the benchmarks of training through inner steps."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ttt_jax as ttt
from experiments import launch
from ttt_jax import losses, methods, models

# Of the publication's 125 million parameters, and of its extension to longer texts.
BETAS = {"b1": 0.9, "b2": 0.95}
DECAY = 0.1
CLIP = 1.0


def decoder(settings: Any, vocabulary: int) -> models.Decoder:
    """A decoder under a window, whose last quarter of layers is a stage of its own."""
    last = max(1, settings.depth // 4)
    return models.Decoder(
        vocabulary=vocabulary,
        width=settings.width,
        depth=settings.depth,
        heads=settings.heads,
        stages=(settings.depth - last, last),
        window=settings.window,
        query_key_norm=True,
        # Fused attention has no second derivative.
        attention="xla",
        cache_gradients=True,
        dtype=jnp.dtype(settings.dtype),
    )


def inner(rate: Any) -> optax.GradientTransformation:
    """The published step, of a size that may be traced."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate))


def predictor(rule: str, module: models.Decoder, rate: Any, **gradient: Any) -> ttt.Predictor:
    """Scores a document ``[T, L]``; ``window`` is without steps."""
    read = models.reader(module)
    if rule == "in_place":
        select = ttt.select.paths(".*layers_1/mlp/down/kernel")
        return methods.in_place(read, optimizer=optax.sgd(rate), select=select, **gradient)
    steps = 0 if rule == "window" else 1
    return methods.end_to_end(read, optimizer=inner(rate), num_steps=steps, **gradient)


def mean_nats(rule: str, module: models.Decoder, **gradient: Any) -> Callable[..., jax.Array]:
    """The outer loss: ``(params, documents [N, T, L], step size) -> scalar``."""

    def loss(params: Any, tokens: jax.Array, rate: Any) -> jax.Array:
        predict = predictor(rule, module, rate, **gradient)
        # The first token of a document has no score; the methods over documents draw nothing.
        alone = lambda x: predict(params, x, jax.random.key(0))[0].sum() / (x.size - 1)  # noqa: E731
        return jax.vmap(alone)(tokens).mean()

    return loss


def full_nats(module: models.Decoder) -> Callable[..., jax.Array]:
    """The same of full attention, in one call."""
    whole = module.clone(window=None, attention="fused", cache_gradients=False)
    loss = losses.next_token(whole.apply, batch=True)

    def mean(params: Any, tokens: jax.Array, rate: Any) -> jax.Array:
        del rate
        return loss(params, tokens.reshape(len(tokens), -1), jax.random.key(0))

    return mean


def outer() -> optax.GradientTransformation:
    """AdamW of step size 1 upwards; a training multiplies it by its own."""
    return optax.chain(
        optax.clip_by_global_norm(CLIP),
        optax.scale_by_adam(**BETAS),
        optax.add_decayed_weights(DECAY, lambda params: jax.tree.map(_decays, params)),
    )


def _decays(leaf: jax.Array) -> bool:
    # Layers are stacked: norms have two axes.
    return leaf.ndim > 2


def draws(rows: Sequence[np.ndarray], settings: Any, seed: int) -> Iterator[np.ndarray]:
    """Passages ``[N, T, L]`` of the training books, each start as likely as another."""
    length = settings.length
    long = [row for row in rows if len(row) >= length]
    if not long:
        raise launch.UserError(f"no training book has {length} tokens; choose a smaller --length.")
    ends = np.cumsum([len(row) - length + 1 for row in long])
    rng = np.random.default_rng(seed)
    while True:
        places = rng.integers(ends[-1], size=settings.rows)
        which = np.searchsorted(ends, places, side="right")
        starts = places - np.concatenate([[0], ends])[which]
        drawn = [long[w][s : s + length] for w, s in zip(which, starts, strict=True)]
        yield np.stack(drawn).astype(np.int32).reshape(settings.rows, -1, settings.chunk)
