"""Denoising, the auxiliary task of an autoencoder."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _checks, _contract, _trees
from ttt_jax.base import AuxLoss, Key, Params
from ttt_jax.losses import _inputs


@_arguments.checked()
def denoising(
    apply: Callable[..., Any],
    *,
    noise: float | jax.Array,
    num_copies: int = 1,
    batch: bool = False,
    stochastic: bool = False,
) -> AuxLoss:
    """Mean squared error of recovering an instance from a noisy copy.

    ``mean |apply(params, x + noise * n) - x|^2`` with standard normal n, over all elements.

    Args:
      apply: model function of the decoder, ``(params, inputs[N, ...]) -> [N, ...]``, of the
        inputs' shape.
      noise: standard deviation, in the units of ``x``. May be traced.
      num_copies: V independent noisy copies of each instance per step; static.
      batch: whether ``x`` has a leading batch axis; all N * V copies go through one call.
      stochastic: whether ``apply`` takes a key as third argument.

    Returns:
      An ``AuxLoss`` over one floating array ``[...]``, or over a batch ``[N, ...]``.

    Raises:
      ValueError: ``num_copies`` < 1, or ``noise`` that is not a scalar; when called: a batch of
        images where one instance is due, an instance that is no floating array, or an output of
        another shape.

    References:
      Vincent et al., Extracting and Composing Robust Features with Denoising Autoencoders, 2008.
    """
    _checks.check_count("num_copies", num_copies)
    _checks.check_number("noise", noise, 0.0, scalar=False)
    if jnp.shape(noise) != ():
        raise ValueError(
            f"noise must be one standard deviation; got shape {jnp.shape(noise)}. Scale the inputs "
            "instead, if channels differ."
        )
    call = _inputs.caller("denoising", apply, stochastic)

    def loss(params: Params, x: Any, key: Key) -> jax.Array:
        inputs = _inputs.check_instance("denoising", x, batch)
        if not _trees.is_floating(inputs):
            kind = getattr(inputs, "dtype", type(inputs).__name__)
            raise ValueError(
                f"losses.denoising works on an array of floating numbers; got {kind}. Scale "
                "integer images to floats, as the data loader does."
            )
        noise_key, model_key = jax.random.split(key)
        clean = jnp.repeat(inputs, num_copies, axis=0)
        normal = jax.random.normal(noise_key, clean.shape, clean.dtype)
        output = call(params, clean + (noise * normal).astype(clean.dtype), model_key)
        _contract.require_array("losses.denoising", output, "decoded inputs")
        if jnp.shape(output) != clean.shape:
            raise ValueError(
                f"losses.denoising needs an output of the inputs' shape {clean.shape}; the model "
                f"function returned {jnp.shape(output)}."
            )
        error = output.astype(jnp.float32) - clean.astype(jnp.float32)
        return jnp.square(error).mean()

    return _inputs.over_batch(loss, batch)
