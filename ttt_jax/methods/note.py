"""NOTE: entropy of a memory that is balanced by predicted class, for correlated streams."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ttt_jax import _arguments, _checks, _varying, resets, select
from ttt_jax.adapters import gradient_adapter
from ttt_jax.base import Key, Params, PyTree, Reset, Selection, StatefulLoss, Stream
from ttt_jax.methods._batches import Serve, batch_size, prediction, with_batch_axis
from ttt_jax.methods._memory import (
    STATISTICS,
    all_finite,
    empty_slots,
    follow,
    repeated,
    with_statistics,
)
from ttt_jax.online import online


class Reservoir(NamedTuple):
    """M remembered instances, ``label`` -1 in an empty slot, and how many of each class came."""

    x: PyTree
    label: jax.Array
    arrivals: jax.Array


class Memory(NamedTuple):
    """What the stream remembers beside the weights."""

    reservoir: Reservoir
    statistics: PyTree
    seen: jax.Array


@_arguments.checked()
def note(
    classify: Callable[[Params, Any], jax.Array],
    classify_statistics: Callable[[Params, Any], tuple[jax.Array, PyTree]],
    *,
    like: PyTree,
    num_classes: int,
    capacity: int = 64,
    update_every: int = 64,
    momentum: float | jax.Array = 0.01,
    optimizer: optax.GradientTransformation = optax.adam(1e-4),
    select: Selection = select.norm_affine(),
    reset: Reset = resets.never(),
    predict: str = "before",
    batch: bool = True,
    serve: Serve | None = None,
) -> Stream:
    """A stream that learns from a class-balanced sample of what it has seen (NOTE).

    Every instance is offered to a memory of ``capacity`` under the class predicted for it. In a
    full memory it takes the slot of a random member of the largest classes; if its own class is
    one of them, that of a random member of its class, with probability (members of the class) /
    (instances of the class so far). Every ``update_every`` instances: a step on the mean entropy
    of the memory, and ``statistics <- (1 - momentum) old + momentum of the memory``. Each instance
    is predicted by itself, with instance-aware normalization
    (:class:`~ttt_jax.models.InstanceAware`).

    **Published:** the defaults, a source trained with instance-aware normalization of width 4.
    Correlated CIFAR-10-C, ResNet-18: source 42.3 % error, Tent 76.4 %, NOTE 21.1 %; shuffled 20.1 %
    (README of TaesikGong/NOTE).

    **Fails** with a source that was not trained with that normalization, which then sees other
    activations; and where wrong predictions balance the memory by wrong classes.

    **Cost** of an instance: one forward pass, and one for the prediction; every ``update_every``
    instances a forward and backward pass over the memory.

    Args:
      classify: model function ``(params, inputs[N, ...]) -> logits[N, C]`` with running statistics:
        ``models.from_linen(net, norm=models.InstanceAware())``.
      classify_statistics: ``(params, inputs[N, ...]) -> (logits, statistics)``, normalized with
        the statistics of the batch and returning them in the layout of ``select.statistics()``:
        ``models.linen_statistics(net, outputs=True, norm=models.InstanceAware())``.
      like: one instance, or its shapes (``jax.ShapeDtypeStruct``).
      num_classes: C.
      capacity: members of the memory, static.
      update_every: instances between updates, static; batches should divide it.
      momentum: weight of new statistics. May be traced.
      optimizer: an optax transformation.
      select: the parameters that adapt.
      reset: when all of it is pristine again, see :mod:`ttt_jax.resets`.
      predict: ``"before"`` or ``"after"`` the update.
      batch: whether the instance is a batch ``[N, ...]``; with False, one instance.
      serve: ``(params, x) -> output``, which predicts with the adapted parameters and statistics;
        ``None`` for ``classify``.

    Returns:
      A :class:`~ttt_jax.Stream`; ``info.updated`` is True where the memory changed, and the loss
      is 0 where no update was due.

    Raises:
      ValueError: ``num_classes`` < 2, ``capacity`` or ``update_every`` < 1, an unknown
        ``predict``; when called: ``params`` without ``batch_stats``.

    References:
      Gong et al., `NOTE <https://arxiv.org/abs/2208.05117>`_, 2022, Algorithm 1; constants from the
      authors' code, github.com/TaesikGong/NOTE. Against it: the entropy is summed over classes
      (there averaged, which Adam hardly sees), running variances follow flax's and divide by n,
      a memory that is not full is repeated in turn, and an update that falls inside a batch is
      made after it.
    """
    _checks.check_count("methods.note: num_classes", num_classes, 2)
    _checks.check_count("methods.note: capacity", capacity)
    _checks.check_count("methods.note: update_every", update_every)
    _checks.check_share("methods.note: momentum", momentum)

    def init(params: Params) -> Memory:
        label, arrivals = jnp.full(capacity, -1), jnp.zeros(num_classes, jnp.int32)
        reservoir = Reservoir(empty_slots(like, capacity), label, arrivals)
        return Memory(reservoir, STATISTICS.split(params)[0], jnp.zeros((), jnp.int32))

    def remember(params: Params, memory: Memory, inputs: Any, key: Key) -> Reservoir:
        label = classify(with_statistics(params, memory.statistics), inputs).argmax(axis=-1)

        def offer(reservoir: Reservoir, newcomer: Any) -> tuple[Reservoir, None]:
            return _offered(reservoir, *newcomer), None

        keys = jax.random.split(key, batch_size(inputs))
        reservoir, _ = _varying.scan(offer, memory.reservoir, (inputs, label, keys))
        return reservoir

    def value(params: Params, memory: Memory, x: Any, key: Key) -> tuple[jax.Array, Memory]:
        inputs = with_batch_axis(x, batch)
        reservoir = remember(params, memory, inputs, key)
        seen = memory.seen + batch_size(inputs)

        def update() -> tuple[jax.Array, PyTree]:
            index, first = repeated(reservoir.label >= 0)
            members = jax.tree.map(lambda leaf: leaf[index], reservoir.x)
            student = with_statistics(params, memory.statistics)
            logits, new = classify_statistics(student, members)
            log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
            entropy = -(jnp.exp(log_p) * log_p).sum(axis=-1)
            loss = (first * entropy).sum() / jnp.maximum(first.sum(), 1)
            return loss, follow(memory.statistics, jax.lax.stop_gradient(new), momentum)

        due = seen // update_every > memory.seen // update_every
        idle = _varying.along((jnp.zeros((), jnp.float32), memory.statistics), inputs)
        loss, statistics = jax.lax.cond(due, update, lambda: idle)
        # An instance that is not finite may be turned away; it must be seen all the same.
        return jnp.where(all_finite(x), loss, jnp.nan), Memory(reservoir, statistics, seen)

    def after(adapted: Params, memory: Memory) -> Memory:
        return memory

    adapter = gradient_adapter(StatefulLoss(init, value, after), optimizer, select=select)

    def merge(params: Params, state: PyTree) -> Params:
        return with_statistics(adapter.merge(params, state), state.memory.statistics)

    return online(
        adapter._replace(merge=merge),
        prediction(classify, serve, batch),
        reset=reset,
        predict=predict,
    )


def _offered(reservoir: Reservoir, x: Any, label: jax.Array, key: Key) -> Reservoir:
    """The reservoir after one newcomer, by prediction-balanced sampling."""
    choose, accept = jax.random.split(key)
    used, classes = reservoir.label >= 0, jnp.arange(len(reservoir.arrivals))
    arrivals = reservoir.arrivals.at[label].add(1)
    sizes = (reservoir.label[:, None] == classes[None]).sum(axis=0)
    largest = sizes == sizes.max()
    # All of the largest classes have one size: a random class of them and a random member of it.
    rivals = jnp.where(largest[label], reservoir.label == label, largest[reservoir.label])
    chance = jnp.where(largest[label], sizes[label] / arrivals[label], 1.0)
    draws = jax.random.uniform(choose, rivals.shape, jnp.float32)
    slot = jnp.where(used.all(), jnp.argmax(jnp.where(rivals, draws, -1.0)), jnp.argmin(used))
    taken = ~used.all() | (jax.random.uniform(accept, dtype=jnp.float32) <= chance)

    def put(leaf: jax.Array, new: jax.Array) -> jax.Array:
        return leaf.at[slot].set(jnp.where(taken, new, leaf[slot]))

    return Reservoir(jax.tree.map(put, reservoir.x, x), put(reservoir.label, label), arrivals)
