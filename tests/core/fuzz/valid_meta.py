"""Right calls of outer training."""

import jax.numpy as jnp

import ttt_jax as ttt
from tests.core.fuzz import things, use
from tests.core.fuzz.calls import Table

NOTHING_TO_SLIP: set[str] = set()
TABLE = Table()
add = TABLE.add


def _of_many(call):
    keys = ttt.sample_keys(things.KEY, range(len(things.IMAGES)))
    return call(things.PARAMS, things.IMAGES, keys)


add(
    "meta.adapted_loss",
    ttt.meta.adapted_loss,
    use.loss,
    adapter=things.ADAPTER,
    loss=things.entropy,
    num_steps=2,
    first_order=False,
    remat=1,
)
add(
    "meta.value_and_grad",
    ttt.meta.value_and_grad,
    _of_many,
    outer_loss=things.entropy,
    chunk_size=2,
    report=True,
)
add(
    "meta.scan",
    ttt.meta.scan,
    body=lambda carry, x: (carry + x, carry),
    start=jnp.float32(0.0),
    xs=jnp.ones(4),
    remat=2,
    kinds={"start": None},
)
