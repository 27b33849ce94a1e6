"""A two-layer dense model over 6x6 images, as plain functions over a Linen-shaped dict.

It has everything that a loss, a selection or an adapter may ask for: a dense layer with
low-rank factors, a normalization with running statistics, and three heads.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax import StatefulLoss

SIDE, PATCH, WIDTH, CLASSES, RANK = 6, 3, 5, 3, 1
PATCHES = (SIDE // PATCH) ** 2
PIXELS = PATCH * PATCH


def make_params(seed: int = 0) -> dict:
    """Fresh arrays, none of them zero, with running statistics far from 0 and 1."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape, scale=scale), jnp.float32)

    def dense(rows: int, columns: int, scale: float) -> dict:
        return {
            "kernel": normal(rows, columns, scale=scale),
            "bias": normal(columns, scale=0.1),
        }

    return {
        "params": {
            "encoder": {
                **dense(SIDE * SIDE, WIDTH, 0.3),
                "kernel_lora_a": normal(SIDE * SIDE, RANK, scale=0.3),
                "kernel_lora_b": normal(RANK, WIDTH, scale=0.3),
            },
            "norm": {"scale": 1 + normal(WIDTH, scale=0.1), "bias": normal(WIDTH, scale=0.1)},
            "head": dense(WIDTH, CLASSES, 0.8),
            "rotation": {"kernel": normal(WIDTH, 4, scale=0.8)},
            "decoder": {"kernel": normal(WIDTH, PATCHES * PIXELS, scale=0.5)},
        },
        "batch_stats": {
            "norm": {"mean": normal(WIDTH, scale=0.3), "var": 1 + normal(WIDTH, scale=0.1) ** 2}
        },
    }


def make_images(count: int, seed: int = 1, *, batch: int | None = None) -> jax.Array:
    """``[N, 6, 6, 1]``, or ``[N, batch, 6, 6, 1]`` for losses over a batch."""
    shape = (count, SIDE, SIDE, 1) if batch is None else (count, batch, SIDE, SIDE, 1)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def hidden(params: dict, images: jax.Array) -> jax.Array:
    """The first layer before its normalization: ``[N, 6, 6, 1] -> [N, WIDTH]``."""
    flat = images.reshape(images.shape[0], -1)
    layer = params["params"]["encoder"]
    low_rank = (flat @ layer["kernel_lora_a"]) @ layer["kernel_lora_b"]
    return flat @ layer["kernel"] + low_rank + layer["bias"][None]


def features(params: dict, images: jax.Array) -> jax.Array:
    """``[N, 6, 6, 1] -> [N, WIDTH]``, normalized with the running statistics."""
    norm, stats = params["params"]["norm"], params["batch_stats"]["norm"]
    scale = norm["scale"] * jax.lax.rsqrt(stats["var"])
    normed = (hidden(params, images) - stats["mean"][None]) * scale[None] + norm["bias"][None]
    return jnp.tanh(normed)


def classify(params: dict, images: jax.Array) -> jax.Array:
    """``[N, 6, 6, 1] -> [N, CLASSES]``."""
    layer = params["params"]["head"]
    return features(params, images) @ layer["kernel"] + layer["bias"][None]


def turn(params: dict, images: jax.Array) -> jax.Array:
    """The rotation head: ``[N, 6, 6, 1] -> [N, 4]``."""
    return features(params, images) @ params["params"]["rotation"]["kernel"]


def reconstruct(params: dict, images: jax.Array, keep: jax.Array) -> jax.Array:
    """The decoder over the visible patches: ``[N, 6, 6, 1], [N, K] -> [N, P, pixels]``."""
    count = images.shape[0]
    grid = SIDE // PATCH
    shown = (keep[:, :, None] == jnp.arange(PATCHES)[None, None]).any(axis=1)
    shown = shown.reshape(count, grid, 1, grid, 1, 1).astype(images.dtype)
    visible = images.reshape(count, grid, PATCH, grid, PATCH, 1) * shown
    flat = features(params, visible.reshape(images.shape)) @ params["params"]["decoder"]["kernel"]
    return flat.reshape(count, PATCHES, PIXELS)


def decode(params: dict, images: jax.Array) -> jax.Array:
    """The decoder over every patch, as images: ``[N, 6, 6, 1] -> [N, 6, 6, 1]``."""
    flat = features(params, images) @ params["params"]["decoder"]["kernel"]
    return flat.reshape(images.shape)


def activations(params: dict, images: jax.Array) -> dict:
    """The first layer before its normalization and after it: two layers ``[N, WIDTH]``."""
    return {"hidden": hidden(params, images), "features": features(params, images)}


def batch_moments(params: dict, images: jax.Array) -> dict:
    """Statistics of the first layer over a batch, in the layout of ``select.statistics()``."""
    values = hidden(params, images)
    holes = jax.tree.map(lambda leaf: None, params["params"])
    stats = {"norm": {"mean": values.mean(axis=0), "var": values.var(axis=0)}}
    return {"params": holes, "batch_stats": stats}


def jitter(image: jax.Array, key: jax.Array) -> jax.Array:
    """A random view of one image: a shift of its brightness."""
    return image + jax.random.uniform(key, (), jnp.float32, -0.1, 0.1)


def moving_center(decay: float = 0.9) -> StatefulLoss:
    """Distance to a moving average of features, beside a teacher of the classifier's weights."""

    def init(params: dict) -> dict:
        return {"center": jnp.zeros(WIDTH), "teacher": params["params"]["head"]["kernel"]}

    def value(params: dict, memory: dict, x: jax.Array, key: jax.Array) -> tuple:
        found = features(params, x[None])
        logits = found @ params["params"]["head"]["kernel"]
        # Sharpened, so that the student has something to learn from its first step on.
        gap = jnp.square(logits - 1.5 * found @ memory["teacher"]).mean()
        center = decay * memory["center"] + (1 - decay) * jax.lax.stop_gradient(found[0])
        loss = jnp.square(found[0] - memory["center"]).mean() + gap
        return loss, {**memory, "center": center}

    def after(adapted: dict, memory: dict) -> dict:
        kernel = adapted["params"]["head"]["kernel"]
        return {**memory, "teacher": decay * memory["teacher"] + (1 - decay) * kernel}

    return StatefulLoss(init, value, after)


def snapshot(params: dict) -> list[bytes]:
    """The bytes of every leaf."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]
