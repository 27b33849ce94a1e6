"""Masked reconstruction, the auxiliary task of TTT-MAE."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _checks, _contract
from ttt_jax.base import AuxLoss, Key, Params
from ttt_jax.losses import _inputs


def patches_of(images: jax.Array, patch: int) -> jax.Array:
    """``[N, H, W, C] -> [N, P, patch * patch * C]``, patches row by row, pixels as (p, q, C)."""
    n, height, width, channels = images.shape
    rows, columns = height // patch, width // patch
    grid = images.reshape(n, rows, patch, columns, patch, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(n, rows * columns, patch * patch * channels)


@_arguments.checked(mask_ratio=_arguments.number())
def masked_reconstruction(
    apply: Callable[..., Any],
    *,
    patch: int,
    mask_ratio: float = 0.75,
    num_masks: int = 1,
    normalize: bool = True,
    batch: bool = False,
    stochastic: bool = False,
) -> AuxLoss:
    """Mean squared error of reconstructing the hidden patches of an image.

    ``mean over hidden patches of mean |D(E(visible)) - target|^2`` with the target normalised
    per patch (unbiased variance, epsilon 1e-6, as in MAE).

    Args:
      apply: model function ``(params, images[N, H, W, C], keep[N, K]) -> patches[N, P, patch *
        patch * C]``; ``keep`` holds the sorted indices of the visible patches, K is static, so
        that the encoder computes visible patches only.
      patch: side of a patch in pixels; divides height and width.
      mask_ratio: share of hidden patches, K = int(P * (1 - mask_ratio)); static.
      num_masks: V independent masks of each image per step (TTT-MAE: 128).
      normalize: whether targets are normalised per patch.
      batch: whether ``x`` is a batch ``[N, H, W, C]``; all N * V views go through one call.
      stochastic: whether ``apply`` takes a key as last argument.

    Returns:
      An ``AuxLoss`` over one image ``[H, W, C]``, or over a batch.

    Raises:
      ValueError: an argument out of range; when called: the wrong rank, an image that the patch
        does not divide, patches of a single value to normalize, no visible or no hidden patch, or
        an output of another shape.

    References:
      Gandelsman et al., `Test-Time Training with Masked Autoencoders
      <https://arxiv.org/abs/2209.07522>`_, 2022, Eq. 2; He et al., `Masked Autoencoders Are
      Scalable Vision Learners <https://arxiv.org/abs/2111.06377>`_, 2022.
    """
    _checks.check_count("patch", patch)
    _checks.check_count("num_masks", num_masks)
    if not 0 < mask_ratio < 1:
        raise ValueError(f"mask_ratio must be between 0 and 1 (both excluded), got {mask_ratio}.")

    _contract.require_model_function(
        "losses.masked_reconstruction", apply, extra=1 + int(stochastic)
    )

    def loss(params: Params, x: Any, key: Key) -> jax.Array:
        images = _inputs.check_images("masked_reconstruction", x, batch)
        n, height, width, channels = images.shape
        if height % patch or width % patch:
            raise ValueError(
                f"losses.masked_reconstruction needs image sides that patch = {patch} divides; "
                f"got {height} x {width}."
            )
        if normalize and patch * patch * channels == 1:
            raise ValueError(
                "losses.masked_reconstruction normalizes each patch over its values; patch = 1 of "
                "one channel has a single value. Use larger patches or normalize=False."
            )
        count = (height // patch) * (width // patch)
        # The nudge keeps int() from losing a patch to rounding, e.g. 10 * (1 - 0.9).
        visible = int(count * (1 - mask_ratio) + 1e-6)
        if not 0 < visible < count:
            raise ValueError(
                f"losses.masked_reconstruction needs at least one visible and one hidden patch; "
                f"mask_ratio = {mask_ratio} of {count} patches leaves {visible} visible."
            )
        mask_key, model_key = jax.random.split(key)
        keys = _checks.split_to_map("losses.masked_reconstruction", mask_key, n * num_masks)
        order = jax.vmap(lambda k: jax.random.permutation(k, count))(keys)
        keep = jnp.sort(order[:, :visible], axis=-1)
        views = jnp.repeat(images, num_masks, axis=0)
        extra = (model_key,) if stochastic else ()
        output = apply(params, views, keep, *extra)
        target = patches_of(images, patch).astype(jnp.float32)
        due = (n * num_masks, *target.shape[1:])
        _contract.require_array("losses.masked_reconstruction", output, "patches")
        if jnp.shape(output) != due:
            raise ValueError(
                "losses.masked_reconstruction needs patches of shape [N, P, patch * patch * C] = "
                f"{due}; the model function returned {jnp.shape(output)}."
            )
        if normalize:
            mean = target.mean(axis=-1, keepdims=True)
            variance = target.var(axis=-1, keepdims=True, ddof=1)
            target = (target - mean) / jnp.sqrt(variance + 1e-6)
        # All masks of an image share its targets.
        output = output.astype(jnp.float32).reshape(n, num_masks, *due[1:])
        errors = jnp.square(output - target[:, None]).mean(axis=-1).reshape(due[:2])
        hidden = jnp.take_along_axis(errors, order[:, visible:], axis=1)
        return hidden.mean()

    return _inputs.over_batch(loss, batch)
