"""AugMix (Hendrycks et al. 2020) as MEMO has it on CIFAR, in JAX: one random view of one image.

``augmix(image[H, W, C] in [0, 1], key) -> image``: a random mean of the image and of three chains
of one to three operations. Operations, levels and draws are those of github.com/zhangmarvin/memo,
``cifar-10-exps/utils/third_party.py``, which differ from github.com/google-research/augmix in
severity 1 rather than 3 and in the fill. The operations are Pillow's, on integers 0 to 255.
There the mean is taken of images after normalization: as the weights add up to 1, it is this one.
The random crop and flip that go before are left to the caller.

Nothing branches on a drawn value, so under ``vmap`` every operation costs the same: one look-up of
values (of which there are 256) and one of pixels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax import _arguments

__all__ = [
    "OPERATIONS",
    "Draw",
    "affine_matrices",
    "apply_chain",
    "apply_operation",
    "augmix",
    "draw_steps",
    "mix",
    "to_bytes",
    "value_tables",
    "warp",
]

OPERATIONS = (
    *("autocontrast", "equalize", "posterize", "solarize"),
    *("rotate", "shear_x", "shear_y", "translate_x", "translate_y"),
)
"""Nine operations: the first four change values, the others positions."""
WIDTH, DEPTH = 3, 3
LEAST, SEVERITY = 0.1, 1.0
# What lies outside the image. Pillow reads one number for a color as its first channel.
FILL = 128


class Draw(NamedTuple):
    """The steps of a chain; every field has shape ``[DEPTH]``, or ``[WIDTH, DEPTH]`` for all.

    Attributes:
      operation: an index into :data:`OPERATIONS`.
      level: how strong, of 10.
      negative: whether a change of position goes the other way.
      used: False after the end of the chain.
    """

    operation: jax.Array
    level: jax.Array
    negative: jax.Array
    used: jax.Array


@_arguments.checked(image=_arguments.array(3))
def augmix(image: jax.Array, key: jax.Array) -> jax.Array:
    """Returns one view: image and chains in random shares, the image's uniform in [0, 1]."""
    draw_key, weight_key, share_key = jax.random.split(key, 3)
    pixels = to_bytes(image)
    chains = jax.vmap(apply_chain, (None, 0))(pixels, draw_steps(draw_key))
    # A flat Dirichlet distribution: exponential variates over their sum.
    weights = jax.random.exponential(weight_key, (WIDTH,), jnp.float32)
    return mix(
        image, chains, weights / weights.sum(), jax.random.uniform(share_key, dtype=jnp.float32)
    )


@_arguments.checked()
def draw_steps(key: jax.Array) -> Draw:
    """Returns the randomly drawn steps of every chain."""
    keys = jax.random.split(key, 4)
    shape = (WIDTH, DEPTH)
    depth = jax.random.randint(keys[3], (WIDTH, 1), 1, DEPTH + 1, jnp.int32)
    return Draw(
        operation=jax.random.randint(keys[0], shape, 0, len(OPERATIONS), jnp.int32),
        level=jax.random.uniform(keys[1], shape, jnp.float32, LEAST, SEVERITY),
        negative=jax.random.bernoulli(keys[2], jnp.float32(0.5), shape),
        used=jnp.arange(DEPTH)[None] < depth,
    )


@_arguments.checked(
    image=_arguments.array(3),
    chains=_arguments.array(4, like="[V, H, W, C]"),
    weights=_arguments.array(1),
    share=_arguments.number(0, 1),
)
def mix(
    image: jax.Array, chains: jax.Array, weights: jax.Array, share: jax.Array | float
) -> jax.Array:
    """Returns ``share`` of the image and, of the rest, a weighted mean of chains.

    Args:
      image: ``[H, W, C]`` in [0, 1].
      chains: uint8 ``[WIDTH, H, W, C]``.
      weights: ``[WIDTH]``, of sum 1.
      share: in [0, 1].
    """
    mean = (weights[:, None, None, None] * chains.astype(image.dtype)).sum(axis=0) / 255
    return share * image + (1 - share) * mean


@_arguments.checked(image=_arguments.array(finite=True))
def to_bytes(image: jax.Array) -> jax.Array:
    """Returns the image as uint8, rounded to nearest."""
    return jnp.round(jnp.clip(image, 0.0, 1.0) * 255).astype(jnp.uint8)


@_arguments.checked(pixels=_arguments.array(3))
def apply_chain(pixels: jax.Array, draw: Draw) -> jax.Array:
    """Returns uint8 ``[H, W, C]`` after the steps of one chain."""

    def step(pixels: jax.Array, operation: Draw) -> tuple[jax.Array, None]:
        changed = apply_operation(pixels, operation.operation, operation.level, operation.negative)
        return jnp.where(operation.used, changed, pixels), None

    return jax.lax.scan(step, pixels, draw)[0]


