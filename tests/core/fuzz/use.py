"""What a user does next with the result of a factory: one small use, to be traced."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from tests.core.fuzz import things
from ttt_jax import AdapterState, base

_PER_IMAGE = (things.PARAMS, things.IMAGE, things.KEY)
_PER_BATCH = (things.PARAMS, things.IMAGES, things.KEY)


def loss(result: Any, arguments: tuple = _PER_IMAGE) -> Any:
    """The value of a loss, with a memory or without."""
    params, *rest = arguments
    if isinstance(result, base.StatefulLoss):
        value, memory = result.value(params, result.init(params), *rest)
        return value, result.after(params, memory)
    return result(*arguments)


def predictor(result: Any, arguments: tuple = _PER_IMAGE) -> Any:
    """One prediction of a predictor, or two steps of a stream."""
    if isinstance(result, base.FromSource):
        result = result.build(result.measure(things.PARAMS, things.IMAGES))
    if isinstance(result, base.Stream):
        return stream(result, arguments)
    return result(*arguments)


def stream(result: base.Stream, arguments: tuple = _PER_IMAGE) -> Any:
    params, x, key = arguments
    carry = result.init(params)
    carry, first = result.step(params, carry, x, key)
    return first, result.step(params, carry, x, key)


def adapter(result: base.Adapter, arguments: tuple = _PER_IMAGE) -> Any:
    params, x, key = arguments
    state, info = result.step(params, result.init(params), x, key)
    return result.merge(params, state), info


def reset(result: base.Reset) -> Any:
    """Two steps of a stream that may be reset."""
    state, other = (
        AdapterState({"a": jnp.full(2, value)}, (), (), jnp.zeros((), jnp.int32))
        for value in (1.0, 2.0)
    )
    info = base.Info(jnp.ones(1), jnp.ones(1), jnp.ones((), bool), jnp.ones((), bool))
    first = result.apply(result.init(), state, other, jnp.ones(3), info, things.KEY)
    return first, result.apply(first[0], first[1], other, jnp.ones(3), info, things.KEY)


def selection(result: base.Selection) -> Any:
    """The chosen parameters."""
    return result.split(things.PARAMS)[0]


def view(result: Any) -> Any:
    return result(things.COLORS, things.KEY)


def of_batch(use: Any) -> Any:
    """The same use with a batch as the instance."""
    return functools.partial(use, arguments=_PER_BATCH)


def model(result: Any) -> Any:
    return result(things.PARAMS, things.IMAGES)


def collected(result: Any) -> Any:
    return result(things.PARAMS, things.IMAGES)


def many(result: Any) -> Any:
    return result(things.PARAMS, things.IMAGES, things.KEYS)


def labeled(result: Any) -> Any:
    return result(things.PARAMS, things.IMAGE, 1, things.KEY)


def pair(result: Any) -> Any:
    return result(things.PARAMS, (things.IMAGE, 1), things.KEY)


def metric(result: Any) -> Any:
    sums = result.of(things.LOGITS, things.OTHER_LOGITS, things.examples())
    return sums, result.value(jax.tree.map(lambda leaf: leaf.sum(0), sums))


def first(result: Any) -> Any:
    """The first item of a stream of data."""
    return next(iter(result))
