"""Initializing a reference model: one variables tree for all of its heads."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _trees
from ttt_jax.models.resnet import ResNet
from ttt_jax.models.vit import ViT


@_arguments.checked(module=_arguments.having("a model of ttt_jax", "finish_init", "all_heads"))
def init(module: ResNet | ViT, key: jax.Array, image_shape: Sequence[int]) -> dict[str, Any]:
    """Creates the parameters of every method of a reference model.

    Every distinct kernel shape costs one small compilation; called inside ``jax.jit`` it is one.

    A ResNet's rotation branch starts as a copy of the main branch (as in the TTT paper's code,
    yueatsprograms/ttt_cifar_release); only ``rotation_fc`` has values of its own.

    Args:
      module: a :class:`ResNet` or a :class:`ViT`.
      key: a typed PRNG key.
      image_shape: ``(H, W, C)`` of one image.

    Returns:
      The variables dict: ``{"params": ...}``, and ``"batch_stats"`` with BatchNorm. Leaves are
      float32.

    Raises:
      ValueError: an ``image_shape`` that is not three numbers, or does not suit the module.
    """
    shape = tuple(image_shape)
    if len(shape) != 3:
        raise ValueError(
            f"init takes the image_shape (H, W, C) of one image, received {shape}: leave out the "
            "batch."
        )
    if not all(_trees.is_integer(side, 1) for side in shape):
        raise ValueError(
            f"init takes an image_shape of integers of at least 1, received {shape}: give H, W, C."
        )
    # Only shapes matter here, so the forward pass is traced and never computed.
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return module.finish_init(module.lazy_init(key, images, method=type(module).all_heads))
