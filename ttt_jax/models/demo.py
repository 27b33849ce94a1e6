"""The small trained model of the README, which ships with the package."""

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from ttt_jax.models.resnet import ResNet

_FILE = pathlib.Path(__file__).with_suffix(".npz")


def demo() -> tuple[ResNet, dict[str, Any]]:
    """A ResNet-8 with BatchNorm that knows sharp digits and their rotations, and its parameters.

    Trained on 1257 of scikit-learn's digits, 8 x 8 pixels in [0, 1], on both tasks together, by
    ``experiments/prepare/demo.py``. :func:`ttt_jax.data.demo` has other digits, blurred.

    Returns:
      The module and its variables dict, float32 (stored as float16).
    """
    net = ResNet(depth=8, width=8, norm="batch", conv="lax")
    with np.load(_FILE) as stored:
        leaves = {tuple(name.split("/")): jnp.asarray(stored[name], jnp.float32) for name in stored}
    return net, unflatten_dict(leaves)
