"""``relu(a * x + b)`` and rounding inside the kernels of :mod:`ttt_jax.kernels.conv.passes`.

In bfloat16 these are most of what a result kernel issues, and the compiler takes each value for
itself: two of them in PTX, with the relu in the conversion and the mask as bits, take six
instructions instead of nine. An interpreter and float32 take the plain form.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

# A pair of values: the lower half of a register first. An index is that of the operand.
_ACTIVATE = """{
.reg .f32 first, second;
.reg .b32 bits;
shl.b32 bits, $1, 16;
mov.b32 first, bits;
and.b32 bits, $1, 0xffff0000;
mov.b32 second, bits;
fma.rn.f32 first, first, $2, $4;
fma.rn.f32 second, second, $3, $5;
cvt.rn.relu.bf16x2.f32 bits, second, first;
and.b32 $0, bits, $6;
}"""
_ROUND = "cvt.rn.bf16x2.f32 $0, $2, $1;"


def affine_relu(
    x: jax.Array, a: jax.Array, b: jax.Array, inside: jax.Array | None, compiled: bool
) -> jax.Array:
    """Returns ``relu(a * x + b)`` inside, else 0.

    Args:
      x: ``[M, K]``.
      a: float32 ``[1, K]``.
      b: float32 ``[1, K]``.
      inside: boolean ``[M, K]``; None is everywhere.
      compiled: whether PTX is understood.

    Returns:
      ``[M, K]`` of the dtype of ``x``.
    """
    if not compiled or x.dtype != jnp.bfloat16:
        u = a * x.astype(jnp.float32) + b
        # Not a maximum: a GPU's takes the other value where one is not a number.
        zero = u < 0 if inside is None else (u < 0) | ~inside
        return jnp.where(zero, 0.0, u).astype(x.dtype)
    a, b = jnp.broadcast_to(a, x.shape), jnp.broadcast_to(b, x.shape)
    bits = jnp.full(x.shape, -1, jnp.int16)
    if inside is not None:
        bits = jnp.where(inside, bits, jnp.int16(0))
    [u] = plgpu.elementwise_inline_asm(
        _ACTIVATE,
        args=[x, a, b, bits],
        constraints="=r,r,r,r,r,r,r",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return u


def round_to(y: jax.Array, dtype: jnp.dtype, compiled: bool) -> jax.Array:
    """Returns float32 ``[M, K]`` in ``dtype``, to the nearest value."""
    if not compiled or dtype != jnp.bfloat16:
        return y.astype(dtype)
    [u] = plgpu.elementwise_inline_asm(
        _ROUND,
        args=[y],
        constraints="=r,r,r",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(y.shape, dtype)],
    )
    return u
