"""The adapter that carries normalization statistics along a stream."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _checks, _trees, select as select_lib
from ttt_jax.base import Adapter, AdapterState, Key, Params, PyTree, StepInfo

__all__ = ["OLD_WEIGHT", "statistics_adapter"]

OLD_WEIGHT = "It is the weight of the old statistics, one minus PyTorch's momentum."


@_arguments.checked()
def statistics_adapter(
    collect: Callable[[Params, Any], PyTree], *, momentum: float | jax.Array
) -> Adapter:
    """Carries running normalization statistics over a stream; differentiates nothing.

    One step is ``statistics <- momentum * statistics + (1 - momentum) * collect(params, x)``,
    Flax's convention for BatchNorm (PyTorch's ``momentum`` is one minus this). ``collect`` sees
    the parameters with the statistics carried so far.

    Args:
      collect: ``collect(params, x) -> statistics`` in the layout of
        ``select.statistics().split(params)[0]``, for instance
        ``ttt_jax.models.linen_statistics(module)`` over a batch.
      momentum: weight of the old statistics, in [0, 1]. May be traced.

    Returns:
      An :class:`~ttt_jax.Adapter`; ``loss`` and ``grad_norm`` of its steps are 0.

    Raises:
      ValueError: a known ``momentum`` outside of [0, 1]; when called: ``params`` without
        ``batch_stats``, or another layout from ``collect``.

    References:
      Schneider et al., `Improving robustness against common corruptions by covariate shift
      adaptation <https://arxiv.org/abs/2006.16971>`_, 2020; Mirza et al., `The Norm Must Go On
      <https://arxiv.org/abs/2112.00463>`_, 2022 (DUA).
    """
    _checks.check_share("momentum", momentum, hint=OLD_WEIGHT)
    selection = select_lib.statistics()

    def init(params: Params) -> AdapterState:
        return AdapterState(
            fast=selection.split(params)[0],
            opt_state=(),
            memory=(),
            count=jnp.zeros((), jnp.int32),
        )

    def merge(params: Params, state: AdapterState) -> Params:
        return selection.merge(state.fast, selection.split(params)[1])

    def step(
        params: Params, state: AdapterState, x: Any, key: Key
    ) -> tuple[AdapterState, StepInfo]:
        new = collect(merge(params, state), x)
        if not _trees.same_structure(new, state.fast):
            raise ValueError(
                "collect must return statistics in the layout of select.statistics(); got "
                f"{jax.tree.structure(new)}, expected {jax.tree.structure(state.fast)}."
            )
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(new)]
        expected = [leaf.shape for leaf in jax.tree.leaves(state.fast)]
        if shapes != expected:
            raise ValueError(
                "collect must return statistics of the shapes that params has; got "
                f"{shapes}, expected {expected}."
            )
        fast = jax.tree.map(
            lambda old, batch: (momentum * old + (1 - momentum) * batch).astype(old.dtype),
            state.fast,
            new,
        )
        zero = jnp.zeros((), jnp.float32)
        info = StepInfo(loss=zero, grad_norm=zero, finite=jnp.isfinite(_trees.norm(fast)))
        return state._replace(fast=fast, count=state.count + 1), info

    return Adapter(init, step, merge)
