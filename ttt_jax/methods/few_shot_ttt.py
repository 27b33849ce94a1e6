"""Test-time training on the demonstrations of a few-shot task, with a guard against harm."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ttt_jax import _arguments, _checks, _contract, _varying, inner, select
from ttt_jax.adapters import gradient_adapter
from ttt_jax.base import Adapter, Info, Key, Params, Predictor, PyTree, Selection, StepInfo
from ttt_jax.batching import unbatched
from ttt_jax.losses.packed import packed_sequences, sequence_sums
from ttt_jax.predictors import episodic

_LEAVES = ("label", "segment", "task", "example")


@_arguments.checked(rows=_arguments.count(), held_out=_arguments.count(0), every=_arguments.count())
def few_shot_ttt(
    answer: Callable[[Params, Any], Any],
    logits: Callable[[Params, Any], jax.Array],
    *,
    optimizer: optax.GradientTransformation = optax.adamw(1e-4, weight_decay=0.01),
    select: Selection = select.lora(),
    num_steps: int = 250,
    rows: int = 2,
    held_out: int = 0,
    every: int = 10,
    trace: bool = False,
) -> Predictor:
    """A predictor that learns a task from its demonstrations, then answers its queries.

    Loss of a step, over the outputs of demonstrations under drawn views, ``rows`` packed rows of
    them at a time, n[s] labels in sequence s (:func:`ttt_jax.losses.packed_sequences`)::

        sum_s n[s]**-0.5 nats[s] / sum_s n[s]**0.5

    Every task has a private copy of the selected parameters, from the pristine ones.

    **The guard**, with ``held_out=F``: each of the first F demonstrations is held out in turn, and
    a copy learns from the others. The mean nats per label of what is held out, after every
    ``every`` steps and before the first, choose the number of steps: the lowest wins, the source
    where no step helps. Then a copy learns from all demonstrations for so many steps. A task with
    one demonstration stays as it is. The guard is fair where the model never saw the task: a model
    that was trained on its demonstrations knows what is held out, and favors no step.

    **Published:** Llama 3, 8B, on ARC-AGI-1, every task a text with its demonstrations in context:
    rank 128, alpha 16, at most 250 items of leave-one-out tasks and views, batches of two, two
    epochs, AdamW at 5e-5 (the README) or 1e-4 (the code, and here), with warm-up and decay; 53.0 %
    of the public evaluation tasks, 6 times the fine-tuned model without it on 80 of them.

    **Fails** where a view changes the rule (a task about "up" under rotations needs a model that is
    told the view); on few demonstrations with many parameters, which are learned by heart: then
    more steps harm, as the guard sees. A copy learns only rules near those that the model has
    learned before. Report the model as it is, and ``num_steps`` against what is solved.

    **Cost** of a task: ``num_steps`` passes forward and backward over ``rows`` rows, and the
    answer; with the guard ``1 + held_out`` times the passes, and ``held_out * (1 + num_steps /
    every)`` times a forward pass over all rows. Under ``vmap`` a guarded copy that stops early
    saves nothing.

    Args:
      answer: model function ``(params, x[N, ...]) -> output[N, ...]`` of the answers.
      logits: model function ``(params, batch) -> logits[R, T, V]`` over packed rows.
      optimizer: an optax transformation; its state is the task's own.
      select: the parameters that adapt.
      num_steps: S, static; 0 is the source prediction.
      rows: of the task's R rows a step draws so many, by its key.
      held_out: F, static; 0 for no guard.
      every: divides ``num_steps`` where there is a guard.
      trace: whether the output has a leading axis ``[num_steps + 1]``, entry 0 the source's.

    Returns:
      A :class:`~ttt_jax.Predictor` over one task ``x``, a mapping with ``demonstrations``, what
      :func:`ttt_jax.views.grid_arrays.demonstrations` gives, and whatever ``answer`` reads. With a
      guard ``Info.aux`` has ``taken``, bool ``[S]``: the steps that were taken, and ``held_out``,
      ``[1 + S / every]``: nats per label of the demonstrations held out, before the first step and
      at every look.

    Raises:
      ValueError: counts out of range; when called: a task without such rows, or with fewer than
        ``rows`` of them.

    References:
      Akyürek et al., `The Surprising Effectiveness of Test-Time Training for Few-Shot Learning
      <https://arxiv.org/abs/2411.07279>`_, 2025, Section 3. Their code, ekinakyurek/marc on GitHub,
      trains one adapter after the other, each on a fixed list of texts in which the other
      demonstrations are context; here views are drawn, N tasks learn at once, and what is in the
      context is up to the model. The guard is not theirs.
    """
    given = optimizer, select, num_steps, rows, held_out, every, trace
    return _learning("few_shot_ttt", unbatched(answer), logits, *given)


@_arguments.checked(rows=_arguments.count(), held_out=_arguments.count(0), every=_arguments.count())
def few_shot_adapter(
    logits: Callable[[Params, Any], jax.Array],
    *,
    optimizer: optax.GradientTransformation = optax.adamw(1e-4, weight_decay=0.01),
    select: Selection = select.lora(),
    num_steps: int = 250,
    rows: int = 2,
    held_out: int = 0,
    every: int = 10,
) -> Predictor:
    """A predictor of what :func:`few_shot_ttt` learns of a task: the selected leaves of its copy.

    For tasks that are learned side by side and answered in other groups, or several times, by
    :func:`ttt_jax.adapted`.

    Args:
      logits: as for :func:`few_shot_ttt`.
      optimizer: an optax transformation; its state is the task's own.
      select: the parameters that adapt.
      num_steps: S, static.
      rows: of a step.
      held_out: F, static; 0 for no guard.
      every: divides ``num_steps`` where there is a guard.

    Returns:
      A :class:`~ttt_jax.Predictor` over ``x`` with ``demonstrations``, whose output is laid out as
      ``select.split(params)[0]``; the source's where a step was not finite.

    Raises:
      ValueError: as :func:`few_shot_ttt`.

    References:
      Akyürek et al., `The Surprising Effectiveness of Test-Time Training for Few-Shot Learning
      <https://arxiv.org/abs/2411.07279>`_, 2025, Section 3.
    """
    given = optimizer, select, num_steps, rows, held_out, every, False
    name = "few_shot_adapter"
    return _learning(name, lambda params, x: select.split(params)[0], logits, *given)


@_arguments.checked(rows=_arguments.count())
def few_shot_shared(
    answer: Callable[[Params, Any], Any],
    logits: Callable[[Params, Any], jax.Array],
    *,
    optimizer: optax.GradientTransformation = optax.adamw(1e-4, weight_decay=0.01),
    select: Selection = select.lora(),
    num_steps: int = 250,
    rows: int = 2,
    batch: bool = True,
) -> Predictor:
    """The control of :func:`few_shot_ttt`: one copy that all tasks of a batch share.

    It learns from ``N * rows`` rows in every step, ``rows`` of each of the N tasks, so that it sees
    what N private copies see, and moves once where each of them moves. What it gains is what the
    tasks have in common; tasks of one batch change each other's answers, which private copies
    never do.

    **Fails** as an answer to the question what a task's own copy is worth where batches are small:
    with one task it is that copy.

    Args:
      answer: model function ``(params, x[N, ...]) -> output[N, ...]`` of the answers.
      logits: model function ``(params, batch) -> logits[R, T, V]`` over packed rows.
      optimizer: an optax transformation.
      select: the parameters that adapt.
      num_steps: S, static; 0 is the source prediction.
      rows: of each task in a step.
      batch: that an instance is a batch of tasks; it must be.

    Returns:
      A :class:`~ttt_jax.Predictor` over a batch of tasks, a mapping with ``demonstrations``
      ``[N, R, ...]`` and whatever ``answer`` reads.

    Raises:
      ValueError: ``batch`` is False; otherwise as :func:`few_shot_ttt`.

    References:
      Akyürek et al., `The Surprising Effectiveness of Test-Time Training for Few-Shot Learning
      <https://arxiv.org/abs/2411.07279>`_, 2025, "Shared TTT" among the ablations.
    """
    if not batch:
        raise ValueError(
            "batch of methods.few_shot_shared must be True, as the tasks of a batch share a copy; "
            f"got {batch!r}: take methods.few_shot_ttt for a copy of each."
        )
    inner.check_num_steps(num_steps)
    name = "few_shot_shared"

    def predict(params: Params, x: Any, key: Key) -> tuple[Any, Info]:
        held = _rows_of(name, x, 0)
        count, each = jnp.shape(held["task"])[:2]
        if rows > each:
            raise ValueError(
                f"rows must be at most the {each} rows of a task's demonstrations; got {rows}."
            )
        # Row by row of all tasks in turn, as a step takes rows that are neighbors.
        mixed = {
            place: jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:])
            for place, leaf in held.items()
        }
        given = optimizer, select, num_steps, rows * count, 0, 1, False
        # What answers sees the tasks as they came.
        run = _learning(name, lambda adapted, _: answer(adapted, x), logits, *given)
        return run(params, {"demonstrations": mixed}, key)

    return predict


def _learning(
    name: str,
    apply: Callable[[Params, Any], Any],
    logits: Callable[[Params, Any], jax.Array],
    optimizer: optax.GradientTransformation,
    select: Selection,
    num_steps: int,
    rows: int,
    held_out: int,
    every: int,
    trace: bool,
) -> Predictor:
    """A predictor of ``apply`` at the parameters of a task's own copy."""
    inner.check_num_steps(num_steps)
    _contract.require_function("logits", logits, "(params, batch) -> logits[R, T, V]")
    if held_out and num_steps % every:
        raise ValueError(
            f"methods.{name} looks at what is held out after every {every} steps, so that "
            f"num_steps must be a multiple of it; got {num_steps}. Set every."
        )

    def scores(params: Params, batch: Any) -> jax.Array:
        made = logits(params, batch)
        if jnp.ndim(made) != 3:
            raise ValueError(
                f"logits of methods.{name} must return [R, T, V]; got shape {jnp.shape(made)}: "
                "pass the model function over packed rows, after that of the answers."
            )
        return made

    nats = packed_sequences(scores)

    def loss(params: Params, x: Any, key: Key) -> Any:
        held = x["demonstrations"]
        count = held["task"].shape[0]
        # Neighbors of each other: rows are alike, and a permutation takes long to compile.
        chosen = (jax.random.randint(key, (), 0, count) + jnp.arange(rows)) % count
        return nats(params, jax.tree.map(lambda leaf: leaf[chosen], held), key)

    adapter = gradient_adapter(loss, optimizer, select=select)
    plain = episodic(adapter, apply, num_steps=num_steps, trace=trace)
    limited = episodic(_limited(adapter), apply, num_steps=num_steps, trace=trace)

    def predict(params: Params, x: Any, key: Key) -> tuple[Any, Info]:
        x = {**x, "demonstrations": _rows_of(name, x, rows)}
        if not held_out or not num_steps:
            return plain(params, x, key)
        curves = jax.vmap(
            lambda example: _curve(adapter, scores, params, x, example, key, num_steps, every)
        )(jnp.arange(held_out))
        means = _means(*curves)
        stop = every * jnp.where(jnp.isfinite(means), means, jnp.inf).argmin()
        out, info = limited(params, {**x, "stop": stop}, key)
        return out, info._replace(aux={**info.aux, "held_out": means})

    return predict


