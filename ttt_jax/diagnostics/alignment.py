"""Alignment: does a step on the auxiliary loss also lower the main loss?"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.interpreters import partial_eval

from ttt_jax import _arguments, _checks, _contract, _trees, _varying, select as select_lib
from ttt_jax.base import AuxLoss, Key, Params, PyTree, Selection

MainLoss = Callable[[Params, Any, Any, Key], jax.Array]

# How far the smoothness is measured, relative to the norm of the parameters: far enough for
# bfloat16 to resolve the change of the gradient.
_RADIUS = 0.01


class Alignment(NamedTuple):
    """How the gradients of the main and the auxiliary loss lie to each other; float32 scalars.

    Attributes:
      inner: their inner product.
      cosine: the cosine of their angle; 0 where one of them is zero.
      main_norm: Euclidean norm of the main gradient.
      aux_norm: Euclidean norm of the auxiliary gradient.
    """

    inner: jax.Array
    cosine: jax.Array
    main_norm: jax.Array
    aux_norm: jax.Array


def _checked(name: str, value: Any) -> jax.Array:
    value = jnp.asarray(value)
    if value.shape != ():
        raise ValueError(f"{name} must return a scalar; got shape {value.shape}. Average it.")
    return value.astype(jnp.float32)


def _own_gradient(loss: Callable[[PyTree], jax.Array]) -> Callable[[PyTree], PyTree]:
    """The gradient of an instance, which a caller's ``shard_map`` does not sum over devices."""
    return lambda fast: jax.grad(loss)(_varying.own(fast, loss))


def _divided(value: jax.Array, *norms: jax.Array) -> jax.Array:
    """``value`` over norms that bound it; 0 where a norm is 0, since then so is the value."""
    for norm in norms:
        value = jnp.where(norm == 0, 0.0, value / jnp.where(norm == 0, 1.0, norm))
    return value


@_arguments.checked()
def gradient_alignment(
    main_loss: MainLoss, aux_loss: AuxLoss, *, select: Selection
) -> Callable[[Params, Any, Any, Key], Alignment]:
    """The inner product of the main and the auxiliary gradient, in the selected parameters.

    **Needs labels**: on training or validation data it tells whether an auxiliary task suits
    the main one; on a labelled test set it is an evaluation and may choose nothing.

    Args:
      main_loss: ``(params, x, label, key) -> scalar``, the loss of the prediction.
      aux_loss: ``(params, x, key) -> scalar``, an ``AuxLoss``.
      select: the parameters that adapt; the gradients in all others are left out.

    Returns:
      ``(params, x, label, key) -> Alignment`` for one instance; ``jax.vmap`` it with
      ``in_axes=(None, 0, 0, 0)`` over instances. ``aux_loss`` gets ``fold_in(key, 0)``: its
      gradient is the one of the first inner step that :func:`~ttt_jax.episodic` takes with
      ``key``. ``main_loss`` gets ``fold_in(key, 1)``.

    Raises:
      TypeError: a loss is not a function (a :class:`~ttt_jax.StatefulLoss` is none).
      ValueError: when called: a loss is not a scalar, or the selection matches nothing.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from ttt_jax import select
      >>> main = lambda params, x, label, key: 3 * params[0]
      >>> aux = lambda params, x, key: params[0] + params[1]
      >>> align = gradient_alignment(main, aux, select=select.everything())
      >>> print(align(jnp.zeros(2), None, None, jax.random.key(0)).cosine)
      0.70710677

    References:
      Sun et al., `Test-Time Training with Self-Supervision
      <https://arxiv.org/abs/1909.13231>`_, 2020, Theorem 1.
    """
    for name, loss in (("main_loss", main_loss), ("aux_loss", aux_loss)):
        if not callable(loss):
            raise TypeError(
                f"{name} must be a function, got {type(loss).__name__}. Wrap a loss with a memory "
                "in one that starts from loss.init(params)."
            )

    def align(params: Params, x: Any, label: Any, key: Key) -> Alignment:
        _contract.require_key("gradient_alignment", key)
        fast, frozen = select.split(params)
        aux_key, main_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)

        def main(fast: PyTree) -> jax.Array:
            return _checked("main_loss", main_loss(select.merge(fast, frozen), x, label, main_key))

        def aux(fast: PyTree) -> jax.Array:
            return _checked("aux_loss", aux_loss(select.merge(fast, frozen), x, aux_key))

        main_grad, aux_grad = _own_gradient(main)(fast), _own_gradient(aux)(fast)
        # Elementwise, so that no matrix unit rounds the products.
        products = jax.tree.map(
            lambda a, b: jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32)),
            main_grad,
            aux_grad,
        )
        inner = jnp.sum(jnp.stack(jax.tree.leaves(products)))
        main_norm, aux_norm = _trees.norm(main_grad), _trees.norm(aux_grad)
        return Alignment(inner, _divided(inner, main_norm, aux_norm), main_norm, aux_norm)

    return align


