"""Trains the model of the README, writes it and its blurred digits into the package.

Command: ``python -m experiments.prepare.demo``; about a minute on two CPU cores.

Trains on the first 1257 training digits of scikit-learn's set. The last 180, under motion blur of
severity 5, chose corruption and settings: 35.0 % of them are wrong before and 27.8 % after MEMO, at
step sizes 0.01 and 0.03 alike. The 360 test digits, which are shown, chose nothing.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

import ttt_jax
from experiments import launch
from ttt_jax import data, models
from ttt_jax.data import corruptions
from ttt_jax.views.image import shift

_PACKAGE = pathlib.Path(ttt_jax.__file__).parent
_NUM_STEPS = 700
_BATCH_SIZE = 64
_CORRUPTION, _SEVERITY = "motion_blur", 5


def blurred(digits: data.Batch) -> np.ndarray:
    """The images under the shift of the example, float32 ``[N, 8, 8, 1]``."""
    images = [
        corruptions.corrupt(image, _CORRUPTION, _SEVERITY, seed=(0, int(number)))
        for image, number in zip(digits.image, digits.id, strict=True)
    ]
    return np.stack(images).astype(np.float32)


def _turned(image: jax.Array, turns: jax.Array) -> jax.Array:
    return jax.lax.switch(turns, [lambda x, k=k: jnp.rot90(x, k) for k in range(4)], image)


def train(digits: data.Batch) -> dict[str, Any]:
    """The variables of the model after joint training on classes and rotations."""
    net = models.ResNet(depth=8, width=8, norm="batch", conv="lax")
    variables = jax.jit(lambda key: models.init(net, key, (8, 8, 1)))(jax.random.key(0))
    schedule = optax.cosine_decay_schedule(5e-3, _NUM_STEPS)
    optimizer = optax.adamw(schedule, weight_decay=1e-3)
    images, labels = jnp.asarray(digits.image), jnp.asarray(digits.label)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels

    def loss(params, statistics, batch, classes, turns):
        def run(statistics, inputs, method):
            state = {"params": params, "batch_stats": statistics}
            logits, changed = net.apply(
                state, inputs, train=True, mutable=["batch_stats"], method=method
            )
            return logits, changed["batch_stats"]

        logits, statistics = run(statistics, batch, "__call__")
        rotated, statistics = run(statistics, jax.vmap(_turned)(batch, turns), "rotation")
        total = cross_entropy(logits, classes).mean() + cross_entropy(rotated, turns).mean()
        return total, statistics

    def step(carry, number):
        variables, state = carry
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), number), 3)
        rows = jax.random.randint(keys[0], (_BATCH_SIZE,), 0, len(labels))
        batch = jax.vmap(shift(1))(images[rows], jax.random.split(keys[1], _BATCH_SIZE))
        turns = jax.random.randint(keys[2], (_BATCH_SIZE,), 0, 4)
        gradient, statistics = jax.grad(loss, has_aux=True)(
            variables["params"], variables["batch_stats"], batch, labels[rows], turns
        )
        updates, state = optimizer.update(gradient, state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return ({"params": params, "batch_stats": statistics}, state), None

    start = variables, optimizer.init(variables["params"])
    (variables, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(_NUM_STEPS)))(
        start
    )
    return variables


def main(argv: Sequence[str]) -> None:
    """Writes ``models/demo.npz`` and ``data/demo.npz``."""
    del argv
    variables = train(data.load("tfds:digits", "train[:1257]").arrays())
    leaves = {name: np.float16(leaf) for name, leaf in flatten_dict(variables, sep="/").items()}
    launch.write_npz(_PACKAGE / "models" / "demo.npz", leaves, compressed=True)
    digits = data.load("tfds:digits", "test").arrays()
    pixels = {"clean": digits.image, "image": blurred(digits)}
    stored = {name: np.rint(255 * value).astype(np.uint8) for name, value in pixels.items()}
    stored["label"] = digits.label.astype(np.uint8)
    launch.write_npz(_PACKAGE / "data" / "demo.npz", stored, compressed=True)


if __name__ == "__main__":
    launch.run(main)
