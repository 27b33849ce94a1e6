"""The three kernels of ``conv3x3(relu(a * x + b))`` for a GPU: result, input and weight gradient.

One program holds one image's feature map on chip, so a normalization, its activation, the
convolution, the residual sum and the statistics of the next normalization touch device memory
once. Under ``vmap`` over parameters XLA writes a grouped convolution instead, whose weight
gradient alone takes half of an inner step (``experiments/results/bench_vision.json``).

Written in Pallas for its Triton backend, in two forms: by patches
(:mod:`ttt_jax.models.fused_patches`) where channels are few, else tap by tap
(:mod:`ttt_jax.models.fused_taps`); :mod:`ttt_jax.models.fused_tiles` says which, and how each
cuts its work. Arrays are ``[N, P, C]``, P = height * width positions row by row; the N images share
one kernel, and ``vmap`` adds instances with kernels of their own. The kernels have no derivatives;
:mod:`ttt_jax.models.fused_block` gives them theirs.
"""

import jax

from ttt_jax.models import (
    fused_limits as limits,
    fused_patches as patches,
    fused_taps as taps,
    fused_tiles as tiles,
)


def _tiles(x: jax.Array, outputs: int, stride: int, size: tuple[int, int]) -> tiles.Tiles:
    return tiles.choose(x.shape[-1], outputs, stride, x.dtype.itemsize, size)


def forward(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    w: jax.Array,
    residual: jax.Array | None,
    *,
    height: int,
    width: int,
    stride: int = 1,
    activate: bool = True,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """``y = conv3x3(relu(a * x + b), w) + residual`` with padding 1.

    Args:
      x: ``[N, P, C]``.
      a: float32 ``[N, C]``.
      b: float32 ``[N, C]``.
      w: ``[9, C, O]``, of the dtype of ``x``.
      residual: ``[N, P / stride^2, O]`` or None.
      height: of the images of ``x``.
      width: of the images of ``x``; P = height * width.
      stride: 1 or 2.
      activate: False convolves ``x`` as it is.
      interpret: run as plain JAX, on any device.

    Returns:
      ``y [N, P / stride^2, O]``, and float32 ``[N, 2, O]``, its sums and sums of squares over
      positions.

    Raises:
      ValueError: no image, sides that are no powers of two, more than 1024 positions, channels
        other than 16, 32 or 64, another stride or dtype, or arrays of other shapes.
    """
    arrays = {"a": a, "b": b, "w": w, "residual": residual}
    limits.check("forward", x, w.shape[-1], (height, width), stride, arrays)
    tile = _tiles(x, w.shape[-1], stride, (height, width)).forward
    form = patches if isinstance(tile, tiles.ForwardPatches) else taps
    size = {"height": height, "width": width, "stride": stride}
    return form.forward(x, a, b, w, residual, tile, **size, activate=activate, interpret=interpret)


def input_gradient(
    dy: jax.Array,
    w: jax.Array,
    x: jax.Array,
    affine: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    gamma: jax.Array,
    residual: jax.Array | None,
    *,
    height: int,
    width: int,
    stride: int = 1,
    groups: int,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The gradient of :func:`forward` in ``x``, where ``a * x + b`` is a GroupNorm of ``x``.

    Args:
      dy: ``[N, P / stride^2, O]``.
      w: ``[9, C, O]``.
      x: ``[N, P, C]``.
      affine: ``(a, b, mean, rstd)``, each float32 ``[N, C]``.
      gamma: float32 ``[C]``, the scale of the GroupNorm.
      residual: ``[N, P, C]``, a further gradient in ``x`` to add, or None.
      height: of the images of ``x``.
      width: of the images of ``x``.
      stride: 1 or 2.
      groups: of the GroupNorm; ``C / groups`` is a power of two.
      interpret: run as plain JAX, on any device.

    Returns:
      ``dx [N, P, C]``, and float32 ``[N, 2, C]``, the gradients in scale and bias per image.

    Raises:
      ValueError: no image, sides that are no powers of two, more than 1024 positions, channels
        other than 16, 32 or 64, another stride or dtype, other groups, or arrays of other shapes.
    """
    arrays = {"dy": dy, "w": w, "gamma": gamma, "residual": residual}
    arrays |= dict(zip(("a", "b", "mean", "rstd"), affine, strict=True))
    limits.check("input_gradient", x, dy.shape[-1], (height, width), stride, arrays, groups)
    tile = _tiles(x, dy.shape[-1], stride, (height, width)).input_gradient
    form = patches if isinstance(tile, tiles.InputPatches) else taps
    size = {"height": height, "width": width, "stride": stride}
    return form.input_gradient(
        dy, w, x, affine, gamma, residual, tile, **size, groups=groups, interpret=interpret
    )


def weight_gradient(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    dy: jax.Array,
    *,
    height: int,
    width: int,
    stride: int = 1,
    activate: bool = True,
    interpret: bool = False,
) -> jax.Array:
    """The gradient of :func:`forward` in ``w``, summed over the N images.

    Args:
      x: ``[N, P, C]``.
      a: float32 ``[N, C]``.
      b: float32 ``[N, C]``.
      dy: ``[N, P / stride^2, O]``.
      height: of the images of ``x``.
      width: of the images of ``x``.
      stride: 1 or 2.
      activate: as in :func:`forward`.
      interpret: run as plain JAX, on any device.

    Returns:
      float32 ``[9, C, O]``.

    Raises:
      ValueError: no image, sides that are no powers of two, more than 1024 positions, channels
        other than 16, 32 or 64, another stride or dtype, or arrays of other shapes.
    """
    arrays = {"a": a, "b": b, "dy": dy}
    limits.check("weight_gradient", x, dy.shape[-1], (height, width), stride, arrays)
    tile = _tiles(x, dy.shape[-1], stride, (height, width)).weight_gradient
    form = patches if isinstance(tile, tiles.WeightPatches) else taps
    size = {"height": height, "width": width, "stride": stride}
    return form.weight_gradient(x, a, b, dy, tile, **size, activate=activate, interpret=interpret)
