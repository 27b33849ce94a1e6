"""The three kernels of ``conv3x3(relu(a * x + b))`` for a GPU: result, input and weight gradient.

One program holds one image's feature map on chip, so a normalization, its activation, the
convolution, the residual sum and the statistics of the next normalization touch device memory
once. Under ``vmap`` over parameters XLA writes a grouped convolution instead, whose weight
gradient alone takes half of an inner step (``experiments/results/bench_vision.json``).

Written in Pallas for its Triton backend, in two forms: by patches
(:mod:`ttt_jax.kernels.conv.patches`) where channels are few, else tap by tap
(:mod:`ttt_jax.kernels.conv.taps`); :mod:`ttt_jax.kernels.conv.tiles` says which, and how each
cuts its work. Arrays are ``[N, P, C]``, P = height * width positions row by row; the N images share
one kernel, and ``vmap`` adds instances with kernels of their own. The kernels have no derivatives;
:mod:`ttt_jax.kernels.conv.block` gives them theirs.
"""

import jax

from ttt_jax.kernels.conv import limits, patches, taps, tiles
from ttt_jax.kernels.conv.convolution import Affine, Convolution


def _tiles(conv: Convolution, x: jax.Array, outputs: int) -> tiles.Tiles:
    return tiles.choose(x.shape[-1], outputs, conv.stride, x.dtype.itemsize, conv.size)


def forward(
    conv: Convolution,
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    w: jax.Array,
    residual: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns ``y = conv3x3(relu(a * x + b), w) + residual`` with padding 1, and its sums.

    Args:
      conv: the convolution.
      x: ``[N, P, C]``.
      a: float32 ``[N, C]``; unused, as ``b``, where ``conv`` does not activate.
      b: float32 ``[N, C]``.
      w: ``[9, C, O]``, of the dtype of ``x``.
      residual: ``[N, P / stride^2, O]`` or None.

    Returns:
      ``y [N, P / stride^2, O]``, and float32 ``[N, 2, O]``, its sums and sums of squares over
      positions.

    Raises:
      ValueError: no image, sides that are no powers of two, more than 1024 positions, channels
        other than 16, 32 or 64, another stride or dtype, or arrays of other shapes.
    """
    arrays = {"a": a, "b": b, "w": w, "residual": residual}
    limits.check("forward", conv, x, w.shape[-1], arrays)
    tile = _tiles(conv, x, w.shape[-1]).forward
    if isinstance(tile, tiles.ForwardPatches):
        return patches.forward(conv, tile, x, a, b, w, residual)
    return taps.forward(conv, tile, x, a, b, w, residual)


def input_gradient(
    conv: Convolution,
    dy: jax.Array,
    w: jax.Array,
    x: jax.Array,
    affine: Affine,
    gamma: jax.Array,
    residual: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradient of :func:`forward` in ``x``, where ``a * x + b`` is a GroupNorm of it.

    Args:
      conv: the convolution; ``C / conv.groups`` is a power of two.
      dy: ``[N, P / stride^2, O]``.
      w: ``[9, C, O]``.
      x: ``[N, P, C]``.
      affine: the GroupNorm of ``x``.
      gamma: float32 ``[C]``, the scale of the GroupNorm.
      residual: ``[N, P, C]``, a further gradient in ``x`` to add, or None.

    Returns:
      ``dx [N, P, C]``, and float32 ``[N, 2, C]``, the gradients in scale and bias per image.

    Raises:
      ValueError: no image, sides that are no powers of two, more than 1024 positions, channels
        other than 16, 32 or 64, another stride or dtype, other groups, or arrays of other shapes.
    """
    arrays = {"dy": dy, "w": w, "gamma": gamma, "residual": residual, **affine._asdict()}
    limits.check("input_gradient", conv, x, dy.shape[-1], arrays)
    tile = _tiles(conv, x, dy.shape[-1]).input_gradient
    if isinstance(tile, tiles.InputPatches):
        return patches.input_gradient(conv, tile, dy, w, x, affine, gamma, residual)
    return taps.input_gradient(conv, tile, dy, w, x, affine, gamma, residual)


def weight_gradient(
    conv: Convolution, x: jax.Array, a: jax.Array, b: jax.Array, dy: jax.Array
) -> jax.Array:
    """Returns the gradient of :func:`forward` in ``w``, summed over the N images.

    Args:
      conv: the convolution.
      x: ``[N, P, C]``.
      a: float32 ``[N, C]``.
      b: float32 ``[N, C]``.
      dy: ``[N, P / stride^2, O]``.

    Returns:
      float32 ``[9, C, O]``.

    Raises:
      ValueError: no image, sides that are no powers of two, more than 1024 positions, channels
        other than 16, 32 or 64, another stride or dtype, or arrays of other shapes.
    """
    limits.check("weight_gradient", conv, x, dy.shape[-1], {"a": a, "b": b, "dy": dy})
    tile = _tiles(conv, x, dy.shape[-1]).weight_gradient
    if isinstance(tile, tiles.WeightPatches):
        return patches.weight_gradient(conv, tile, x, a, b, dy)
    return taps.weight_gradient(conv, tile, x, a, b, dy)