@_arguments.checked(
    pixels=_arguments.array(3),
    operation=_arguments.array(0),
    level=_arguments.array(0, finite=True),
    negative=_arguments.array(0),
)
def apply_operation(
    pixels: jax.Array, operation: jax.Array, level: jax.Array, negative: jax.Array
) -> jax.Array:
    """Returns the pixels after one operation.

    Args:
      pixels: uint8 ``[H, W, C]``.
      operation: an index into :data:`OPERATIONS`.
      level: how strong, of 10; most operations round it down to integer degrees, pixels or values.
      negative: whether a change of position goes the other way.
    """
    height, width, _ = pixels.shape
    # One table and one matrix, of which one changes nothing.
    tables = value_tables(pixels, level)
    moves = affine_matrices(height, width, level, jnp.where(negative, -1, 1))
    kept = tables.shape[0] - 1
    table = tables[jnp.minimum(operation, kept)]
    return warp(look_up(pixels, table), moves[jnp.maximum(operation - kept + 1, 0)])


@_arguments.checked(pixels=_arguments.array(3), level=_arguments.array(0, finite=True))
def value_tables(pixels: jax.Array, level: jax.Array) -> jax.Array:
    """Returns ``[5, C, 256]``: what a value becomes, by channel; the last table keeps it."""
    height, width, channels = pixels.shape
    values = jnp.broadcast_to(jnp.arange(256), (channels, 256))
    channel = jnp.broadcast_to(jnp.arange(channels), pixels.shape)
    counts = jnp.zeros((channels, 256), jnp.int32).at[channel, pixels.astype(jnp.int32)].add(1)
    low = pixels.min(axis=(0, 1)).astype(jnp.int32)[:, None]
    high = pixels.max(axis=(0, 1)).astype(jnp.int32)[:, None]

    spread = (values - low) * 255 // jnp.maximum(high - low, 1)
    autocontrast = jnp.where(high > low, spread, values)

    # Pillow: a step is so many pixels, those of the highest value not counted; none, no change.
    step = (height * width - jnp.take_along_axis(counts, high, axis=1)) // 255
    below = jnp.cumsum(counts, axis=1) - counts
    equalize = jnp.where(step > 0, (step // 2 + below) // jnp.maximum(step, 1), values)

    dropped = 4 + scale_level(level, 4)
    posterize = values >> dropped << dropped
    solarize = jnp.where(values < 256 - scale_level(level, 256), values, 255 - values)
    tables = jnp.stack([autocontrast, equalize, posterize, solarize, values])
    return jnp.clip(tables, 0, 255)


@_arguments.checked(
    height=_arguments.count(),
    width=_arguments.count(),
    level=_arguments.array(0, finite=True),
    sign=_arguments.array(0),
)
def affine_matrices(height: int, width: int, level: jax.Array, sign: jax.Array) -> jax.Array:
    """Returns ``[6, 2, 3]``: the identity, then one matrix for every operation on positions.

    Each maps ``(x, y, 1)`` of the view to ``(x, y)`` of the image; pixels have their centers at
    halves. Shears leave the upper left corner where it is, a turn the middle.
    """
    keep = jnp.eye(2, 3, dtype=jnp.float32)
    shear = sign * level * 0.3 / 10
    turn = jnp.deg2rad((sign * scale_level(level, 30)).astype(jnp.float32))
    cos, sin = jnp.cos(turn), jnp.sin(turn)
    x, y = width / 2, height / 2
    rotate = jnp.array([[cos, -sin, x - x * cos + y * sin], [sin, cos, y - x * sin - y * cos]])
    return jnp.stack(
        [
            keep,
            rotate,
            keep.at[0, 1].set(shear),
            keep.at[1, 0].set(shear),
            keep.at[0, 2].set(sign * scale_level(level, width / 3)),
            keep.at[1, 2].set(sign * scale_level(level, height / 3)),
        ]
    )


def scale_level(level: jax.Array, largest: float) -> jax.Array:
    """Returns the level, of 10, as a share of ``largest``, rounded down."""
    return (level * largest / 10).astype(jnp.int32)


def look_up(pixels: jax.Array, table: jax.Array) -> jax.Array:
    """Returns every pixel's entry in a table ``[C, 256]``."""
    channels = jnp.broadcast_to(jnp.arange(pixels.shape[-1]), pixels.shape)
    return table[channels, pixels.astype(jnp.int32)].astype(jnp.uint8)


@_arguments.checked(pixels=_arguments.array(3), matrix=_arguments.array(2, finite=True))
def warp(pixels: jax.Array, matrix: jax.Array) -> jax.Array:
    """Returns pixels moved by an affine map ``[2, 3]``: bilinear, rounded down, filled outside."""
    height, width, channels = pixels.shape
    down, across = jnp.mgrid[:height, :width] + 0.5
    x, y = (row[0] * across + row[1] * down + row[2] for row in matrix)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    left, top = jnp.floor(x - 0.5), jnp.floor(y - 0.5)
    right_share, low_share = (x - 0.5 - left)[..., None], (y - 0.5 - top)[..., None]

    def row_at(row: jax.Array) -> jax.Array:
        row = jnp.clip(row, 0, height - 1).astype(jnp.int32)
        ends = [jnp.clip(left + i, 0, width - 1).astype(jnp.int32) for i in (0, 1)]
        first, second = (pixels[row, end].astype(jnp.float32) for end in ends)
        return first + (second - first) * right_share

    upper, lower = row_at(top), row_at(top + 1)
    inner = (upper + (lower - upper) * low_share).astype(jnp.uint8)
    fill = jnp.zeros((1, 1, channels), jnp.uint8).at[..., 0].set(FILL)
    return jnp.where(inside[..., None], inner, fill)
