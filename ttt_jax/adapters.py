"""Adapters: what one inner step is."""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ttt_jax import _arguments, _checks, _contract, _mixed, _optimizers, _trees, _varying
from ttt_jax.base import (
    Adapter,
    AdapterState,
    Aux,
    AuxLoss,
    Key,
    Params,
    PyTree,
    Selection,
    StatefulLoss,
    StepInfo,
)
from ttt_jax.source import value_of

__all__ = ["filtered", "gradient_adapter", "sharpness_aware_adapter"]


def _as_stateful(loss: AuxLoss | StatefulLoss) -> StatefulLoss:
    """A loss with a memory, empty for a plain one; its value is whatever ``loss`` returns."""
    if isinstance(loss, StatefulLoss):
        return loss
    form = "(params, x, key) -> scalar or a StatefulLoss"
    _contract.require_function("The loss of an adapter", loss, form)
    return StatefulLoss(
        init=lambda params: (),
        value=lambda params, memory, x, key: (loss(params, x, key), memory),
        after=lambda adapted_params, memory: memory,
    )


@functools.cache
def _warn_narrow(dtypes: tuple[str, ...]) -> None:
    warnings.warn(
        f"Adapting parameters of dtype {', '.join(dtypes)}: updates smaller than their spacing "
        "round away, so small step sizes do nothing. Keep params in float32 and set the model's "
        "compute dtype instead.",
        stacklevel=4,
    )


def _warn_if_narrow(fast: PyTree) -> None:
    narrow = {
        str(leaf.dtype)
        for leaf in jax.tree.leaves(fast)
        if _trees.is_floating(leaf) and jnp.finfo(leaf.dtype).bits < 32
    }
    if narrow:
        _warn_narrow(tuple(sorted(narrow)))


def _with_aux(value: Any, has_aux: bool) -> tuple[jax.Array, Aux]:
    """The scalar that a loss returned, and what it reports beside it."""
    pair = isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Mapping)
    if has_aux and not pair:
        raise ValueError(
            "A loss with has_aux=True must return (scalar, {name: array}); got "
            f"{_described(value)}. Return a dict beside the scalar, or leave has_aux out."
        )
    if pair and not has_aux:
        raise ValueError(
            "An auxiliary loss must return a scalar; got (scalar, {name: array}). Give "
            "has_aux=True to the factory of its adapter."
        )
    if not pair:
        return _scalar(value), {}
    return _scalar(value[0]), jax.tree.map(jnp.asarray, dict(value[1]))


def _described(value: Any) -> str:
    return f"shape {jnp.shape(value)}" if hasattr(value, "shape") else type(value).__name__


def _scalar(value: Any) -> jax.Array:
    value = jnp.asarray(value)
    if value.shape != ():
        raise ValueError(
            f"An auxiliary loss must return a scalar; got shape {value.shape}. Average it, or "
            "lift a one-instance loss over a batch with losses.over_batch."
        )
    return value.astype(jnp.float32)


def _is_zero(anchor: Any) -> bool:
    """Whether the anchor is the literal default; a traced or array anchor never is."""
    return isinstance(anchor, int | float) and anchor == 0


def _anchored(anchor: PyTree, fast: PyTree, fast0: PyTree) -> tuple[jax.Array, PyTree]:
    """Value and gradient of ``0.5 * sum(anchor * (fast - fast0)^2)``."""
    leaves, treedef = jax.tree.flatten(fast)
    weights = jax.tree.leaves(anchor)
    if not _trees.same_structure(anchor, fast):
        weights = weights * len(leaves)
    deltas = [a - b for a, b in zip(leaves, jax.tree.leaves(fast0), strict=True)]
    grads = [(w * d).astype(d.dtype) for w, d in zip(weights, deltas, strict=True)]
    value = 0.5 * sum(
        jnp.sum((g * d).astype(jnp.float32)) for g, d in zip(grads, deltas, strict=True)
    )
    return jnp.asarray(value, jnp.float32), jax.tree.unflatten(treedef, grads)


