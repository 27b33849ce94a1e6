"""Residual blocks with GroupNorm on the kernels of :mod:`ttt_jax.kernels.conv.passes`.

The arithmetic is that of the block written with flax layers: statistics and sums in float32,
feature maps rounded to the compute dtype after each convolution.

Gradients are of every order in reverse mode, under ``vmap`` and ``scan`` too: the first is the
kernels', and the derivatives of that one are those of the block in XLA's form. Forward mode
(``jax.jvp``, ``jax.jacfwd``, ``jax.hessian``) has no rule and JAX refuses it; a product with a
Hessian is the gradient of ``vdot(grad(f)(p), v)``, and ``ResNet(conv="lax")`` takes every mode.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.kernels import _arguments, shared_outputs
from ttt_jax.kernels.conv import support
from ttt_jax.kernels.conv.convolution import Affine, Convolution
from ttt_jax.kernels.conv.derivatives import with_xla_derivatives
from ttt_jax.kernels.conv.maps import Layer, Maps, flat_kernel, group_norm, square_kernel, xla_conv


def block(maps: Maps, first: Layer, second: Layer, *, stride: int, groups: int) -> Maps:
    """Returns norm, relu, conv, norm, relu, conv, plus the shortcut of the pre-activation ResNet.

    Args:
      maps: the block's input.
      first: its first layer, C to O channels, with ``stride``.
      second: its second layer, O to O channels.
      stride: 1 or 2.
      groups: of both GroupNorms.

    Returns:
      The block's output, O channels.

    Raises:
      ValueError: what :mod:`ttt_jax.kernels.conv.limits` excludes.
    """
    _arguments.instance("maps", maps, Maps)
    for name, layer in (("first", first), ("second", second)):
        _arguments.instance(name, layer, Layer)
    _arguments.integer("stride", stride, 1)
    _arguments.integer("groups", groups, 1)
    if stride > 2 or first.scale.shape[0] % groups:
        raise ValueError(
            f"stride is 1 or 2 and groups divide {first.scale.shape[0]} channels; got stride = "
            f"{stride} and groups = {groups}."
        )
    conv = Convolution(maps.height, maps.width, stride, groups, interpret=support.interpreted())
    layers = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (first, second))
    (values, sums), _ = _block(conv, layers, maps.values, maps.sums)
    return Maps(values, sums, *conv.out_size)


def _second(conv: Convolution) -> Convolution:
    """The block's second convolution, of its first."""
    height, width = conv.out_size
    return conv._replace(height=height, width=width, stride=1)


def _shortcut(conv: Convolution, x: jax.Array, outputs: int) -> jax.Array:
    """Average of 2 x 2 positions where the block strides, zeros for the new channels."""
    count, positions, channels = x.shape
    if conv.stride == 2:
        cells = x.reshape(count, conv.height // 2, 2, conv.width // 2, 2, channels)
        x = cells.astype(jnp.float32).mean(axis=(2, 4)).astype(x.dtype)
        x = x.reshape(count, positions // 4, channels)
    return jnp.pad(x, ((0, 0), (0, 0), (0, outputs - channels)))


def _shortcut_gradient(conv: Convolution, dy: jax.Array, channels: int) -> jax.Array:
    dy = dy[..., :channels]
    if conv.stride == 1:
        return dy
    count, height, width = dy.shape[0], conv.height // 2, conv.width // 2
    cells = dy.reshape(count, height, 1, width, 1, channels) / 4
    spread = jnp.broadcast_to(cells, (count, height, 2, width, 2, channels))
    return spread.reshape(count, conv.positions, channels)


class _Inner(NamedTuple):
    """What a block's gradient reads; a function of the block's arguments.

    ``h``: the map after the first convolution; ``norm1`` and ``norm2``: the GroupNorms; ``w1`` and
    ``w2``: ``[9, C, O]``.
    """

    h: jax.Array
    w1: jax.Array
    norm1: Affine
    w2: jax.Array
    norm2: Affine


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block(conv, layers, x, sums):
    forward, (first, second) = support.passes().forward, layers
    shortcut = _shortcut(conv, x, first.kernel.shape[-1])
    w1, w2 = flat_kernel(first.kernel, x.dtype), flat_kernel(second.kernel, x.dtype)
    norm1 = group_norm(sums, first, x.shape[1], conv.groups)
    h, h_sums = forward(conv, x, norm1.a, norm1.b, w1)
    norm2 = group_norm(h_sums, second, h.shape[1], conv.groups)
    result = forward(_second(conv), h, norm2.a, norm2.b, w2, shortcut)
    return result, _Inner(h, w1, norm1, w2, norm2)


def _block_forward(conv, layers, x, sums):
    # The block itself and not its kernels: an outer gradient differentiates this call again.
    result, inner = _block(conv, layers, x, sums)
    return (result, inner), (layers, x, inner)


def _block_backward(conv, saved, cotangents):
    # All that is derived from the maps, sums and inner values, has its part in their gradient, of
    # every order: what comes back to it by itself is dropped.
    (dy, _), _ = cotangents
    layers, x, inner = saved
    dlayers, dx = _block_gradient(conv, layers, x, inner, dy)
    return dlayers, dx, None


def _gradient_by_kernels(conv, layers, x, inner, dy):
    kernels, (first, second) = support.passes(), layers
    h, w1, norm1, w2, norm2 = inner
    dw2 = kernels.weight_gradient(_second(conv), h, norm2.a, norm2.b, dy)
    dh, d2 = kernels.input_gradient(_second(conv), dy, w2, h, norm2, second.scale)
    dw1 = kernels.weight_gradient(conv, x, norm1.a, norm1.b, dh)
    skip = _shortcut_gradient(conv, dy, x.shape[-1]).astype(x.dtype)
    dx, d1 = kernels.input_gradient(conv, dh, w1, x, norm1, first.scale, skip)

    def gradients(moments: jax.Array, dw: jax.Array) -> Layer:
        scale, bias = moments.sum(axis=0)
        return Layer(scale, bias, square_kernel(dw))

    return (gradients(d1, dw1), gradients(d2, dw2)), dx


def _gradient_by_xla(conv, layers, x, inner, dy):
    return jax.vjp(functools.partial(_block_by_xla, conv), layers, x)[1](dy)


def _block_by_xla(conv: Convolution, layers: tuple[Layer, Layer], x: jax.Array) -> jax.Array:
    """The block in XLA's form: ``[N, P, C] -> [N, P / stride^2, O]``."""
    shortcut = _shortcut(conv, x, layers[0].kernel.shape[-1])
    for layer, step in zip(layers, (conv, _second(conv)), strict=True):
        wide = x.astype(jnp.float32)
        sums = jnp.stack([wide.sum(axis=1), (wide * wide).sum(axis=1)], axis=1)
        norm = group_norm(sums, layer, x.shape[1], step.groups)
        x = jax.nn.relu(norm.a[:, None] * wide + norm.b[:, None]).astype(x.dtype)
        x = xla_conv(x, layer.kernel, step.size, step.stride)
    return x + shortcut


_block_gradient = with_xla_derivatives(_gradient_by_kernels, _gradient_by_xla)
_block.defvjp(_block_forward, _block_backward, **shared_outputs.DECLARED)
