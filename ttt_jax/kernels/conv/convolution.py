"""What the kernels are told of one convolution: its sizes, and the normalization before it.

Both records are read while a program is traced: :class:`Convolution` is static.
"""

from typing import NamedTuple

import jax


class Convolution(NamedTuple):
    """A convolution with padding 1 after a GroupNorm and a relu, all that is static of it.

    Attributes:
      height: of the images before the convolution.
      width: of the images before the convolution.
      stride: 1 or 2.
      groups: of the GroupNorm, 0 where there is none; only the gradients in its input read it.
      activate: False convolves the images as they are.
      interpret: run kernels as plain JAX, on any device.
    """

    height: int
    width: int
    stride: int = 1
    groups: int = 0
    activate: bool = True
    interpret: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width before the convolution."""
        return self.height, self.width

    @property
    def positions(self) -> int:
        """The number of positions before the convolution."""
        return self.height * self.width

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width after the convolution."""
        return self.height // self.stride, self.width // self.stride

    @property
    def out_positions(self) -> int:
        """The number of positions after the convolution."""
        return self.out_size[0] * self.out_size[1]

    @property
    def compiled(self) -> bool:
        """Whether kernels are compiled, and so may hold PTX."""
        return not self.interpret


class Affine(NamedTuple):
    """A GroupNorm of ``x`` as ``a * x + b``, with what its gradient reads.

    Attributes:
      a: float32 ``[N, C]``, scale / standard deviation.
      b: float32 ``[N, C]``, bias - mean * a.
      mean: float32 ``[N, C]``, of a channel's group.
      rstd: float32 ``[N, C]``, 1 / standard deviation of a channel's group.
    """

    a: jax.Array
    b: jax.Array
    mean: jax.Array
    rstd: jax.Array
