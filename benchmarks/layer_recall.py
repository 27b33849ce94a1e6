"""Multi-query associative recall: pairs that a net has seen are asked for (Arora et al., 2023)."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import layer_nets
from ttt_jax import models
from ttt_jax.losses.tokens import masked_mean, token_nats

LENGTH, PAIRS = 256, (4, 8, 16, 32, 64)
# Of the distances between a pair and its query: most are asked for soon (Arora et al., 2023).
_POWER = 0.01


class Recall(NamedTuple):
    """Sequences of multi-query associative recall.

    Attributes:
      tokens: int32 ``[N, T]``.
      answers: int32 ``[N, T]``, the value that follows a query.
      asked: bool ``[N, T]``, whether a token is a query.
    """

    tokens: jax.Array
    answers: jax.Array
    asked: jax.Array


def recall(key: Any, rows: int, *, pairs: int, length: int, vocabulary: int) -> Recall:
    """Pairs of a key and a value, then each key once again, among random tokens.

    Keys are of the lower half of the vocabulary, values of the upper; no key comes twice. A query
    stands an even number of tokens after the pairs, drawn without replacement with a density of
    ``0.01 x^(0.01 - 1)``. All other tokens are random, of the whole vocabulary, but for the keys of
    the sequence, which would be queries as well.

    Args:
      key: of the draws; it is consumed.
      rows: N.
      pairs: of each sequence.
      length: T, at least ``4 * pairs``.
      vocabulary: tokens, an even number of at least ``4 * pairs``.

    References:
      Arora et al., `Zoology <https://arxiv.org/abs/2312.04927>`_, 2023, section 3 and appendix.
    """
    if length < 4 * pairs or vocabulary < 4 * pairs:
        raise ValueError(
            "length and vocabulary must be at least 4 * pairs; got "
            f"length={length}, vocabulary={vocabulary} and pairs={pairs}."
        )
    half, room = vocabulary // 2, (length - 2 * pairs) // 2
    weights = _POWER * jnp.arange(1, room + 1, dtype=jnp.float32) ** (_POWER - 1)

    def sequence(key: Any) -> Recall:
        parts = jax.random.split(key, 4)
        # Of half the vocabulary, shuffled: keys, and behind them what is no key.
        order = jax.random.permutation(parts[0], half)
        keys = order[:pairs]
        values = half + jax.random.randint(parts[1], (pairs,), 0, half)
        # Without replacement, by Gumbel's maxima.
        noise = jax.random.gumbel(parts[2], (room,))
        gaps = jax.lax.top_k(jnp.log(weights) + noise, pairs)[1]
        filling = jax.random.randint(parts[3], (length,), pairs, vocabulary)
        tokens = jnp.where(filling < half, order[jnp.minimum(filling, half - 1)], filling)
        tokens = tokens.at[: 2 * pairs].set(jnp.stack([keys, values], 1).reshape(-1))
        places = 2 * pairs + 2 * gaps
        answers = jnp.zeros(length, jnp.int32).at[places].set(values)
        asked = jnp.zeros(length, bool).at[places].set(True)
        return Recall(tokens.at[places].set(keys), answers, asked)

    return jax.vmap(sequence)(jax.random.split(key, rows))


def mixed(key: Any, rows: int, counts: Sequence[int], **sizes: int) -> Recall:
    """As many sequences of each number of pairs."""
    keys = jax.random.split(key, len(counts))
    parts = [
        recall(each, rows // len(counts), pairs=pairs, **sizes)
        for each, pairs in zip(keys, counts, strict=True)
    ]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def sizes_of(settings: Any) -> layer_nets.Sizes:
    """Of the nets that recall: a window as long as half the pairs that most texts have."""
    return layer_nets.Sizes(
        vocabulary=settings.recall_vocabulary,
        width=2 * layer_nets.HEAD_SIZE,
        depth=2,
        mlp_width=4 * layer_nets.HEAD_SIZE,
        window=LENGTH // 4,
        backbone=settings.backbone,
        form=settings.form,
        attention=settings.attention,
    )


def answer_loss(module: models.Decoder) -> Callable[[Any, Any], jax.Array]:
    """Mean nats of the answers."""

    def loss(params: Any, given: Recall) -> jax.Array:
        nats = token_nats(module.apply(params, given.tokens), given.answers)
        return masked_mean(nats, given.asked)

    return loss


def rows_of(name: str, settings: Any, deadline: float) -> Iterator[dict[str, Any]]:
    """A row of each training: the share of right answers by the number of pairs."""
    module = layer_nets.net(name, sizes_of(settings))
    shape = {"length": LENGTH, "vocabulary": settings.recall_vocabulary}
    draw = functools.partial(mixed, rows=settings.recall_rows, counts=PAIRS, **shape)
    per_call = min(100, settings.recall_steps)
    training = layer_nets.without_memory(answer_loss(module), lambda data, key: draw(key), per_call)
    program = layer_nets.program(training)

    @jax.jit
    def right(params: Any, key: Any) -> jax.Array:
        given = draw(key)
        hits = (module.apply(params, given.tokens).argmax(-1) == given.answers) & given.asked
        parts = (leaf.reshape(len(PAIRS), -1).sum(1) for leaf in (hits, given.asked))
        return jnp.stack(list(parts))

    def shares(params: Any, role: int) -> np.ndarray:
        # Never the keys of a training, which are of seeds, folded with the number of the step.
        keys = jax.random.split(jax.random.key(1_000_003 + role), 4)
        hits, asked = sum(np.asarray(right(params, key)) for key in keys)
        return hits / asked

    def training_row(seed: int, rate: float) -> dict[str, Any]:
        start = layer_nets.fresh(module, seed)
        calls = -(-settings.recall_steps // per_call)
        how = {"rate": rate, "calls": calls, "deadline": deadline}
        made = layer_nets.fit(program, training, start, (), seed=seed, **how)
        tokens = settings.recall_rows * LENGTH
        row = {"part": "recall", "net": name, "seed": seed, "chosen": False}
        row |= {"parameters": layer_nets.count(module)} | layer_nets.summary(made, rate, tokens)
        row["validation"] = float(shares(made.params, 0).mean()) if made.finished else -1.0
        if made.finished:
            by_pairs = shares(made.params, 1).round(4).tolist()
            row["right"] = {str(n): share for n, share in zip(PAIRS, by_pairs, strict=True)}
        return row

    first, *others = map(int, settings.seeds)
    rows = [training_row(first, float(rate)) for rate in settings.recall_rates]
    best = max(rows, key=lambda row: row["validation"])
    best["chosen"] = best["finished"]
    yield from rows
    for seed in others if best["chosen"] else ():
        row = training_row(seed, best["rate"])
        yield row | {"chosen": row["finished"]}
