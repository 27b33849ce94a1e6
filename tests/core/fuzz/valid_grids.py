"""Right calls of what learns pairs of grids."""

import jax
import numpy as np
import optax

from tests.core.fuzz.calls import Table
from ttt_jax import losses, methods, models, select
from ttt_jax.data import grid_sequences

TABLE = Table()
NOTHING_TO_SLIP = ()
add = TABLE.add
GRID = np.array([[1, 2], [3, 4]])
SEQUENCE = grid_sequences.encode(GRID, GRID)
ITEMS = [grid_sequences.Item(SEQUENCE, 0, 0)]
[(BATCH, _)] = grid_sequences.pack(ITEMS, 1, 32, 2)
BATCH = BATCH._asdict()
NET = models.GridDecoder(tasks=1, width=16, depth=1, heads=1, mlp_width=16, attention="xla")
PARAMS = NET.init(jax.random.key(0), BATCH)
PREFIX = {name: BATCH[name][:, :16] for name in ("token", "row", "column", "part")}
PREFIX |= {"length": np.array([16]), "task": np.array([0]), "view": np.array([0])}
KEY = jax.random.key(0)

add(
    "losses.packed_sequences",
    losses.packed_sequences,
    lambda result: result(PARAMS, BATCH, KEY),
    apply=NET.apply,
    power=0.5,
    kinds={"power": "number"},
    ranges={"power": 2.0},
)
add(
    "losses.sequence_sums",
    losses.sequence_sums,
    logits=np.zeros((1, 32, 12), np.float32),
    batch=BATCH,
    kinds={"batch": "record"},
)
add(
    "models.complete_grids",
    models.complete_grids,
    module=NET,
    params=PARAMS,
    inputs=PREFIX,
    slots=24,
    num_tokens=2,
    axis_name=None,
    kinds={"inputs": "record", "params": "params", "axis_name": "text"},
    ranges={"slots": (0, 8), "num_tokens": 0, "axis_name": "rows"},
)
ROWS = {**BATCH, "example": np.zeros((1, 2), np.int32)}
# A batch of two tasks.
TWO = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), ROWS)
add(
    "methods.few_shot_ttt",
    methods.few_shot_ttt,
    lambda result: result(PARAMS, {"demonstrations": ROWS}, KEY)[0],
    answer=lambda params, x: params["params"]["task"],
    logits=NET.apply,
    optimizer=optax.sgd(0.1),
    select=select.paths("params/task"),
    num_steps=2,
    rows=1,
    held_out=1,
    every=1,
    trace=False,
    ranges={"num_steps": -1, "rows": (0, 2), "held_out": -1, "every": (0, 3)},
)
add(
    "methods.few_shot_adapter",
    methods.few_shot_adapter,
    lambda result: result(PARAMS, {"demonstrations": ROWS}, KEY)[0],
    logits=NET.apply,
    optimizer=optax.sgd(0.1),
    select=select.paths("params/task"),
    num_steps=2,
    rows=1,
    held_out=1,
    every=1,
    ranges={"num_steps": -1, "rows": (0, 2), "held_out": -1, "every": (0, 3)},
)
add(
    "methods.few_shot_shared",
    methods.few_shot_shared,
    lambda result: result(PARAMS, {"demonstrations": TWO}, KEY)[0],
    answer=lambda params, x: params["params"]["task"],
    logits=NET.apply,
    optimizer=optax.sgd(0.1),
    select=select.paths("params/task"),
    num_steps=2,
    rows=1,
    batch=True,
    ranges={"num_steps": -1, "rows": (0, 2), "batch": False},
)
DECODED = SEQUENCE.label[SEQUENCE.label >= 0]
add(
    "data.grid_sequences.encode",
    grid_sequences.encode,
    input=GRID,
    output=GRID,
    colors=tuple(range(10)),
    kinds={"input": "record", "output": "record", "colors": "record"},
    ranges={"input": (GRID[0], GRID + 9, GRID * 0.5), "colors": ((1,) * 10, (0, 1))},
)
add("data.grid_sequences.decode", grid_sequences.decode, tokens=DECODED, kinds={"tokens": "array"})
add(
    "data.grid_sequences.length_of",
    grid_sequences.length_of,
    input=GRID,
    output=GRID,
    kinds={"input": "record", "output": "record"},
)
add(
    "data.grid_sequences.pack",
    grid_sequences.pack,
    lambda batches: jax.tree.leaves(list(batches)),
    items=ITEMS,
    rows=1,
    length=32,
    most=2,
    patience=3,
    kinds={"items": "record"},
    ranges={"rows": 0, "length": (0, 16), "most": 0, "patience": 0},
)
add(
    "data.grid_sequences.empty",
    grid_sequences.empty,
    rows=1,
    length=32,
    most=2,
    ranges={"rows": 0, "length": 0, "most": 0},
)
