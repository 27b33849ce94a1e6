"""Gated hidden features: in plain XLA, or with both derivatives from one kernel on a GPU."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from ttt_jax.kernels import _arguments, shared_outputs
from ttt_jax.kernels.attention.forms import FORMS

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
}
"""Of the gate: SwiGLU, and GeGLU in its tanh form."""


def gated(gate: jax.Array, up: jax.Array, *, activation: str, form: str) -> jax.Array:
    """Returns ``activation(gate) * up`` (Shazeer, 2020).

    Backward, XLA reads gate, up and the cotangent for the derivative of the gate, and gate and
    cotangent once more for that of the other factor; the kernel of the fused form reads each once.
    It may be differentiated again, which XLA does; in forward mode alone it may not.

    Args:
      gate: ``[N, T, F]``.
      up: ``[N, T, F]``, of the dtype of the gate.
      activation: a name of :data:`ACTIVATIONS`.
      form: ``"xla"``, or ``"fused"``, see :func:`~ttt_jax.kernels.attention.forms.form_of`.

    Returns:
      ``[N, T, F]``.

    Raises:
      TypeError: no arrays.
      ValueError: another rank, two shapes or dtypes, or an unknown name.
    """
    gate, up = _arguments.array("gate", gate, 3), _arguments.array("up", up, 3)
    _arguments.choice("activation", activation, tuple(ACTIVATIONS))
    _arguments.choice("form", form, FORMS)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            "gate and up must have one shape and dtype; got "
            f"{gate.shape} {gate.dtype} and {up.shape} {up.dtype}."
        )
    if form == "fused" and kernel() is not None and kernel().fits(gate.size):
        result: jax.Array = _fused(activation, gate, up)
        return result
    return product(activation, gate, up)


@functools.cache
def kernel() -> Any:
    """The module of the kernel; None on a jax whose Pallas has no Triton backend."""
    try:
        from ttt_jax.kernels.gating import kernel as module
    except ImportError:
        return None
    return module


def product(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    """:func:`gated` in XLA."""
    return ACTIVATIONS[activation](gate) * up


def _plain_derivatives(activation: str, gate: jax.Array, up: jax.Array, dout: jax.Array) -> Any:
    return jax.vjp(functools.partial(product, activation), gate, up)[1](dout)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _derivatives(activation: str, gate: jax.Array, up: jax.Array, dout: jax.Array) -> Any:
    return kernel().derivatives(ACTIVATIONS[activation], gate, up, dout)


@_derivatives.defjvp
def _second(activation: str, primals: Any, tangents: Any) -> Any:
    plain = functools.partial(_plain_derivatives, activation)
    return _derivatives(activation, *primals), jax.jvp(plain, primals, tangents)[1]


def _forward(activation: str, gate: jax.Array, up: jax.Array) -> Any:
    return product(activation, gate, up), (gate, up)


def _backward(activation: str, kept: Any, dout: jax.Array) -> Any:
    return _derivatives(activation, *kept, dout)


_fused = jax.custom_vjp(product, (0,))
_fused.defvjp(_forward, _backward, **shared_outputs.DECLARED)
