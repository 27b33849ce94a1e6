"""Outer training: weights from which adapting helps, by gradients through the inner steps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _checks, _contract, _scans, _trees, _varying, inner
from ttt_jax.base import Adapter, AuxLoss, Key, Params, PyTree

__all__ = ["adapted_loss", "scan", "value_and_grad"]


@_arguments.checked(start=None, remat=_arguments.count(0))
def scan(
    body: Callable[[Any, Any], tuple[Any, Any]], start: Any, xs: Any, *, remat: int | None = None
) -> tuple[Any, Any]:
    """``jax.lax.scan`` whose backward pass computes the steps again.

    Every ``remat`` steps the carry is kept. The backward pass goes through those groups from the
    last one on: it computes the carries of a group, then each of its steps, again. With T steps it
    holds ``T / remat + remat`` carries and what one step leaves for its derivative, where plain
    ``scan`` holds that of all T.

    **Cost:** two forward passes more than plain ``scan``, one where ``remat`` is 1.

    Args:
      body: ``body(carry, x) -> (carry, y)``.
      start: the first carry.
      xs: a tree of arrays ``[T, ...]``.
      remat: steps between two kept carries; 0 for plain ``scan``, None for about ``sqrt(T)``.

    Returns:
      The last carry, and the outputs ``[T, ...]``, as of ``jax.lax.scan``.

    Raises:
      ValueError: arrays of different lengths, or none.

    References:
      Chen et al., `Training Deep Nets with Sublinear Memory Cost
      <https://arxiv.org/abs/1604.06174>`_, 2016.
    """
    if not _checks.leading_size("xs of meta.scan", xs):
        return jax.lax.scan(body, start, xs)
    return _scans.rematerialized(body, start, xs, remat)


@_arguments.checked(num_steps=_arguments.count(0), remat=_arguments.count(0))
def adapted_loss(
    adapter: Adapter,
    loss: AuxLoss,
    *,
    num_steps: int,
    first_order: bool = False,
    remat: int | None = None,
) -> AuxLoss:
    """The loss of an instance after adapting to it, as a function of the weights before.

    ::

        L(w) = loss(merge(w, w_S), x),   w_0 = w,   w_{i+1} = optimizer(w_i, grad aux(w_i, x))

    Its gradient goes through the inner steps (MAML), or with ``first_order`` is that of ``loss``
    at the adapted weights (FOMAML): the steps then count as constants, which costs no second
    derivatives. An inner loss that no gradient of the second order reaches (it does not depend on
    the weights that are to be trained) trains nothing through the steps.

    **Memory and time:** ``remat`` bounds what is kept of all steps. Of a single one an adapter made
    with ``mixed=True`` keeps least: the gradient g of its step is differentiated forward over
    reverse. For a cotangent u of g, with w the weights that adapt and v all others::

        (dg/dw)^T u, (dg/dv)^T u = d/dt grad_(w, v) aux(w + t u, v)   at t = 0

    as second derivatives are symmetric: a tangent of one more backward pass, where reverse mode
    keeps that pass and goes back through it.

    Args:
      adapter: what adapts and how; any adapter of this library.
      loss: ``(params, x, key) -> scalar``, what adapting is to improve, on the same instance:
        ``x`` holds what the adapter learns from and what is scored, labels among it.
      num_steps: S, static; 0 is the loss without adapting.
      first_order: whether the inner steps count as constants.
      remat: steps between two kept states, see :func:`scan`.

    Returns:
      ``(params, x, key) -> scalar``, a loss like any other: inner step i uses ``fold_in(key, i)``,
      as :func:`ttt_jax.episodic` does, and ``loss`` uses ``fold_in(key, S)``.

    Raises:
      TypeError: ``adapter`` is no :class:`~ttt_jax.Adapter`, or ``loss`` no function.
      ValueError: a count that is negative or no integer; when called: a loss that is no scalar.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import ttt_jax as ttt
      >>> aux = lambda params, x, key: 0.5 * (params["w"] - x) ** 2
      >>> adapter = ttt.gradient_adapter(aux, optax.sgd(0.5), select=ttt.select.everything())
      >>> outer = ttt.meta.adapted_loss(adapter, lambda params, x, key: params["w"], num_steps=2)
      >>> params, key = {"w": jnp.float32(1.0)}, jax.random.key(0)
      >>> print(outer(params, 3.0, key), jax.grad(outer)(params, 3.0, key)["w"])
      2.5 0.25

    References:
      Finn et al., `Model-Agnostic Meta-Learning <https://arxiv.org/abs/1703.03400>`_, 2017, Eq. 1
      and Section 5.2 (first order); Kemaev et al., `Scalable Meta-Learning via Mixed-Mode
      Differentiation <https://arxiv.org/abs/2505.00793>`_, 2025.
    """
    _contract.require("adapter", adapter, Adapter)
    _contract.require_function("loss", loss, "(params, x, key) -> scalar")
    inner.check_num_steps(num_steps)

    def outer(params: Params, x: Any, key: Key) -> jax.Array:
        _contract.require_key("meta.adapted_loss", key)
        state = adapter.init(params)

        def step(state: PyTree, place: jax.Array) -> tuple[PyTree, None]:
            return adapter.step(params, state, x, jax.random.fold_in(key, place))[0], None

        if num_steps:
            state, _ = scan(step, state, jnp.arange(num_steps), remat=0 if first_order else remat)
        adapted = adapter.merge(params, state)
        if first_order:
            adapted = jax.tree.map(_as_constant, adapted, params)
        return _scalar(loss(adapted, x, jax.random.fold_in(key, num_steps)))

    return outer


def _as_constant(adapted: Any, leaf: Any) -> Any:
    """The adapted value, whose derivative with respect to the leaf before is one."""
    if not _trees.is_floating(adapted):
        return adapted
    # The difference is exactly 0.
    return jax.lax.stop_gradient(adapted) + (leaf - jax.lax.stop_gradient(leaf))


def _scalar(value: Any) -> jax.Array:
    value = jnp.asarray(value)
    if value.shape != ():
        raise ValueError(f"An outer loss must return a scalar; got shape {value.shape}.")
    return value


@_arguments.checked(chunk_size=_arguments.count())
def value_and_grad(
    outer_loss: AuxLoss, *, chunk_size: int | None = None, report: bool = False
) -> Callable[[Params, Any, Key], tuple[Any, Params]]:
    """The mean of an outer loss over instances, and its gradient in the weights.

    The gradient is taken per instance. One that is not finite, or whose loss is not, is left out,
    and the rest is averaged: masked in a sum of losses, it would still spoil the gradient, as
    ``0 * nan`` is ``nan``.

    Args:
      outer_loss: ``(params, x, key) -> scalar`` of one instance, for example of
        :func:`adapted_loss`.
      chunk_size: instances whose gradients are held at once, each as large as the weights; None
        for all.
      report: whether the value is a pair, the mean and ``{"ok": bool [N], "loss": [N]}``.

    Returns:
      ``(params, xs[N, ...], keys[N]) -> (value, gradients)``: the mean over the finite instances,
      ``nan`` where there is none; gradients like ``params``, 0 where there is none and for integer
      leaves.

    Raises:
      TypeError: ``outer_loss`` is no function; when called: no keys.
      ValueError: when called: instances of different counts, or a loss that is no scalar.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import ttt_jax as ttt
      >>> outer = ttt.meta.value_and_grad(lambda params, x, key: params["w"] * x)
      >>> xs, keys = jnp.array([1.0, jnp.nan, 3.0]), ttt.sample_keys(jax.random.key(0), [0, 1, 2])
      >>> value, grads = outer({"w": jnp.float32(2.0)}, xs, keys)
      >>> print(value, grads["w"])
      4.0 2.0
    """
    _contract.require_function("outer_loss", outer_loss, "(params, x, key) -> scalar")

    def instance(params: Params, x: Any, key: Key, real: jax.Array) -> Any:
        _contract.require_key("meta.value_and_grad", key)
        trained, held = _floating(params)

        def loss(trained: PyTree) -> jax.Array:
            return _scalar(outer_loss(_merged(trained, held), x, key))

        value, grads = jax.value_and_grad(loss)(trained)
        finite = jnp.isfinite(value)
        for leaf in jax.tree.leaves(grads):
            finite &= jnp.isfinite(leaf).all()
        return (
            value,
            finite,
            _trees.where(finite & real, grads, jax.tree.map(jnp.zeros_like, grads)),
        )

    def call(params: Params, xs: Any, keys: Key) -> tuple[Any, Params]:
        count = _checks.leading_size("instances of meta.value_and_grad", (xs, keys))
        size = min(chunk_size or count, count)
        # What fills the last chunk repeats the first instances, and does not count.
        place = jnp.arange(count + -count % size).reshape(-1, size)
        chunks = jax.tree.map(lambda leaf: jnp.asarray(leaf)[place % count], (xs, keys))

        def add(total: Params, chunk: Any) -> Any:
            (xs, keys), real = chunk
            values, finite, grads = jax.vmap(instance, (None, 0, 0, 0))(params, xs, keys, real)
            total = jax.tree.map(lambda old, leaf: old + leaf.sum(0), total, grads)
            return total, (values, finite)

        trained, held = _floating(params)
        start = jax.tree.map(jnp.zeros_like, trained)
        total, made = _varying.scan(add, start, (chunks, place < count))
        values, finite = (leaf.reshape(-1)[:count] for leaf in made)
        kept = finite.sum(dtype=values.dtype)
        mean = jnp.where(finite, values, 0.0).sum() / kept
        share = 1.0 / jnp.maximum(kept, 1.0)
        grads = jax.tree.map(lambda leaf: leaf * share.astype(leaf.dtype), total)
        grads = _merged(grads, jax.tree.map(jnp.zeros_like, held))
        return ((mean, {"ok": finite, "loss": values}) if report else mean), grads

    return call


def _floating(params: Params) -> tuple[PyTree, PyTree]:
    """The leaves that can be trained and the others, each with None in place of the rest."""
    return (
        jax.tree.map(lambda leaf: leaf if _trees.is_floating(leaf) else None, params),
        jax.tree.map(lambda leaf: None if _trees.is_floating(leaf) else leaf, params),
    )


def _merged(trained: PyTree, held: PyTree) -> Params:
    return jax.tree.map(
        lambda a, b: b if a is None else a, trained, held, is_leaf=lambda leaf: leaf is None
    )
