"""RoTTA: a teacher, robust statistics, and a balanced memory of recent, confident instances."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ttt_jax import _arguments, _checks, _varying, resets, select
from ttt_jax.adapters import gradient_adapter
from ttt_jax.base import Key, Params, PyTree, Reset, Selection, StatefulLoss, Stream
from ttt_jax.methods._batches import (
    Serve,
    batch_size,
    one_view_each,
    prediction,
    with_batch_axis,
)
from ttt_jax.methods._memory import (
    STATISTICS,
    all_finite,
    empty_slots,
    follow,
    repeated,
    with_statistics,
)
from ttt_jax.online import online


class Bank(NamedTuple):
    """M remembered instances; ``age`` counts instances since, ``label`` is -1 in an empty slot."""

    x: PyTree
    label: jax.Array
    entropy: jax.Array
    age: jax.Array


class Memory(NamedTuple):
    """What the stream remembers beside the student's weights."""

    bank: Bank
    teacher: PyTree
    teacher_statistics: PyTree
    student_statistics: PyTree
    seen: jax.Array
    due: jax.Array


@_arguments.checked()
def rotta(
    classify: Callable[[Params, Any], jax.Array],
    classify_statistics: Callable[[Params, Any], tuple[jax.Array, PyTree]],
    *,
    augment: Callable[[Any, Key], Any],
    like: PyTree,
    num_classes: int,
    capacity: int = 64,
    update_every: int = 64,
    momentum: float | jax.Array = 0.05,
    decay: float | jax.Array = 0.999,
    timeliness: float | jax.Array = 1.0,
    uncertainty: float | jax.Array = 1.0,
    optimizer: optax.GradientTransformation = optax.adam(1e-3),
    select: Selection = select.norm_affine(),
    reset: Reset = resets.never(),
    predict: str = "before",
    batch: bool = True,
    serve: Serve | None = None,
) -> Stream:
    """A stream that learns from a balanced memory of what it has seen (RoTTA).

    Every instance joins the memory of M = ``capacity`` under the class that the teacher gives it.
    A class has room for ``M / C``; beyond it, or in a full memory, the member of its own class
    (of the largest classes) with the largest score ``timeliness / (1 + exp(-age / M)) +
    uncertainty * H / ln C`` goes, if the newcomer's is lower. Every ``update_every`` instances the
    student takes a step on ``mean_i w_i CE(teacher(x_i), student(view of x_i))`` over the memory,
    ``w = 1 / (1 + exp(age / M))``; both update their statistics, ``(1 - momentum) old + momentum
    batch``, and the teacher is ``decay * teacher + (1 - decay) * student``. The teacher predicts.

    **Published:** batches of 64, the defaults, strong views (color jitter, affine, blur, flip,
    noise). Streams with correlated classes; continual CIFAR-10-C, WRN-28-10: source 43.5 % error,
    RoTTA 19.3 % (benchmark of mariodoebler/test-time-adaptation).

    **Fails** by being slow: one small step in 64 images, a teacher of 0.999. It does little on
    short streams, and 33.7 % error on correlated CIFAR-10-C with ResNet-26 and GroupNorm, whose
    source has 32.7 % (same benchmark).

    **Cost** of an instance: one forward pass, and one for the prediction; every ``update_every``
    instances a forward pass of the teacher and a forward and backward pass of the student over M.

    Args:
      classify: model function ``(params, inputs[N, ...]) -> logits[N, C]`` that serves the
        running statistics (``models.from_linen(net)``).
      classify_statistics: ``(params, inputs[N, ...]) -> (logits, statistics)``, the statistics of
        the batch in the layout of ``select.statistics()``, the logits normalized by their blend
        with the running ones: ``models.linen_statistics(net, outputs=True, norm=19 * 64)`` for
        ``momentum`` 0.05 and 64 instances.
      augment: ``augment(x, key) -> x``, one strong random view of one instance.
      like: one instance, or its shapes (``jax.ShapeDtypeStruct``).
      num_classes: C.
      capacity: M, static.
      update_every: instances between updates, static; batches should divide it.
      momentum: weight of new statistics. May be traced.
      decay: weight of the old teacher. May be traced.
      timeliness: weight of age in the score. May be traced.
      uncertainty: weight of entropy in the score. May be traced.
      optimizer: an optax transformation.
      select: the parameters that adapt.
      reset: when all of it is pristine again, see :mod:`ttt_jax.resets`.
      predict: ``"before"`` or ``"after"`` the update.
      batch: whether the instance is a batch ``[N, ...]``; with False, one instance.
      serve: ``(params, x) -> output``, which predicts with the teacher's parameters and
        statistics; ``None`` for ``classify``.

    Returns:
      A :class:`~ttt_jax.Stream`; ``info.updated`` is True where the memory changed, and the loss
      is 0 where no update was due.

    Raises:
      ValueError: ``num_classes`` < 2, ``capacity`` or ``update_every`` < 1, an unknown
        ``predict``; when called: ``params`` without ``batch_stats``.

    References:
      Yuan et al., `RoTTA <https://arxiv.org/abs/2303.13899>`_, 2023, Eqs. 1-9; constants from the
      authors' code, github.com/BIT-DA/RoTTA. Against it: while the memory is not full, its members
      are repeated in turn to M, so that shapes are static (repeats count in the statistics, not
      in the loss); an update that falls inside a batch is made after it; each member has a view
      of its own.
    """
    _checks.check_count("methods.rotta: num_classes", num_classes, 2)
    _checks.check_count("methods.rotta: capacity", capacity)
    _checks.check_count("methods.rotta: update_every", update_every)
    _checks.check_share("methods.rotta: momentum", momentum)
    _checks.check_share("methods.rotta: decay", decay)
    _checks.check_number("methods.rotta: timeliness", timeliness, 0.0)
    _checks.check_number("methods.rotta: uncertainty", uncertainty, 0.0)

    def score(age: jax.Array, entropy: jax.Array) -> jax.Array:
        relative = entropy / jnp.log(float(num_classes))
        return timeliness * jax.nn.sigmoid(age / capacity) + uncertainty * relative

    def teacher_of(params: Params, memory: Memory) -> Params:
        teacher = select.merge(memory.teacher, select.split(params)[1])
        return with_statistics(teacher, memory.teacher_statistics)

    def init(params: Params) -> Memory:
        statistics = STATISTICS.split(params)[0]
        slots = jnp.zeros(capacity, jnp.float32)
        bank = Bank(empty_slots(like, capacity), jnp.full(capacity, -1, jnp.int32), slots, slots)
        none = jnp.zeros((), jnp.int32)
        fast = select.split(params)[0]
        return Memory(bank, fast, statistics, statistics, none, jnp.zeros((), bool))

    def remember(params: Params, memory: Memory, inputs: Any) -> Memory:
        logits = classify(teacher_of(params, memory), inputs).astype(jnp.float32)
        p = jax.nn.softmax(logits, axis=-1)
        label = logits.argmax(axis=-1).astype(jnp.int32)
        newcomers = (inputs, label, -(p * jnp.log(p + 1e-6)).sum(axis=-1))

        def join(bank: Bank, newcomer: Any) -> tuple[Bank, None]:
            x, label, entropy = newcomer
            return _joined(bank, x, label, entropy, score, capacity / num_classes), None

        bank, _ = _varying.scan(join, memory.bank, jax.lax.stop_gradient(newcomers))
        seen = memory.seen + batch_size(inputs)
        due = seen // update_every > memory.seen // update_every
        return memory._replace(bank=bank, seen=seen, due=due)

    def learn(params: Params, memory: Memory, key: Key) -> tuple[jax.Array, PyTree, PyTree]:
        index, counts = repeated(memory.bank.label >= 0)
        x = jax.tree.map(lambda leaf: leaf[index], memory.bank.x)
        logits, of_teacher = classify_statistics(teacher_of(params, memory), x)
        target = jax.nn.softmax(jax.lax.stop_gradient(logits.astype(jnp.float32)), axis=-1)
        student = with_statistics(params, memory.student_statistics)
        logits, of_student = classify_statistics(student, one_view_each(augment, x, key))
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        weight = jax.nn.sigmoid(-memory.bank.age[index] / capacity) * counts
        loss = -(weight * (target * log_p).sum(axis=-1)).sum() / jnp.maximum(counts.sum(), 1)
        return loss, *jax.lax.stop_gradient((of_teacher, of_student))

    def value(params: Params, memory: Memory, x: Any, key: Key) -> tuple[jax.Array, Memory]:
        memory = remember(params, memory, with_batch_axis(x, batch))
        old = (memory.teacher_statistics, memory.student_statistics)

        def update() -> tuple[jax.Array, tuple[PyTree, ...]]:
            loss, *new = learn(params, memory, key)
            return loss, tuple(follow(a, b, momentum) for a, b in zip(old, new, strict=True))

        idle = _varying.along((jnp.zeros((), jnp.float32), old), x)
        loss, new = jax.lax.cond(memory.due, update, lambda: idle)
        # An instance that is not finite may find no room; it must be seen all the same.
        loss = jnp.where(all_finite(x), loss, jnp.nan)
        return loss, memory._replace(teacher_statistics=new[0], student_statistics=new[1])

    def after(adapted: Params, memory: Memory) -> Memory:
        share = jnp.where(memory.due, 1 - decay, 0.0)
        teacher = jax.tree.map(
            lambda old, new: (1 - share) * old + share * new,
            memory.teacher,
            select.split(adapted)[0],
        )
        return memory._replace(teacher=teacher)

    adapter = gradient_adapter(StatefulLoss(init, value, after), optimizer, select=select)
    return online(
        adapter._replace(merge=lambda params, state: teacher_of(params, state.memory)),
        prediction(classify, serve, batch),
        reset=reset,
        predict=predict,
    )


