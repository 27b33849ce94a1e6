"""The 3x3 convolution of the reference networks, a layer over ``kernels.conv``."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax.kernels.conv import conv3x3
from ttt_jax.models.initializers import he_normal_fan_out


class Conv3x3(nn.Module):
    """A 3x3 convolution without bias, padding 1, ``kernel`` in float32 and HWIO.

    Attributes:
      features: the number of output channels.
      stride: 1 or 2.
      form: see :func:`ttt_jax.kernels.conv.conv3x3`.
      dtype: the compute dtype.
    """

    features: int
    stride: int = 1
    form: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """``[N, H, W, C] -> [N, ceil(H / stride), ceil(W / stride), features]``."""
        shape = (3, 3, images.shape[-1], self.features)
        kernel = self.param("kernel", he_normal_fan_out, shape, jnp.float32)
        return conv3x3(
            images.astype(self.dtype),
            kernel.astype(self.dtype),
            stride=self.stride,
            form=self.form,
        )
