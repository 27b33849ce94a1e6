"""The gradient of a GroupNorm inside the kernels of :mod:`ttt_jax.kernels.conv.passes`."""

import jax
import jax.numpy as jnp


def gradient_means(
    moments: tuple[jax.Array, jax.Array],
    gamma: jax.Array,
    channels: int,
    groups: int,
    positions: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns the two means that a GroupNorm's gradient subtracts at every position.

    With ``du`` the gradient in a GroupNorm's result and ``normal = (x - mean) * rstd``, that in
    ``x`` is ``rstd * (gamma * du - mean(gamma * du) - normal * mean(gamma * du * normal))``, means
    over a group (Wu and He 2018, differentiated).

    Args:
      moments: the gradients in scale and bias, ``[K]`` each; K holds all channels, of one position
        after another where there are several.
      gamma: ``[K]``.
      channels: a power of two.
      groups: of the GroupNorm.
      positions: of a map.

    Returns:
      The two means at every channel, ``[K]`` each.
    """
    dgamma, dbeta = moments
    size = channels // groups
    shift, shape = size.bit_length() - 1, gamma.shape * 2
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, k) for k in (0, 1))
    if shape[0] > channels:
        row, column = (jax.lax.rem(k, jnp.int32(channels)) for k in (row, column))
    # Means over a group, spread over its channels: a small product with a block matrix.
    same = jnp.where(row >> shift == column >> shift, 1.0 / (size * positions), 0.0)
    first = jnp.sum(same * (gamma * dbeta)[:, None], axis=0)
    second = jnp.sum(same * (gamma * dgamma)[:, None], axis=0)
    return first, second