@_arguments.checked()
def shared_parameters(
    main_loss: MainLoss, aux_loss: AuxLoss, *, select: Selection
) -> Callable[[Params, Any, Any, Key], Selection]:
    """The selected parameters that both losses read, such as those of a shared encoder.

    In the others one of the two gradients is zero, so that they add nothing to the inner product
    of :func:`gradient_alignment` and would only dilute the cosine.

    Args:
      main_loss: as in :func:`gradient_alignment`.
      aux_loss: as in :func:`gradient_alignment`.
      select: the parameters that adapt.

    Returns:
      ``(params, x, label, key) -> Selection`` for one instance, of which shapes do
      (``jax.ShapeDtypeStruct``): nothing is computed.

    Raises:
      ValueError: when called: both losses read none of the selected parameters.
    """

    def shared(params: Params, x: Any, label: Any, key: Key) -> Selection:
        paths = [path for path, leaf in _trees.named_leaves(params) if leaf is not None]
        chosen = select_lib.describe(select, params).paths
        used = set(chosen)
        for loss, inputs in ((main_loss, (x, label, key)), (aux_loss, (x, key))):
            jaxpr = jax.make_jaxpr(loss)(params, *inputs).jaxpr
            read = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[1]
            used &= {path for path, needed in zip(paths, read, strict=False) if needed}
        if not used:
            raise ValueError(
                "The main and the auxiliary loss share no selected parameter, so their gradients "
                f"cannot be compared; got {', '.join(chosen[:3])}. Select part of the shared "
                "encoder."
            )
        return select_lib.paths(*(re.escape(path) for path in paths if path in used))

    return shared


@_arguments.checked()
def secant_smoothness(
    main_loss: MainLoss, aux_loss: AuxLoss, *, select: Selection
) -> Callable[[Params, Any, Any, Key], jax.Array]:
    """How fast the main gradient changes along the auxiliary one.

    The beta of Theorem 1 bounds this everywhere and in every direction; here it is read off one
    secant, from the pristine parameters along minus the auxiliary gradient, 1 % of their norm
    long. That is never more than the bound, so a step of :func:`guaranteed_step` computed with it
    may exceed the one that the theorem guarantees.

    Args:
      main_loss: as in :func:`gradient_alignment`.
      aux_loss: as in :func:`gradient_alignment`.
      select: the parameters that adapt.

    Returns:
      ``(params, x, label, key) -> float32 scalar`` for one instance, keys as in
      :func:`gradient_alignment`; 0 where the auxiliary gradient is zero.

    References:
      Sun et al., `Test-Time Training with Self-Supervision
      <https://arxiv.org/abs/1909.13231>`_, 2020, Theorem 1.
    """

    def smoothness(params: Params, x: Any, label: Any, key: Key) -> jax.Array:
        _contract.require_key("secant_smoothness", key)
        fast, frozen = select.split(params)
        aux_key, main_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
        aux = _own_gradient(lambda fast: aux_loss(select.merge(fast, frozen), x, aux_key))(fast)
        main = _own_gradient(lambda fast: main_loss(select.merge(fast, frozen), x, label, main_key))
        length, reach = optax.tree.norm(aux), _RADIUS * optax.tree.norm(fast)
        step = reach / jnp.where(length == 0, 1.0, length)
        moved = jax.tree.map(lambda p, g: p - step * g, fast, aux)
        change = jax.tree.map(jnp.subtract, main(moved), main(fast))
        return jnp.where(length == 0, 0.0, optax.tree.norm(change) / reach)

    return smoothness


@_arguments.checked(smoothness=None)
def guaranteed_step(alignment: Alignment, *, smoothness: Any) -> jax.Array:
    """The step size of Sun et al., Theorem 1, for which the main loss must fall.

    With ``eps = inner > 0`` and ``G = max(main_norm, aux_norm)``, one plain gradient step of
    size ``eps / (smoothness * G^2)`` on the auxiliary loss lowers the main loss by at least
    ``eps^2 / (2 * smoothness * G^2)``.

    Args:
      alignment: what :func:`gradient_alignment` returned, of any common shape ``[...]``.
      smoothness: beta > 0, a Lipschitz constant of the main gradient in the selected parameters
        (for a quadratic its largest eigenvalue). May be traced.

    Returns:
      Float32 ``[...]``; 0 where the inner product is not positive (the theorem is silent) or the
      gradients are not finite.

    References:
      Sun et al., `Test-Time Training with Self-Supervision
      <https://arxiv.org/abs/1909.13231>`_, 2020, Theorem 1.
    """
    if isinstance(smoothness, int | float | np.number):
        _checks.check_number("smoothness", smoothness, 0.0, above=True)
    smoothness = _arguments.array()("", "smoothness", smoothness)
    bound = jnp.maximum(alignment.main_norm, alignment.aux_norm)
    step = _divided(alignment.inner, bound, bound) / smoothness
    return jnp.where((alignment.inner > 0) & jnp.isfinite(step), step, 0.0).astype(jnp.float32)
