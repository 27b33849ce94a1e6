"""Maps over step sizes and numbers of steps, from one program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, inner
from ttt_jax.base import Adapter, Info, Key, Params, Predictor
from ttt_jax.predictors import episodic


@_arguments.checked(learning_rates=_arguments.array())
def step_size_map(
    make: Callable[[jax.Array], Adapter],
    apply: Callable[[Params, Any], Any],
    *,
    learning_rates: Any,
    num_steps: int,
) -> Predictor:
    """Episodic predictions of one instance for every learning rate and number of steps.

    Entry ``[l, k]`` is what ``episodic(make(learning_rates[l]), apply, num_steps=k)`` predicts.
    All learning rates share the source prediction and the first gradient, which do not depend on
    them; after that each has its own copy of the fast parameters, so L rates take the memory of
    L instances.

    Args:
      make: ``make(learning_rate) -> Adapter``; the learning rate is a traced float32 scalar.
      apply: one-instance function ``(params, x) -> output``.
      learning_rates: ``[L]``, floats. May be traced.
      num_steps: S, static.

    Returns:
      A predictor ``(params, x, key) -> (outputs, Info)`` whose outputs have two leading axes
      ``[L, S + 1]``, entry 0 of the second being the source prediction, and whose ``Info`` has a
      leading axis L. Run it over instances with :func:`~ttt_jax.batched`, which puts N first:
      ``[N, L, S + 1, C]``. :func:`select_label_free` wants ``jnp.moveaxis(outputs, 0, 2)``.

    Raises:
      TypeError: when called: ``make`` returned something else than an adapter.
      ValueError: ``learning_rates`` is not a vector of at least one number, ``num_steps`` is
        negative or not an integer.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import ttt_jax as ttt
      >>> loss = lambda params, x, key: 0.5 * (params - x) ** 2
      >>> def make(learning_rate):
      ...     optimizer = optax.sgd(learning_rate)
      ...     return ttt.gradient_adapter(loss, optimizer, select=ttt.select.everything())
      >>> predict = step_size_map(
      ...     make, lambda params, x: params, learning_rates=[0.5, 1.0], num_steps=2
      ... )
      >>> outputs, info = predict(jnp.array(8.0), jnp.array(0.0), jax.random.key(0))
      >>> print(outputs)
      [[8. 4. 2.]
       [8. 0. 0.]]
    """
    inner.check_num_steps(num_steps)
    rates = jnp.asarray(learning_rates, jnp.float32)
    if rates.ndim != 1 or rates.size == 0:
        raise ValueError(
            "learning_rates must be a vector of at least one number; got shape "
            f"{rates.shape}. Pass for instance [1e-3, 1e-2]."
        )

    def predict(params: Params, x: Any, key: Key) -> tuple[Any, Info]:
        def one(rate: jax.Array) -> tuple[Any, Info]:
            adapter = make(rate)
            if not isinstance(adapter, Adapter):
                raise TypeError(
                    "make must return an Adapter for a learning rate, got "
                    f"{type(adapter).__name__}. Return for instance "
                    "gradient_adapter(loss, optax.sgd(learning_rate), select=...)."
                )
            return episodic(adapter, apply, num_steps=num_steps, trace=True)(params, x, key)

        return jax.vmap(one)(rates)

    return predict