def _rows_of(name: str, x: Any, rows: int) -> dict[str, jax.Array]:
    """The rows of a task, of which there must be so many."""
    held = x.get("demonstrations") if isinstance(x, Mapping) else None
    if not isinstance(held, Mapping) or not {*_LEAVES} <= {*held}:
        known = sorted(map(str, held if isinstance(held, Mapping) else x if x else ()))
        raise ValueError(
            f"methods.{name} needs a task x with 'demonstrations', a mapping of "
            f"{', '.join(_LEAVES)} and what the model reads; got {known}: pass what "
            "views.grid_arrays.demonstrations gives."
        )
    _checks.leading_size(f"demonstrations of methods.{name}", held)
    count = jnp.shape(held["task"])[0]
    if rows > count:
        raise ValueError(
            f"rows must be at most the {count} rows of the task's demonstrations; got {rows}."
        )
    return {name: jnp.asarray(leaf) for name, leaf in held.items()}


def _limited(adapter: Adapter) -> Adapter:
    """An adapter that makes ``x["stop"]`` updates and then stays where it is."""

    def step(params: Params, state: Any, x: Any, key: Key) -> tuple[PyTree, StepInfo]:
        moved, info = adapter.step(params, state, x, key)
        taken = state.count < x["stop"]
        kept = jax.tree.map(lambda new, old: jnp.where(taken, new, old), moved, state)
        # A step that is not taken can do no harm.
        return kept, info._replace(finite=info.finite | ~taken, aux={"taken": taken})

    return adapter._replace(step=step)