def _check_anchor(anchor: PyTree, fast: PyTree) -> None:
    if not (_trees.same_structure(anchor, fast) or _trees.same_structure(anchor, 0.0)):
        raise ValueError(
            "anchor must be a number or a pytree shaped like the selected parameters; got "
            f"{jax.tree.structure(anchor)}, expected {jax.tree.structure(fast)}. Take the same "
            "selection's split of it."
        )
    weights, leaves = jax.tree.leaves(anchor), jax.tree.leaves(fast)
    weights = weights * len(leaves) if len(weights) < len(leaves) else weights
    shapes = [(jnp.shape(w), jnp.shape(leaf)) for w, leaf in zip(weights, leaves, strict=True)]
    if wrong := [pair for pair in shapes if pair[0] not in ((), pair[1])]:
        raise ValueError(
            f"anchor must have numbers, or arrays of the parameters' shapes; got {wrong[0][0]} for "
            f"parameters of shape {wrong[0][1]}. Take the same selection's split of it."
        )


def _gradient_step(
    loss: StatefulLoss,
    optimizer: optax.GradientTransformation,
    select: Selection,
    anchor: PyTree,
    gradient: Callable[..., Any],
    has_aux: bool,
) -> Adapter:
    """The adapter shared by all gradient methods; they differ in ``gradient`` only.

    ``gradient(objective, fast, merge) -> ((value, (memory, aux)), grads, surface)``;
    ``objective(fast)`` is the loss, or another one given with it, and ``merge(fast)`` the whole
    parameters. ``surface = (its value at fast, its function)`` is that whose gradient at ``fast``
    is ``grads``, for optimizers that search along it.
    """
    _contract.require("select", select, Selection)
    optimizer = _optimizers.checked(optimizer)
    anchor = value_of(anchor)

    def init(params: Params) -> AdapterState:
        fast, _ = select.split(params)
        _warn_if_narrow(fast)
        return AdapterState(
            fast=fast,
            opt_state=optimizer.init(fast),
            memory=loss.init(params),
            count=jnp.zeros((), jnp.int32),
        )

    def merge(params: Params, state: AdapterState) -> Params:
        return select.merge(state.fast, select.split(params)[1])

    def step(
        params: Params, state: AdapterState, x: Any, key: Key
    ) -> tuple[AdapterState, StepInfo]:
        fast0, frozen = select.split(params)

        def objective(fast: PyTree, loss: StatefulLoss = loss) -> tuple[jax.Array, Any]:
            value, memory = loss.value(select.merge(fast, frozen), state.memory, x, key)
            value, aux = _with_aux(value, has_aux)
            return value, (memory, aux)

        state = _varying.own(state, lambda state: objective(state.fast)[0])

        (value, (memory, aux)), grads, (height, surface) = gradient(
            objective, state.fast, lambda fast: select.merge(fast, frozen)
        )
        # A loss whose gradient is exactly zero asked for no step: every weight of a filter was
        # zero. Stepping all the same would let momentum, decay or the anchor move the weights.
        # Leaf by leaf: squares of small gradients would vanish in a norm.
        active = _trees.any_nonzero(grads)
        if not _is_zero(anchor):
            _check_anchor(anchor, state.fast)
            penalty, pull = _anchored(anchor, state.fast, fast0)
            value, height = value + penalty, height + penalty
            grads = jax.tree.map(jnp.add, grads, pull)
        grad_norm = _trees.norm(grads)

        def value_fn(fast: PyTree) -> jax.Array:
            there = surface(fast)
            return there if _is_zero(anchor) else there + _anchored(anchor, fast, fast0)[0]

        search = {"value": height, "grad": grads, "value_fn": value_fn}
        updates, opt_state = _optimizers.update(
            optimizer, grads, state.opt_state, state.fast, search
        )
        fast = optax.apply_updates(state.fast, updates)
        stepped = AdapterState(
            fast=_trees.where(active, fast, state.fast),
            opt_state=_trees.where(active, opt_state, state.opt_state),
            memory=memory,
            count=state.count + active.astype(jnp.int32),
        )
        stepped = stepped._replace(memory=loss.after(merge(params, stepped), memory))
        # The norm rather than the leaves: a weight whose square overflows float32 is lost too.
        finite = (
            jnp.isfinite(value) & jnp.isfinite(grad_norm) & jnp.isfinite(_trees.norm(stepped.fast))
        )
        # A memory may take in the instance before its loss depends on it; a value that was not
        # finite to begin with (a bound of infinity) is no harm.
        finite &= ~_trees.spoiled(
            (state.memory, state.opt_state), (stepped.memory, stepped.opt_state)
        )
        return stepped, StepInfo(loss=value, grad_norm=grad_norm, finite=finite, aux=aux)

    return Adapter(init, step, merge)


