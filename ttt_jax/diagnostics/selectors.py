"""Choosing a learning rate and a number of steps: without labels, and (as an oracle) with them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _checks
from ttt_jax.diagnostics import _inputs, monitors

Criterion = Callable[[jax.Array], jax.Array]


class Choice(NamedTuple):
    """A learning rate and a number of steps, chosen without labels; scalars.

    Attributes:
      rate_index: int32, the place of the learning rate in ``learning_rates``.
      num_steps: int32, 0 meaning the pristine model.
      score: float32, the criterion's value there; -inf if nothing was admissible.
      admissible: bool, whether any entry met the criterion's condition. If not, the choice is
        the pristine model.
    """

    rate_index: jax.Array
    num_steps: jax.Array
    score: jax.Array
    admissible: jax.Array


class OracleChoice(NamedTuple):
    """The best entry by labels: a bound on what a choice could reach, not a result.

    Attributes:
      oracle_rate_index: int32 scalar, the place of the learning rate.
      oracle_num_steps: int32 scalar.
      oracle_accuracy: float32 scalar, the accuracy of that entry **on the data that chose it**.
    """

    oracle_rate_index: jax.Array
    oracle_num_steps: jax.Array
    oracle_accuracy: jax.Array


def _checked(name: str, outputs: Any) -> jax.Array:
    outputs = jnp.asarray(outputs)
    if outputs.ndim != 4 or 0 in outputs.shape:
        raise ValueError(
            f"{name} needs logits [L, S + 1, N, C] of a step_size_map; got shape {outputs.shape}. "
            "Map over instances with batched, then jnp.moveaxis(outputs, 0, 2)."
        )
    return outputs.astype(jnp.float32)


def _best(scores: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Place and value of the highest of ``scores[L, S + 1]``; ties go to the fewest steps."""
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores.astype(jnp.float32)).T
    place = jnp.argmax(scores.reshape(-1)).astype(jnp.int32)
    rates = scores.shape[1]
    return place % rates, place // rates, scores.reshape(-1)[place]


def _usable(outputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Instances ``[1, 1, N]`` with a pristine prediction, and entries that predict all of those."""
    there = ~jnp.isnan(outputs).any(axis=-1)
    pristine = there[:1, :1]
    return pristine, (there | ~pristine).all(axis=-1)


@_arguments.checked(floor=None)
def lowest_entropy(*, floor: Any) -> Criterion:
    """Criterion: the lowest mean entropy among entries that still use enough classes.

    Entropy alone would choose a collapsed entry, which predicts one class with certainty.

    Args:
      floor: the least :func:`effective_classes` of an admissible entry, for instance 0.9 of the
        pristine predictions'. May be traced.

    Returns:
      ``outputs[L, S + 1, N, C] -> scores[L, S + 1]``: minus the mean entropy in nats, -inf where
      the floor is not reached.
    """
    _checks.check_number("floor", floor, 0.0)

    def score(outputs: jax.Array) -> jax.Array:
        instances, whole = _usable(outputs)
        p = jax.nn.softmax(outputs, axis=-1)
        entropy = jax.scipy.special.entr(p).sum(axis=-1).mean(axis=-1, where=instances)
        enough = whole & (monitors.effective_classes(outputs) >= floor)
        return jnp.where(enough, -entropy, -jnp.inf)

    return score


@_arguments.checked(threshold=None)
def largest_change(*, threshold: Any) -> Criterion:
    """Criterion: the largest change of the probabilities that keeps the predicted classes.

    The change is the mean total variation distance to the pristine prediction (entry 0 of the
    steps). The pristine model itself is always admissible.

    Args:
      threshold: the least :func:`agreement` with the pristine classes, in [0, 1]. May be traced.

    Returns:
      ``outputs[L, S + 1, N, C] -> scores[L, S + 1]``: the distance in [0, 1], -inf where the
      agreement is below the threshold.
    """
    _checks.check_share("threshold", threshold)

    def score(outputs: jax.Array) -> jax.Array:
        instances, whole = _usable(outputs)
        same = _inputs.hits(outputs, _inputs.classes(outputs[0, 0]))
        kept = same.mean(axis=-1, where=instances, dtype=jnp.float32)
        p = jax.nn.softmax(outputs, axis=-1)
        change = 0.5 * jnp.abs(p - p[:1, :1]).sum(axis=-1).mean(axis=-1, where=instances)
        return jnp.where(whole & (kept >= threshold), change, -jnp.inf)

    return score


@_arguments.checked(outputs=_arguments.array())
def select_label_free(outputs: Any, *, criterion: Criterion) -> Choice:
    """Chooses a learning rate and a number of steps from predictions alone.

    Ties go to the fewest steps, then to the first learning rate, so that an adapter that changes
    nothing gives the pristine model. Run on a test batch the choice is transductive: it has seen
    its inputs, and a report should say so. An instance whose steps were not finite counts with
    its pristine prediction (see :func:`~ttt_jax.episodic`); leave out learning rates at which
    ``info.ok`` fails often. The criteria of this module leave out instances whose pristine
    prediction is nan, and entries that make a nan of another instance's.

    Args:
      outputs: logits ``[L, S + 1, N, C]``, from :func:`step_size_map` over N instances.
      criterion: ``outputs -> scores[L, S + 1]``, the higher the better, -inf or nan for an entry
        that must not be chosen: :func:`lowest_entropy`, :func:`largest_change` or your own.

    Returns:
      A :class:`Choice`.

    Raises:
      ValueError: outputs of another rank or empty, or scores that are not ``[L, S + 1]``.

    Examples:
      >>> import jax.numpy as jnp
      >>> two = jnp.array([[1.0, -1.0], [-1.0, 1.0]])  # N = 2 instances of different classes
      >>> outputs = jnp.stack([0 * two, two, 2 * two])[None]  # every step is more certain
      >>> print(select_label_free(outputs, criterion=lowest_entropy(floor=1.8)).num_steps)
      2
    """
    outputs = _checked("select_label_free", outputs)
    scores = jnp.asarray(criterion(outputs))
    if scores.shape != outputs.shape[:2]:
        raise ValueError(
            f"criterion must return one score per entry, shape {outputs.shape[:2]}; got "
            f"{scores.shape}."
        )
    rate_index, num_steps, score = _best(scores)
    return Choice(rate_index, num_steps, score, admissible=score > -jnp.inf)


@_arguments.checked(outputs=_arguments.array(), labels=_arguments.array())
def oracle_select(outputs: Any, labels: Any) -> OracleChoice:
    """The most accurate entry **by labels**: an oracle, never a deployable choice.

    On a labelled validation split it is ordinary tuning; on the data that is reported it is an
    upper bound that belongs into a column of its own.

    Args:
      outputs: logits ``[L, S + 1, N, C]``, from :func:`step_size_map` over N instances.
      labels: integers ``[N]``.

    Returns:
      An :class:`OracleChoice`; ties go to the fewest steps, then to the first learning rate.

    Raises:
      ValueError: outputs of another rank or empty, or labels that are not integers ``[N]``.
    """
    outputs = _checked("oracle_select", outputs)
    labels = _inputs.as_labels("oracle_select", labels, *outputs.shape[2:])
    accuracy = _inputs.hits(outputs, labels).mean(axis=-1, dtype=jnp.float32)
    return OracleChoice(*_best(accuracy))
