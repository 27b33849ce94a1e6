"""Loss by position, with all that came before and with what was read dropped now and then."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import layer_texts
from benchmarks.discovery import interval
from ttt_jax import models
from ttt_jax.losses.tokens import token_nats

# Times the length of the training that is read.
LONGER = 8
# Points of a curve in a length of the training.
POINTS = 4


def scorer(module: models.Decoder, digits: np.ndarray) -> Callable[..., Any]:
    """``(params, tokens [N, T]) -> nats [N, T], most probable digit [N, T]``, compiled.

    The first token has no score.
    """

    @jax.jit
    def run(params: Any, tokens: jax.Array) -> Any:
        logits = module.apply(params, tokens)[:, :-1]
        nats = token_nats(logits, tokens[:, 1:])
        # One digit after another: a slice of several is a copy of all logits' rows.
        guesses = jnp.stack([logits[..., int(digit)] for digit in digits], -1).argmax(-1)
        return tuple(jnp.pad(leaf, ((0, 0), (1, 0))) for leaf in (nats, guesses))

    return run


def scored(
    run: Callable[..., Any], params: Any, tokens: np.ndarray, rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """A scorer's results, so many rows at once; the last call is filled up."""
    made = []
    for first in range(0, len(tokens), rows):
        part = tokens[first : first + rows]
        filled = np.concatenate([part, np.repeat(part[:1], rows - len(part), 0)])
        made.append([np.asarray(leaf)[: len(part)] for leaf in run(params, jnp.asarray(filled))])
    nats, guesses = (np.concatenate(leaves) for leaves in zip(*made, strict=True))
    return nats, guesses


def by_book(values: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """The mean of each book."""
    return np.array([values[owners == owner].mean() for owner in np.unique(owners)])


def curve(nats: np.ndarray, length: int) -> list[float]:
    """Mean nats of each part of a length; the first token of each length counts for neither way."""
    counted = np.arange(nats.shape[1]) % length != 0
    step = max(length // POINTS, 2)
    parts = range(0, nats.shape[1], step)
    return [
        round(float(nats[:, at : at + step][:, counted[at : at + step]].mean()), 5) for at in parts
    ]


def positions(
    run: Callable[..., Any], params: Any, texts: layer_texts.Texts, settings: Any
) -> dict[str, Any]:
    """Loss by position on the test books, whole and in lengths of the training, and the gains."""
    length = settings.length
    tokens, owners = layer_texts.spans(texts.books["test"], LONGER * length, settings.spans)
    whole, _ = scored(run, params, tokens, settings.score_rows)
    cut = tokens.reshape(-1, length)
    reset = scored(run, params, cut, settings.rows)[0].reshape(tokens.shape)
    counted = np.arange(tokens.shape[1]) % length != 0
    sizes = np.array([len(piece) for piece in texts.pieces])
    size = sizes[tokens[:, counted]].sum() * np.log(2)
    row: dict[str, Any] = {
        "sequences": len(tokens),
        "books": len(np.unique(owners)),
        "curve": curve(whole, length),
        "curve_reset": curve(reset, length),
        "bits_per_byte": float(whole[:, counted].sum() / size),
        "bits_per_byte_reset": float(reset[:, counted].sum() / size),
    }
    for name, first in (("gain", length), ("late_gain", length // 2)):
        last = slice(tokens.shape[1] - first + (first == length), None)
        gains = by_book((reset - whole)[:, last].mean(1), owners)
        row |= {name: float(gains.mean()), f"{name}_interval": interval(gains)}
    return row