@_arguments.checked()
def gradient_adapter(
    loss: AuxLoss | StatefulLoss,
    optimizer: optax.GradientTransformation,
    *,
    select: Selection,
    anchor: PyTree = 0.0,
    has_aux: bool = False,
    mixed: bool = False,
) -> Adapter:
    """Gradient steps on an auxiliary loss, on a private copy of the selected parameters.

    One step is ``fast <- optimizer(fast, grad(loss + 0.5 * sum(anchor * (fast - fast0)^2)))``.
    A step whose loss gradient is exactly zero (every filter weight was zero) changes neither
    parameters, optimizer state nor count.

    Args:
      loss: an ``AuxLoss`` ``(params, x, key) -> scalar`` or a :class:`~ttt_jax.StatefulLoss`.
      optimizer: any optax transformation; its state is private to the instance. One that needs
        them (``lbfgs``, ``polyak_sgd``, ``reduce_on_plateau``) is given ``value``, ``grad`` and
        ``value_fn`` of the loss and the anchor's penalty.
      select: which parameters adapt, see :mod:`ttt_jax.select`.
      anchor: strength of the pull to the pristine parameters: a float, or a pytree shaped like
        ``fast`` such as a Fisher diagonal (EATA, Niu et al. 2022, Eq. 8). Counts in ``loss``
        and ``grad_norm``. May be traced.
      has_aux: whether the loss returns ``(scalar, {name: array})``, as in ``jax.value_and_grad``;
        the arrays become ``aux`` of every step's ``StepInfo``.
      mixed: how a gradient through the steps (:mod:`ttt_jax.meta`) differentiates theirs. False:
        in reverse, back through the backward pass. True: forward over reverse, see
        :func:`ttt_jax.meta.adapted_loss`; the same value from less memory. The loss must then have
        a derivative in forward mode of its gradient, and a gradient through the steps none of a
        higher order.

    Returns:
      An :class:`~ttt_jax.Adapter` whose state is an :class:`~ttt_jax.AdapterState`.

    Raises:
      ValueError: in ``init`` or ``step``: the selection matches nothing, the loss is not a
        scalar, or the anchor's structure differs from that of ``fast``.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import ttt_jax as ttt
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> loss = lambda params, x, key: jnp.sum((params["w"] * x) ** 2)
      >>> adapter = ttt.gradient_adapter(loss, optax.sgd(0.1), select=ttt.select.everything())
      >>> state, info = adapter.step(params, adapter.init(params), 1.0, jax.random.key(0))
      >>> print(adapter.merge(params, state)["w"], info.loss)
      [0.8 1.6] 5.0

    References:
      Sun et al., `Test-Time Training with Self-Supervision
      <https://arxiv.org/abs/1909.13231>`_, 2020, Section 2.
    """
    for strength in jax.tree.leaves(anchor):
        if isinstance(strength, int | float | complex | np.number | np.ndarray | jax.Array):
            _checks.check_number("anchor", strength, 0.0, scalar=False)

    def gradient(objective: Any, fast: PyTree, merge: Callable[[PyTree], Params]) -> Any:
        if mixed:
            pair, grads = _mixed.value_and_grad(objective, fast)
        else:
            pair, grads = jax.value_and_grad(objective, has_aux=True)(fast)
        return pair, grads, (pair[0], lambda fast: objective(fast)[0])

    return _gradient_step(_as_stateful(loss), optimizer, select, anchor, gradient, has_aux)


