"""The derivatives of kernels, which have none: those of the XLA form beside them."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from ttt_jax.kernels import shared_outputs


def with_xla_derivatives(
    kernels: Callable[..., Any], plain: Callable[..., Any]
) -> Callable[..., Any]:
    """Returns ``kernels(conv, *arrays)`` with the derivatives of ``plain(conv, *arrays)``.

    A gradient that kernels compute is differentiated again where an outer gradient goes through
    inner steps.

    Args:
      kernels: on the kernels.
      plain: the same in XLA's form.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def run(conv: Any, *arrays: Any) -> Any:
        return kernels(conv, *arrays)

    def forward(conv: Any, *arrays: Any) -> Any:
        return run(conv, *arrays), arrays

    def backward(conv: Any, arrays: Any, cotangents: Any) -> Any:
        return jax.vjp(functools.partial(plain, conv), *arrays)[1](cotangents)

    run.defvjp(forward, backward, **shared_outputs.DECLARED)
    return run
