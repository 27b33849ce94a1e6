"""Pre-norm transformer blocks, written for the fewest passes over memory on an accelerator.

Layers see tokens as rows ``[N * T, features]``. A weight gradient then sums over one axis, which a
matrix product takes as it lies; over two axes, XLA first writes a transposed copy. A bias of one
axis is added by the product itself.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax.kernels import attention
from ttt_jax.models.initializers import xavier_uniform


class Dense(nn.Module):
    """A linear map of the last axes, with bias; parameters as those of ``flax.linen.DenseGeneral``.

    Attributes:
      features: sizes of the axes that come out.
      axes: how many trailing axes go in.
      gelu: whether GELU (tanh form) follows. Its derivative keeps the product alone: adding the
        bias and GELU are cheap to do again, and reading one array instead of two is what their
        derivative costs.
      dtype: the compute dtype; parameters are float32.
    """

    features: tuple[int, ...]
    axes: int = 1
    gelu: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[..., *inputs] -> [..., *features]``, of the compute dtype."""
        lead, inputs = x.shape[: -self.axes], x.shape[-self.axes :]
        outputs = math.prod(self.features)

        def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return xavier_uniform(key, (math.prod(inputs), outputs)).reshape(shape)

        kernel = self.param("kernel", draw, (*inputs, *self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), self.features, jnp.float32)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        contracted = (tuple(range(1, 1 + self.axes)), tuple(range(self.axes)))
        # The kernel goes in as it is: qwix finds it by its shape.
        product = jax.lax.dot_general(x.reshape(-1, *inputs), kernel, (contracted, ((), ())))
        finish = jax.checkpoint(_biased_gelu) if self.gelu else _biased
        return finish(product.reshape(-1, outputs), bias.reshape(outputs)).reshape(
            *lead, *self.features
        )


def _biased(product: jax.Array, bias: jax.Array) -> jax.Array:
    return product + bias[None]


def _biased_gelu(product: jax.Array, bias: jax.Array) -> jax.Array:
    return nn.gelu(_biased(product, bias))


class SelfAttention(nn.Module):
    """Attention of every token to all, in several heads.

    Parameters are named and shaped as those of ``flax.linen.MultiHeadDotProductAttention``.

    Attributes:
      heads: how many; divides the features.
      form: see :func:`ttt_jax.kernels.attention.attend`.
      dtype: the compute dtype.
    """

    heads: int
    form: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[N, T, width] -> [N, T, width]``."""
        width = x.shape[-1]
        split = (self.heads, width // self.heads)
        query, key, value = (
            Dense(split, dtype=self.dtype, name=name)(x) for name in ("query", "key", "value")
        )
        mixed = attention.attend(query, key, value, self.form)
        return Dense((width,), axes=2, dtype=self.dtype, name="out")(mixed)


class Block(nn.Module):
    """Pre-norm attention and MLP (four times as wide), each added to its input.

    Attributes:
      heads: attention heads.
      dtype: the compute dtype.
      attention: ``"xla"`` or ``"fused"``.
    """

    heads: int
    dtype: Any
    attention: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[N, T, width] -> [N, T, width]``."""
        width = x.shape[-1]
        form = attention.form_of(self.attention, self.dtype)
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm1")(x)
        x = x + SelfAttention(self.heads, form, dtype=self.dtype, name="attention")(y)
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm2")(x)
        y = Dense((4 * width,), gelu=True, dtype=self.dtype, name="up")(y)
        return x + Dense((width,), dtype=self.dtype, name="down")(y)
