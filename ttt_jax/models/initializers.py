"""Initializers that draw flat arrays: XLA compiles a draw of rank 4 several times more slowly."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def he_normal_fan_out(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Normal with variance ``2 / fan_out``, for kernels ``[*window, inputs, outputs]``.

    He et al., 2015 ("Delving Deep into Rectifiers", ICCV), in the form of the TTT paper's code:
    ``fan_out`` is the window's size times the output channels.
    """
    fan_out = math.prod(shape) // shape[-2]
    flat = jax.random.normal(key, (math.prod(shape),), dtype)
    return (flat * math.sqrt(2.0 / fan_out)).reshape(tuple(shape))


def xavier_uniform(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Uniform in ``+-sqrt(6 / (inputs + outputs))``, for kernels ``[inputs, outputs]``.

    Glorot and Bengio, 2010; what He et al., 2022 (MAE) use for every linear layer.
    """
    limit = math.sqrt(6.0 / (shape[-2] + shape[-1]))
    flat = jax.random.uniform(key, (math.prod(shape),), dtype, -limit, limit)
    return flat.reshape(tuple(shape))