@_arguments.checked()
def sharpness_aware_adapter(
    loss: AuxLoss | StatefulLoss,
    optimizer: optax.GradientTransformation,
    *,
    select: Selection,
    rho: float | jax.Array,
    peak_loss: Callable[[Params], AuxLoss] | None = None,
    has_aux: bool = False,
) -> Adapter:
    """Steps along the gradient at the sharpest nearby point (SAM, as in SAR).

    ``g1 = grad(fast)``; ``g2 = grad(fast + rho * g1 / |g1|)``; the optimizer takes ``g2`` from
    ``fast``. Loss and memory are those at ``fast``; ``grad_norm`` is that of ``g2``.

    Args:
      loss: an ``AuxLoss`` or a :class:`~ttt_jax.StatefulLoss`.
      optimizer: any optax transformation.
      select: which parameters adapt.
      rho: radius of the neighbourhood in the norm of all selected parameters (SAR: 0.05). May
        be traced.
      peak_loss: ``peak_loss(params) -> AuxLoss``, another loss for the peak, built from the
        parameters before the climb. With ``losses.reliable_entropy(..., reference=params)`` only
        instances that were reliable there count (SAR). Its value is then the loss reported.
        ``None``: the same loss.
      has_aux: whether the losses return ``(scalar, {name: array})``, see :func:`gradient_adapter`.

    Returns:
      An :class:`~ttt_jax.Adapter`.

    References:
      Niu et al., `Towards Stable Test-Time Adaptation in Dynamic Wild World
      <https://arxiv.org/abs/2302.12400>`_, 2023, Eqs. 3-5.
    """

    def gradient(objective: Any, fast: PyTree, merge: Callable[[PyTree], Params]) -> Any:
        value_and_grad = jax.value_and_grad(objective, has_aux=True)
        (value, (memory, aux)), ascent = value_and_grad(fast)
        length = _trees.norm(ascent)
        # No direction, no climb: keeps a filtered-out batch at an exactly zero gradient.
        scale = jnp.where(length > 0, rho / jnp.where(length > 0, length, 1.0), 0.0)
        peak = jax.tree.map(lambda a, g: a + (scale * g).astype(a.dtype), fast, ascent)
        there = () if peak_loss is None else (_as_stateful(peak_loss(merge(fast))),)
        (height, (_, aux_there)), grads = value_and_grad(peak, *there)
        if peak_loss is not None:
            value, aux = height, aux_there

        def surface(moved: PyTree) -> jax.Array:
            # The climb is held, so that its gradient at `fast` is that of the peak.
            offset = jax.tree.map(lambda b, a, p: b + (p - a), moved, fast, peak)
            return objective(offset, *there)[0]

        return (value, (memory, aux)), grads, (height, surface)

    _checks.check_number("rho", rho, 0.0)
    return _gradient_step(_as_stateful(loss), optimizer, select, 0.0, gradient, has_aux)


@_arguments.checked()
def filtered(adapter: Adapter, keep: Callable[[Params, Any, Key], Any]) -> Adapter:
    """Skips the instances that ``keep`` rejects.

    A skipped instance keeps its state: its prediction is ``ok`` and not ``updated``, with loss
    and gradient norm 0. Under ``vmap`` both branches are computed, so this saves no time.

    Args:
      adapter: the adapter to filter.
      keep: ``keep(params, x, key) -> bool`` scalar, where ``params`` are the parameters that
        the step would start from (the pristine ones at the first step).

    Returns:
      An :class:`~ttt_jax.Adapter` over the same state.

    References:
      The confidence threshold of Sun et al. 2020, Appendix A2.
    """
    _contract.require("adapter", adapter, Adapter)
    _contract.require_function("keep", keep, "(params, x, key) -> bool")

    def step(params: Params, state: PyTree, x: Any, key: Key) -> tuple[PyTree, StepInfo]:
        wanted = jnp.asarray(keep(adapter.merge(params, state), x, key))
        if wanted.shape != ():
            raise ValueError(
                f"keep must return one bool per instance; got shape {wanted.shape}. Inside a "
                "batch, filter with weights instead: losses.entropy(apply, weight=...)."
            )
        wanted = wanted.astype(bool)
        stepped, info = adapter.step(params, state, x, key)
        zero = jnp.zeros((), jnp.float32)
        return _trees.where(wanted, stepped, state), StepInfo(
            loss=jnp.where(wanted, info.loss, zero),
            grad_norm=jnp.where(wanted, info.grad_norm, zero),
            finite=info.finite | ~wanted,
            aux=_trees.where(wanted, info.aux, jax.tree.map(jnp.zeros_like, info.aux)),
        )

    return adapter._replace(step=step)
