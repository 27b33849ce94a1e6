"""Pages of books to train on: each of any place, or going on where the last step stopped.

A net that was trained on short texts from its initial state alone meets states it never saw once
it reads on. State passing (Ruiz and Gu, 2025, https://arxiv.org/abs/2507.02782) has a share of the
sequences go on in their book from the state after the page before, without a gradient to it: the
tokens of a step are as many.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import layer_nets, layer_texts
from experiments import launch
from ttt_jax import losses, models
from ttt_jax.losses.tokens import token_nats


class Books(NamedTuple):
    """The training books with a page or more, on the device.

    Attributes:
      tokens: of all, one after the other.
      room: int32 ``[books]``, beginnings of pages up to the end of each book.
      shift: int32 ``[books]``, what is added to the number of a beginning to have its place.
      ends: int32 ``[books]``, one past the last place of each.
    """

    tokens: jax.Array
    room: jax.Array
    shift: jax.Array
    ends: jax.Array


def books_of(texts: layer_texts.Texts, length: int) -> Books:
    """The books with at least ``length`` tokens.

    Raises:
      UserError: no such book.
    """
    books = [book for book in texts.books["train"] if len(book) >= length]
    if not books:
        raise launch.UserError(f"no training book has {length} tokens; choose a smaller --length.")
    sizes = np.array([len(book) for book in books])
    return Books(
        jnp.asarray(np.concatenate(books)),
        jnp.asarray(np.cumsum(sizes - length + 1)),
        jnp.arange(len(books)) * (length - 1),
        jnp.asarray(np.cumsum(sizes)),
    )


def place(books: Books, key: jax.Array) -> jax.Array:
    """The place of a page, every one as probable."""
    start = jax.random.randint(key, (), 0, books.room[-1])
    return start + books.shift[jnp.searchsorted(books.room, start, side="right")]


def page(books: Books, begin: jax.Array, length: int) -> jax.Array:
    """Int32 ``[length]`` from a place on."""
    return jax.lax.dynamic_slice_in_dim(books.tokens, begin, length).astype(jnp.int32)


def next_token(module: models.Decoder) -> Callable[[Any, Any], jax.Array]:
    """``(params, tokens [N, T]) -> mean nats``."""
    loss = losses.next_token(module.apply, batch=True)
    return lambda params, tokens: loss(params, tokens, jax.random.key(0))


def anywhere(
    module: models.Decoder, *, length: int, rows: int, steps_per_call: int
) -> layer_nets.Training:
    """Every page of any place."""

    def draw(books: Books, key: jax.Array) -> jax.Array:
        begin = jax.vmap(place, (None, 0))(books, jax.random.split(key, rows))
        return jax.vmap(page, (None, 0, None))(books, begin, length)

    return layer_nets.without_memory(next_token(module), draw, steps_per_call)


class Stopped(NamedTuple):
    """Where the sequences of the last step stopped.

    Attributes:
      place: int32 ``[N]``, where the next page begins.
      cache: of the decoder after the last one.
    """

    place: jax.Array
    cache: Any


def on(
    module: models.Decoder, *, length: int, rows: int, steps_per_call: int, fresh: float
) -> layer_nets.Training:
    """Pages that go on in their book, from the state after the one before.

    Args:
      module: with TTT layers, whose state is as large after any number of tokens.
      length: tokens of a page.
      rows: sequences of a step.
      steps_per_call: of a compiled call.
      fresh: share of the sequences that begin anew, at any place, with each step; others do where
        their book has no further page.
    """

    def draw(books: Books, key: jax.Array, memory: Stopped) -> tuple[jax.Array, Stopped]:
        choice, where = jax.random.split(key)
        anew = jax.vmap(place, (None, 0))(books, jax.random.split(where, rows))
        # A page that ends beyond its book begins in another: the next place is the book's own.
        ends = books.ends[jnp.searchsorted(books.ends, memory.place - 1, side="right")]
        first = memory.cache.length == 0
        begins = first | (memory.place + length > ends)
        begins |= jax.random.uniform(choice, (rows,)) < fresh
        begin = jnp.where(begins, anew, memory.place)
        cache = memory.cache._replace(length=jnp.where(begins, 0, memory.cache.length))
        tokens = jax.vmap(page, (None, 0, None))(books, begin, length)
        return tokens, Stopped(begin + length, cache)

    def loss(params: Any, tokens: jax.Array, memory: Stopped) -> tuple[jax.Array, Stopped]:
        logits, cache = module.apply(params, tokens, memory.cache)  # type: ignore[misc]
        value = token_nats(logits[:, :-1], tokens[:, 1:]).mean()
        return value, jax.lax.stop_gradient(memory._replace(cache=cache))

    empty = Stopped(jnp.zeros(rows, jnp.int32), module.empty_cache(rows, length))
    return layer_nets.Training(loss, draw, empty, steps_per_call)