def _joined(
    bank: Bank,
    x: Any,
    label: jax.Array,
    entropy: jax.Array,
    score: Callable[[jax.Array, jax.Array], jax.Array],
    room: float,
) -> Bank:
    """The bank after one newcomer: in a free slot, in place of the worst, or left out."""
    used = bank.label >= 0
    same = bank.label == label
    # How many slots have the class of each slot.
    size = jnp.where(used, (bank.label[:, None] == bank.label[None]).sum(axis=1), 0)
    crowded = same.sum() >= math.ceil(room)
    rivals = jnp.where(crowded, same, used & (size == size.max()))
    scores = jnp.where(rivals, score(bank.age, bank.entropy), -jnp.inf)
    free = ~crowded & ~used.all()
    accepted = free | (scores.max() > score(jnp.zeros((), jnp.float32), entropy))
    slot = jnp.where(free, jnp.argmin(used), jnp.argmax(scores))

    def put(leaf: jax.Array, new: jax.Array) -> jax.Array:
        return leaf.at[slot].set(jnp.where(accepted, new, leaf[slot]))

    taken = Bank(
        jax.tree.map(put, bank.x, x),
        put(bank.label, label),
        put(bank.entropy, entropy),
        put(bank.age, jnp.zeros((), jnp.float32)),
    )
    return taken._replace(age=taken.age + (taken.label >= 0).astype(jnp.float32))
