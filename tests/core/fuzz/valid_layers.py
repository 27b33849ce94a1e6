"""Right calls of layers that learn while they read."""

import functools

import jax
import numpy as np

from tests.core.fuzz.calls import Table
from tests.layers import formulas
from ttt_jax import layers

TABLE = Table()
NOTHING_TO_SLIP = ()
add = functools.partial(TABLE.add, traced=True)

NAMES = ("q", "k", "v", "gate", "scale", "state", "norm")
TOKENS = 4
# Arrays of one shape cannot be told apart, nor a scale from gates where there are as many.
ALIKE = "q: swapped with k, k: swapped with v"


def arguments(depth):
    made = formulas.inputs(TOKENS, 4, depth, chunk=2)
    made = jax.tree.map(lambda leaf: leaf.astype(np.float32), made)
    return dict(zip(NAMES, made, strict=True))


for name, depth in (("linear", 1), ("mlp", 2)):
    add(
        f"layers.ttt_{name}",
        getattr(layers, f"ttt_{name}"),
        **arguments(depth),
        chunk_size=2,
        segments=np.array([0, 0, 0, 1]) if depth == 1 else None,
        form="primal",
        kinds={"segments": "labels" if depth == 1 else "tree"},
        ranges={
            "state": (arguments(3 - depth)["state"], arguments(depth)["state"][0]),
            "scale": np.ones(3, np.float32),
        },
        # Numbers of segments are any; "fewer" is tested.
        allowed=f"{ALIKE}, segments: out of range",
    )
GIVEN = arguments(1)
STATE, NORM = GIVEN.pop("state"), GIVEN.pop("norm")
add("layers.ttt_cache", layers.ttt_cache, state=STATE, ranges={"state": (STATE[::-1], STATE[:1])})
OF_CACHE = {"cache": layers.ttt_cache(STATE), "norm": NORM}
add(
    "layers.ttt_decode",
    layers.ttt_decode,
    **{name: GIVEN[name][0] for name in ("q", "k", "v")},
    gate=np.float32(0.1),
    scale=GIVEN["scale"],
    **OF_CACHE,
    ranges={"cache": STATE},
    kinds={"gate": "array"},
    allowed=ALIKE,
)
add(
    "layers.ttt_prefill",
    layers.ttt_prefill,
    **GIVEN,
    **OF_CACHE,
    length=3,
    kinds={"length": "count"},
    ranges={"cache": STATE, "length": 5},
    allowed=ALIKE,
)
