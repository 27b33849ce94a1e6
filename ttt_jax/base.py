"""The contract: what every loss, selection, adapter, predictor and stream is.

Everything here is a plain function or a ``NamedTuple`` of plain functions, so that
``jax.grad``, ``jax.vmap``, ``jax.jit``, ``jax.lax.scan`` and sharding compose with it.

Conventions, valid for the whole library:

* ``x`` is **one** test instance: any pytree (an image ``[H, W, C]``, a token sequence with
  its mask, a few-shot task). The user adds the sample axis with
  :func:`ttt_jax.batched` or ``jax.vmap``.
* ``params`` is a pytree of arrays laid out like a Linen variables dict
  (``{"params": ..., "batch_stats": ...}``) or plain parameters.
* ``key`` is a typed PRNG key, always the last argument, and it is consumed.
* A *model function* is batched, ``(params, inputs[N, ...]) -> outputs[N, ...]``.
* Nothing in the library calls ``jax.jit``; no factory branches in Python on the value of a
  learning rate, anchor, probability or radius, so those may be traced.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax

__all__ = [
    "Adapter",
    "AdapterState",
    "Aux",
    "AuxLoss",
    "FromSource",
    "Info",
    "Key",
    "Params",
    "Predictor",
    "PyTree",
    "Reset",
    "Selection",
    "StatefulLoss",
    "StepInfo",
    "Stream",
    "StreamInfo",
]

PyTree: TypeAlias = Any
Params: TypeAlias = Any
Key: TypeAlias = jax.Array

Aux: TypeAlias = Mapping[str, jax.Array]
"""What a method reports of its own beside the loss, by name; empty for most."""

AuxLoss: TypeAlias = Callable[[Params, Any, Key], jax.Array]
"""``(params, x, key) -> scalar``: an auxiliary loss, differentiated in ``params``.

With ``has_aux=True`` in the factory of its adapter it returns ``(scalar, {name: array})``.
"""

Predictor: TypeAlias = Callable[[Params, Any, Key], tuple[Any, "Info"]]
"""``(params, x, key) -> (output, Info)``: every way to predict has this one signature."""


class StatefulLoss(NamedTuple):
    """A loss with a memory: a feature queue, a moving average, a teacher, a sample bank.

    Attributes:
      init: ``init(params) -> memory``, any pytree of arrays.
      value: ``value(params, memory, x, key) -> (scalar, memory)``; only ``params`` is
        differentiated.
      after: ``after(adapted_params, memory) -> memory``, called once the update is made.
    """

    init: Callable[[Params], PyTree]
    value: Callable[[Params, PyTree, Any, Key], tuple[jax.Array, PyTree]]
    after: Callable[[Params, PyTree], PyTree]


class Selection(NamedTuple):
    """Which parameters adapt.

    Attributes:
      split: ``split(params) -> (fast, frozen)``: two trees shaped like ``params`` in which
        the other's leaves are ``None`` holes.
      merge: ``merge(fast, frozen) -> params``, the inverse of ``split``.
    """

    split: Callable[[Params], tuple[PyTree, PyTree]]
    merge: Callable[[PyTree, PyTree], Params]


class AdapterState(NamedTuple):
    """All that the next inner step needs; never a frozen leaf.

    Attributes:
      fast: the private copy of the selected parameters, ``None`` elsewhere.
      opt_state: the optimizer's state over ``fast``.
      memory: a :class:`StatefulLoss`'s memory, ``()`` for a plain loss.
      count: int32 scalar, the number of updates made.
    """

    fast: PyTree
    opt_state: PyTree
    memory: PyTree
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, on purpose


class StepInfo(NamedTuple):
    """What a person needs of one inner step.

    Attributes:
      loss: float32 scalar, the loss before the update (penalties included).
      grad_norm: float32 scalar, the global norm of its gradient.
      finite: bool scalar, whether loss, gradient **and updated parameters** (and optimizer
        state and memory, where they were before) are finite.
      aux: what the loss reports of its own, by name; empty unless the adapter was built with
        ``has_aux=True``.
    """

    loss: jax.Array
    grad_norm: jax.Array
    finite: jax.Array
    aux: Aux = {}  # noqa: RUF012 (an empty tree, never written to)


class Adapter(NamedTuple):
    """One way to adapt.

    Attributes:
      init: ``init(params) -> state``.
      step: ``step(params, state, x, key) -> (state, StepInfo)``, **one** inner step;
        ``params`` are the pristine ones.
      merge: ``merge(params, state) -> adapted params``. A teacher is served by replacing it:
        ``adapter._replace(merge=...)``.
    """

    init: Callable[[Params], PyTree]
    step: Callable[[Params, PyTree, Any, Key], tuple[PyTree, StepInfo]]
    merge: Callable[[Params, PyTree], Params]


class Info(NamedTuple):
    """What every predictor returns beside its output.

    Attributes:
      loss: float32 ``[S]``, the loss before each of the S inner steps; S is 0 where nothing
        is differentiated.
      grad_norm: float32 ``[S]``.
      ok: bool scalar; False when a step was not finite and its effect was discarded.
      updated: bool scalar; whether the prediction's state differs from the one it started
        from (False for a filtered instance, a zero-step and a failed one).
      aux: what the method reports of its own, by name, arrays with a leading axis S; empty for
        most.
    """

    loss: jax.Array
    grad_norm: jax.Array
    ok: jax.Array
    updated: jax.Array
    aux: Aux = {}  # noqa: RUF012 (an empty tree, never written to)


class StreamInfo(NamedTuple):
    """:class:`Info` of one step of a stream, and whether the reset fired after it."""

    loss: jax.Array
    grad_norm: jax.Array
    ok: jax.Array
    updated: jax.Array
    reset: jax.Array
    aux: Aux = {}  # noqa: RUF012 (an empty tree, never written to)


class Stream(NamedTuple):
    """A predictor that carries state from one instance to the next, ready for ``lax.scan``.

    Attributes:
      init: ``init(params) -> carry``.
      step: ``step(params, carry, x, key) -> (carry, (output, StreamInfo))``.
    """

    init: Callable[[Params], PyTree]
    step: Callable[[Params, PyTree, Any, Key], tuple[PyTree, tuple[Any, StreamInfo]]]


class Reset(NamedTuple):
    """When a stream returns to the pristine state; runs inside the traced code.

    Attributes:
      init: ``init() -> carry``.
      apply: ``apply(carry, state, pristine_state, output, info, key)
        -> (carry, state, fired)`` with ``fired`` a bool scalar.
    """

    init: Callable[[], PyTree]
    apply: Callable[..., tuple[PyTree, PyTree, jax.Array]]


class FromSource(NamedTuple):
    """A method that measures the source data before it sees a test instance.

    Attributes:
      measure: ``measure(params, x[N, ...]) -> statistics``: means over the N source instances, or
        rows of a bank; see :func:`ttt_jax.source_statistics`.
      reduce: ``"mean"`` or ``"concatenate"``: how the statistics of several batches are joined.
      build: ``build(statistics) -> Predictor | Stream``.
    """

    measure: Callable[[Params, Any], PyTree]
    reduce: str
    build: Callable[[PyTree], "Predictor | Stream"]
