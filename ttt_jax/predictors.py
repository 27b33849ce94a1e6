"""Predictors: every way to predict one instance, all with one signature."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _checks, _contract, _trees, inner
from ttt_jax.base import (
    Adapter,
    Info,
    Key,
    Params,
    Predictor,
    PyTree,
    Selection,
    StepInfo,
)

__all__ = ["adapted", "augmented", "episodic", "no_steps", "source", "vote"]


def no_steps() -> Info:
    """The ``Info`` of a prediction that differentiates nothing."""
    empty = jnp.zeros((0,), jnp.float32)
    return Info(loss=empty, grad_norm=empty, ok=jnp.ones((), bool), updated=jnp.zeros((), bool))


@_arguments.checked()
def source(apply: Callable[[Params, Any], Any]) -> Predictor:
    """The pristine model: no adaptation, the baseline of every comparison.

    Args:
      apply: one-instance function ``(params, x) -> output``; see :func:`ttt_jax.unbatched`.

    Returns:
      A predictor whose ``Info`` has S = 0, ``ok`` True and ``updated`` False.
    """
    _contract.require_function("apply", apply, "(params, x) -> output")

    def predict(params: Params, x: Any, key: Key) -> tuple[Any, Info]:
        return apply(params, x), no_steps()

    return predict


@_arguments.checked()
def adapted(predictor: Predictor, *, select: Selection) -> Predictor:
    """A predictor whose instance brings its own adapter, as a request to a server does.

    An instance is the pair ``(fast, x)``: the predictor runs on ``x`` with the selected leaves of
    the parameters replaced by ``fast``, a tree like the parameters with ``None`` in place of the
    others (``select.split(params)[0]`` is one). Under :func:`batched` every instance has its own
    while the base stays one shared array.

    Args:
      predictor: any predictor.
      select: the parameters that an instance brings.

    Returns:
      A predictor over ``(fast, x)``.

    Raises:
      ValueError: when called: an instance that is no such pair, or an adapter of another layout.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import ttt_jax as ttt
      >>> params = {"base": jnp.ones(3), "lora_a": jnp.zeros(3)}
      >>> model = ttt.source(lambda params, x: (params["base"] + params["lora_a"]) @ x)
      >>> own = ttt.adapted(model, select=ttt.select.lora())
      >>> adapters = {"base": None, "lora_a": jnp.array([[0.0, 0, 0], [1, 1, 1]])}
      >>> keys = ttt.sample_keys(jax.random.key(0), [0, 1])
      >>> print(ttt.batched(own)(params, (adapters, jnp.ones((2, 3))), keys)[0])
      [3. 6.]
    """
    _contract.require("select", select, Selection)

    def predict(params: Params, x: Any, key: Key) -> tuple[Any, Info]:
        if not isinstance(x, tuple) or len(x) != 2:
            raise ValueError(
                "adapted needs an instance (fast, x), an adapter and what it is for; got "
                f"{_contract.described(x)}."
            )
        own, frozen = select.split(params)
        _check_layout(own, x[0])
        return predictor(select.merge(x[0], frozen), x[1], key)

    return predict


def _check_layout(due: PyTree, fast: PyTree) -> None:
    def layout(tree: PyTree) -> Any:
        leaves = _trees.named_leaves(tree)
        return {(path, jnp.shape(leaf)) for path, leaf in leaves if leaf is not None}

    if odd := sorted(layout(due) ^ layout(fast)):
        raise ValueError(
            "adapted needs an adapter like select.split(params)[0], None in place of every other "
            f"leaf; they differ at {odd[0][0]!r}, shape {odd[0][1]}. Ranks and targets "
            "are padded by models.pad_rank."
        )


@_arguments.checked()
def augmented(
    apply: Callable[[Params, Any], Any],
    augment: Callable[[Any, Key], Any],
    *,
    num_views: int,
    include_identity: bool = True,
    mean: str = "probability",
) -> Predictor:
    """Test-time augmentation: averages the predictions for several views of one instance.

    Args:
      apply: one-instance function ``(params, x) -> logits[..., C]``.
      augment: ``augment(x, key) -> x``, one random view.
      num_views: V, the number of forward passes in all.
      include_identity: whether the first of the V views is ``x`` itself.
      mean: ``"probability"`` averages softmax outputs and returns the **logarithm** of the mean
        probability, so the output is a vector of logits like any other; ``"logit"`` averages
        the logits.

    Returns:
      A predictor with output ``[..., C]`` and S = 0.

    Raises:
      ValueError: ``num_views`` < 1 or an unknown ``mean``.

    References:
      Krizhevsky et al., ImageNet Classification with Deep Convolutional Neural Networks, 2012.
    """
    _checks.check_count("num_views", num_views)
    _contract.require_function("apply", apply, "(params, x) -> logits")
    if mean not in ("probability", "logit"):
        raise ValueError(f"mean must be 'probability' or 'logit', got {mean!r}.")

    def predict(params: Params, x: Any, key: Key) -> tuple[Any, Info]:
        _contract.require_key("augmented", key, maps=True)
        keys = jax.random.split(key, num_views)
        views = jax.vmap(augment, in_axes=(None, 0))(x, keys[1:] if include_identity else keys)
        if include_identity:
            views = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), x, views)
        logits = jax.vmap(apply, in_axes=(None, 0))(params, views)
        _contract.require_array("augmented", logits)
        logits = logits.astype(jnp.float32)
        if mean == "logit":
            return logits.mean(0), no_steps()
        log_p = jax.nn.log_softmax(logits, axis=-1)
        return jax.nn.logsumexp(log_p, axis=0) - jnp.log(float(num_views)), no_steps()

    return predict


@_arguments.checked()
def episodic(
    adapter: Adapter,
    apply: Callable[[Params, Any], Any],
    *,
    num_steps: int,
    trace: bool = False,
) -> Predictor:
    """Adapts a private copy to the instance, predicts, and forgets.

    An instance with a step that is not finite returns the pristine prediction with ``ok``
    False; the choice is made inside the traced code, on the fast parameters, before the one
    prediction, so neighbors under ``vmap`` are bitwise untouched.

    Args:
      adapter: what one inner step is.
      apply: one-instance function ``(params, x) -> output`` (with ``batch=True`` losses: the
        model function itself, ``x`` being a batch).
      num_steps: S, static; 0 gives the source prediction bit for bit.
      trace: if True the output gains a leading axis ``[S + 1]``: entry k is the output that
        ``num_steps=k`` gives, entry 0 the source prediction.

    Returns:
      A predictor with ``Info`` over S steps.

    Raises:
      TypeError: ``adapter`` or ``apply`` is another thing, or a factory not called.
      ValueError: ``num_steps`` is negative or not an integer.
    """
    _contract.require("adapter", adapter, Adapter)
    _contract.require_function("apply", apply, "(params, x) -> output")
    inner.check_num_steps(num_steps)

    def predict(params: Params, x: Any, key: Key) -> tuple[Any, Info]:
        if num_steps == 0:
            output = apply(params, x)
            return (jax.tree.map(lambda a: a[None], output) if trace else output), no_steps()
        pristine = adapter.init(params)
        if trace:
            outputs, infos, state = _traced(params, pristine, x, key)
        else:
            state, infos = inner.inner_loop(adapter, num_steps)(params, pristine, x, key)
        ok = infos.finite.all()
        kept = _trees.where(ok, state, pristine)
        if not trace:
            outputs = apply(adapter.merge(params, kept), x)
        updated = ok & _trees.differs(pristine, state)
        return outputs, Info(infos.loss, infos.grad_norm, ok, updated, infos.aux)

    def _traced(params: Params, pristine: PyTree, x: Any, key: Key) -> Any:
        # The flag rides in the state so that entry k knows of any failure up to step k.
        def step(params: Params, state: Any, x: Any, key: Key) -> Any:
            inner, ok = state
            inner, info = adapter.step(params, inner, x, key)
            return (inner, ok & info.finite), info

        def observe(state: Any, info: StepInfo) -> Any:
            inner, ok = state
            return apply(adapter.merge(params, _trees.where(ok, inner, pristine)), x)

        flagged = Adapter(adapter.init, step, lambda params, state: params)
        start = (pristine, jnp.ones((), bool))
        loop = inner.observed_loop(flagged, num_steps, observe)
        (state, _), (infos, rest) = loop(params, start, x, key)
        outputs = jax.tree.map(
            lambda first, later: jnp.concatenate([first[None], later]), apply(params, x), rest
        )
        return outputs, infos, state

    return predict


@_arguments.checked()
def vote(predictor: Predictor, num_votes: int, *, combine: Callable[[Any], Any]) -> Predictor:
    """Runs a predictor several times with independent keys and combines the outputs.

    Args:
      predictor: any predictor; vote i gets ``fold_in(key, i)``.
      num_votes: V, static.
      combine: ``combine(outputs[V, ...]) -> output``, for instance a mean or a majority.

    Returns:
      A predictor; its ``Info`` averages loss, gradient norm and ``aux`` over the votes, ``ok`` if
      all votes are, ``updated`` if any is.

    Raises:
      ValueError: ``num_votes`` < 1.
    """
    _checks.check_count("num_votes", num_votes)
    _contract.require_predictor("predictor", predictor)

    def predict(params: Params, x: Any, key: Key) -> tuple[Any, Info]:
        _contract.require_key("vote", key, maps=True)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(num_votes))
        outputs, info = jax.vmap(predictor, in_axes=(None, None, 0))(params, x, keys)
        merged = Info(
            loss=info.loss.mean(0),
            grad_norm=info.grad_norm.mean(0),
            ok=info.ok.all(),
            updated=info.updated.any(),
            aux=jax.tree.map(lambda leaf: leaf.astype(jnp.float32).mean(0), info.aux),
        )
        return combine(outputs), merged

    return predict
