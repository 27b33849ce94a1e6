"""The diagonal Fisher information of a source model, by its own labels."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _contract, _varying
from ttt_jax.base import Params, PyTree, Selection
from ttt_jax.losses import _inputs, _source


@_arguments.checked(apply=_arguments.model)
def fisher_diagonal(
    apply: Callable[[Params, Any], jax.Array], *, select: Selection, batch: bool = False
) -> Callable[[Params, Any], PyTree]:
    """How much each selected parameter matters to the source predictions (EATA).

    The mean over source instances of the squared gradient of ``-log p(y | x)``, where y is the
    model's own most likely class. It is the weight of EATA's penalty ``beta * sum(fisher *
    (fast - fast0)^2)``; ``gradient_adapter`` halves its anchor, so that ``anchor`` is
    ``2 * beta * fisher``::

        fisher = source_statistics(fisher_diagonal(apply, select=select), params, loader)
        anchor = jax.tree.map(lambda leaf: 2 * beta * leaf, fisher.value)
        adapter = gradient_adapter(loss, optimizer, select=select, anchor=anchor)

    Args:
      apply: model function ``(params, inputs[N, ...]) -> logits[N, C]``.
      select: the parameters that will adapt.
      batch: False squares the gradient of each instance, the definition (Eq. 9). True squares the
        mean gradient of each batch, as the authors' code does with batches of 64, and as a model
        function with batch statistics needs it: smaller, by up to the batch size. The published
        values of beta, 2000 for ImageNet, belong to it.

    Returns:
      ``fn(params, batch) -> fast``, for :func:`~ttt_jax.source_statistics`, in float32. The batch
      is one of ``ttt_jax.data`` (its ``image`` is taken) or the inputs themselves; batches of
      ``ttt_jax.data`` hold strings, so compile ``fn`` over the inputs.

    Raises:
      ValueError: when called: the selection matches nothing, or logits that are not ``[N, C]``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from ttt_jax import select
      >>> logits = lambda params, x: jnp.stack([params["w"] * x, -params["w"] * x], axis=-1)
      >>> fisher = fisher_diagonal(logits, select=select.everything())
      >>> print(fisher({"w": jnp.zeros(())}, jnp.array([1.0, 3.0]))["w"])
      5.0

    References:
      Niu et al., `EATA <https://arxiv.org/abs/2204.02610>`_, 2022, Eqs. 8-9; Kirkpatrick et al.,
      `Overcoming catastrophic forgetting <https://arxiv.org/abs/1612.00796>`_, 2017.
    """
    _contract.require("select", select, Selection)
    _contract.require_model_function("losses.fisher_diagonal", apply)

    def fisher(params: Params, data: Any) -> PyTree:
        inputs = _source.images_of(data)
        fast, frozen = select.split(params)

        def own_label(fast: PyTree, inputs: Any) -> jax.Array:
            count = _inputs.batch_size(inputs)
            logits = apply(select.merge(fast, frozen), inputs)
            logits = _inputs.check_logits("fisher_diagonal", logits, count)
            log_p = jax.nn.log_softmax(logits, axis=-1)
            label = jax.lax.stop_gradient(logits.argmax(axis=-1, keepdims=True))
            return -jnp.take_along_axis(log_p, label, axis=-1).mean()

        def squares(inputs: Any) -> PyTree:
            copy = _varying.own(fast, lambda fast: own_label(fast, inputs))
            grads = jax.grad(own_label)(copy, inputs)
            return jax.tree.map(lambda leaf: jnp.square(leaf.astype(jnp.float32)), grads)

        if batch:
            return squares(inputs)
        singles = jax.tree.map(lambda leaf: jnp.asarray(leaf)[:, None], inputs)
        return jax.tree.map(lambda leaf: leaf.mean(axis=0), jax.vmap(squares)(singles))

    return fisher
