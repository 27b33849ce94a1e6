"""Right calls of layers that learn while they read."""

import functools

import jax
import numpy as np
import optax

from tests.core.fuzz.calls import Table
from tests.layers import formulas
from ttt_jax import diagnostics, layers
from ttt_jax.layers import inner_losses, inner_optimizers, memories, retentions

TABLE = Table()
NOTHING_TO_SLIP = ("layers.retentions.keep", "layers.inner_optimizers.momentum")
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
    form="dual",
    remat=2,
    kinds={"length": "count"},
    ranges={"cache": STATE, "length": 5},
    allowed=ALIKE,
)

WEIGHT = np.ones((4, 3), np.float32)
KEYS = np.ones((TOKENS, 4), np.float32)
VALUES = np.ones((TOKENS, 3), np.float32)
DECAY, SGD = retentions.decay(), optax.sgd(1.0)
add(
    "layers.fast_state",
    layers.fast_state,
    weights=(WEIGHT,),
    retention=DECAY,
    optimizer=SGD,
    kinds={"weights": "record", "retention": "record"},
)
add(
    "layers.fast_weight",
    layers.fast_weight,
    q=KEYS,
    k=2 * KEYS,
    v=VALUES,
    rates=layers.Rates(np.ones(TOKENS, np.float32), np.ones(TOKENS, np.float32)),
    state=layers.fast_state((WEIGHT,), retention=DECAY, optimizer=SGD),
    memory=memories.linear(),
    retention=DECAY,
    optimizer=SGD,
    segments=np.array([0, 0, 1, 1]),
    kinds={name: "record" for name in ("rates", "state", "memory", "retention", "v")}
    | {"segments": "labels"},
    ranges={
        "rates": layers.Rates(np.ones(3, np.float32)),
        "v": VALUES[:3],
        "reads": "during",
        "chunk_size": 2,
    },
    # Numbers of segments are any; "fewer" is tested.
    allowed="q: swapped with k, segments: out of range",
)


def memory_used(memory):
    weights = memory.init(jax.random.key(0), 4, 4)
    return memory.predict(weights, KEYS[0]), memory.read(weights, KEYS[0])


LAYER_NORM = (np.ones(4, np.float32), np.zeros(4, np.float32))
add = TABLE.add
add("layers.memories.linear", memories.linear, memory_used, bias=True)
add("layers.memories.mlp", memories.mlp, memory_used, hidden=2)
add("layers.memories.swiglu", memories.swiglu, memory_used, hidden=2)
add(
    "layers.memories.residual",
    memories.residual,
    memory_used,
    memory=memories.linear(),
    norm=LAYER_NORM,
)
add(
    "layers.memories.ridge",
    memories.ridge,
    memory_used,
    penalty=KEYS[0],
    ranges={"steps": 0},
    allowed="penalty: nan",
)
PAIR = {"prediction": VALUES[0], "target": 2 * VALUES[0]}
# Both are vectors, and the losses the same both ways.
SWAPPED = "prediction: swapped with target"
add("layers.inner_losses.squared", inner_losses.squared, **PAIR, allowed=SWAPPED)
add("layers.inner_losses.dot_product", inner_losses.dot_product, **PAIR, allowed=SWAPPED)
add(
    "layers.inner_losses.power",
    inner_losses.power,
    lambda loss: loss(*PAIR.values()),
    exponent=3.0,
    ranges={"exponent": 1.0},
)
add(
    "layers.inner_losses.huber",
    inner_losses.huber,
    prediction=VALUES[0],
    target=(VALUES[0], np.float32(1.0)),
    kinds={"target": "record"},
)
add(
    "layers.inner_losses.sums",
    inner_losses.sums,
    prediction=(np.float32(1.0), VALUES[0]),
    target=VALUES[0],
    kinds={"prediction": "record"},
)


def retention_used(retention):
    state = {"w": np.full((4, 3), 2.0, np.float32)}
    kept = retention.init(state)
    faded = retention.decay(state, np.float32(0.5), kept)
    return retention.link(retention.after(faded, kept))


add("layers.retentions.decay", retentions.decay, retention_used)
add("layers.retentions.elastic", retentions.elastic, retention_used)
add("layers.retentions.kl", retentions.kl, retention_used, total=2.0, ranges={"total": 0.0})
add(
    "layers.retentions.power_norm",
    retentions.power_norm,
    retention_used,
    exponent=4.0,
    ranges={"exponent": 1.0},
)
add("layers.retentions.norms", retentions.norms, retention_used, ranges={"epsilon": -1.0})
add(
    "layers.inner_optimizers.orthogonal",
    inner_optimizers.orthogonal,
    lambda optimizer: optimizer.update({"w": WEIGHT}, optimizer.init({})),
    kinds={"coefficients": "record"},
    ranges={"epsilon": -1.0, "coefficients": ((1.0, 2.0),)},
)
FAST = layers.memories.linear()
ROWS = (*[np.ones((4, 3), np.float32)] * 3, layers.Rates(np.full(4, 0.1, np.float32)))
add(
    "diagnostics.inner_steps",
    diagnostics.inner_steps,
    layer=functools.partial(layers.fast_weight, memory=FAST, chunk_size=2),
    rows=ROWS,
    state=layers.fast_state((np.ones((3, 3), np.float32),)),
    memory=FAST,
    chunk_size=2,
    within=FAST,
    kinds={name: "record" for name in ("rows", "state", "memory", "retention", "within")},
    ranges={"rows": ROWS[:3], "chunk_size": 5},
)
add(
    "diagnostics.ttt_steps",
    diagnostics.ttt_steps,
    **{name: GIVEN[name] for name in ("k", "v", "gate", "scale")},
    state=STATE,
    norm=NORM,
    ranges={"state": STATE[:1], "norm": NORM[:1]},
    allowed="k: swapped with v",
)
