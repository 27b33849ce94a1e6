"""Both derivatives of gated features in one pass over what they read, for a GPU.

Written in Pallas for its Triton backend; element by element, in float32 on chip.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# Numbers of a program, at most and at least, and its warps.
_MOST, _LEAST, _WARPS = 4096, 256, 4


def fits(size: int) -> bool:
    """Whether the kernel takes arrays of so many numbers: a multiple of 256."""
    return size > 0 and size % _LEAST == 0


def _kernel(gate_ref: Any, up_ref: Any, dout_ref: Any, *out_refs: Any, activation: Any) -> None:
    gate, up, dout = (ref[...].astype(jnp.float32) for ref in (gate_ref, up_ref, dout_ref))
    _, backward = jax.vjp(lambda gate, up: activation(gate) * up, gate, up)
    for ref, derivative in zip(out_refs, backward(dout), strict=True):
        ref[...] = derivative.astype(ref.dtype)


def derivatives(
    activation: Callable[[jax.Array], jax.Array], gate: jax.Array, up: jax.Array, dout: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of ``activation(gate) * up``; interpreted away from a GPU.

    Args:
      activation: element by element.
      gate: any shape that :func:`fits`.
      up: of the shape and dtype of the gate.
      dout: likewise.

    Returns:
      What goes to gate and to up.
    """
    count = math.gcd(gate.size, _MOST)
    block = pl.BlockSpec((count,), lambda index: (index,))
    flat = jax.ShapeDtypeStruct((gate.size,), gate.dtype)
    call = pl.pallas_call(
        functools.partial(_kernel, activation=activation),
        grid=(gate.size // count,),
        in_specs=[block] * 3,
        out_specs=[block] * 2,
        out_shape=[flat] * 2,
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS),
        interpret=jax.default_backend() != "gpu",
        name="gated_derivatives",
    )
    first, second = call(*(each.reshape(-1) for each in (gate, up, dout)))
    return first.reshape(gate.shape), second.reshape(gate.shape)