def _curve(
    adapter: Adapter,
    logits: Callable[[Params, Any], jax.Array],
    params: Params,
    x: Any,
    example: jax.Array,
    key: Key,
    num_steps: int,
    every: int,
) -> tuple[jax.Array, jax.Array]:
    """Nats ``[1 + S / every]`` of a demonstration held out, and its number of labels."""
    held = x["demonstrations"]
    slot = jnp.maximum(held["segment"], 0).astype(jnp.int32)
    own = jnp.take_along_axis(held["example"], slot, 1) == example
    rest = {**held, "label": jnp.where(own, -1, held["label"])}
    only = {**held, "label": jnp.where(own, held["label"], -1)}

    def look(state: PyTree) -> tuple[jax.Array, jax.Array]:
        sums = sequence_sums(logits(adapter.merge(params, state), only), only)
        return sums.nats.sum(), sums.labels.sum()

    def step(state: PyTree, place: jax.Array) -> tuple[PyTree, None]:
        task, key_of_step = {**x, "demonstrations": rest}, jax.random.fold_in(key, place)
        return adapter.step(params, state, task, key_of_step)[0], None

    def block(state: PyTree, places: jax.Array) -> tuple[PyTree, jax.Array]:
        state, _ = _varying.scan(step, state, places)
        return state, look(state)[0]

    # No step is peeled: two loops in each other would have four gradients to compile.
    start = adapter.init(params)
    first, labels = look(start)
    _, later = _varying.scan(block, start, jnp.arange(num_steps).reshape(-1, every))
    return jnp.concatenate([first[None], later]), labels


def _means(nats: jax.Array, labels: jax.Array) -> jax.Array:
    """Nats per label ``[1 + S / every]`` of demonstrations ``[F, 1 + S / every]``; 0 without."""
    return nats.sum(0) / jnp.maximum(labels.sum(), 1.0)
