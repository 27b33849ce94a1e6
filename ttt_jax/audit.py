"""Audits: the library's promises, as functions to run on your own loss, adapter or predictor.

``audit.check(predictor, params, xs, keys)`` raises :class:`AuditError` naming every broken
promise. The parts (:func:`differences`, :func:`adapter_differences`) are pure and traceable.

Within one program the promises are bitwise. Two programs of different shape round differently, and
:func:`tolerance` says by how much; every comparison of two programs takes its limit there.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax import (
    _arguments,
    _audit_task,
    _checks,
    _contract,
    _trees,
    batching,
    online as online_lib,
    predictors,
    resets,
    select as select_lib,
)
from ttt_jax._audit_corpus import apart
from ttt_jax._audit_rows import can_poison, instances, poisoned, rows, snapshot
from ttt_jax._audit_scores import score_before_update
from ttt_jax._findings import BITWISE, MEANING, AuditError, Finding, require
from ttt_jax.base import Adapter, Key, Params, Predictor, Selection

__all__ = [
    "adapter_differences",
    "apart",
    "check",
    "check_adapter",
    "check_task",
    "copied_frozen",
    "differences",
    "distance",
    "everything_but",
    "findings",
    "relative_distance",
    "require",
    "require_close",
    "scale",
    "score_before_update",
    "tolerance",
]

_ROUNDING = 1e-5


@_arguments.checked(num_steps=_arguments.count(0))
def tolerance(num_steps: int = 1) -> float:
    """The largest difference between two programs, relative to the scale of their results.

    Programs of different shape (parallel or one by one, chunks of another size, another number of
    devices or processes) add in another order. Every pass through the model rounds anew: the
    prediction is one, and each update before it another, which the next one starts from. The limit
    is 1e-5 for each of these ``1 + num_steps`` passes, in float32 and under
    ``jax.default_matmul_precision("highest")``.

    Args:
      num_steps: updates on the way to a result: the inner steps of an episode, or all steps of a
        stream up to that result.
    """
    return _ROUNDING * (1 + num_steps)


@_arguments.checked()
def scale(tree: Any) -> jax.Array:
    """The largest absolute value of all finite floating elements, 0 where there are none."""

    def largest(leaf: jax.Array) -> jax.Array:
        return jnp.where(jnp.isfinite(leaf), jnp.abs(leaf), 0).astype(jnp.float32).max(initial=0.0)

    leaves = map(jnp.asarray, jax.tree.leaves(tree))
    sizes = [largest(leaf) for leaf in leaves if _trees.is_floating(leaf)]
    return jnp.stack(sizes).max() if sizes else jnp.zeros(())


@_arguments.checked()
def relative_distance(a: Any, b: Any) -> jax.Array:
    """The largest absolute difference over all leaves by the scale of ``b``; see :func:`scale`.

    Where ``b`` has no scale (all zeros, or no floating leaf) it is the absolute difference.
    """
    size = scale(b)
    return distance(a, b) / jnp.where(size > 0, size, 1.0)


@_arguments.checked(num_steps=_arguments.count(0))
def require_close(actual: Any, expected: Any, *, num_steps: int = 1) -> None:
    """Checks that two programs gave the same, up to rounding.

    Args:
      actual: results of one program, a pytree.
      expected: results of the other, in the same structure.
      num_steps: updates on the way to the results; see :func:`tolerance`.

    Raises:
      AuditError: their difference, relative to the scale of ``expected``, is above the tolerance.
    """
    _checks.check_alike(("actual", "expected"), actual, expected)
    # On the host: they may come from two devices.
    gap = jax.jit(relative_distance)(*jax.device_get((actual, expected)))
    require([Finding("two programs give the same", float(gap), tolerance(num_steps))])


@_arguments.checked()
def distance(a: Any, b: Any) -> jax.Array:
    """Largest absolute difference over all leaves; equal non-finite values differ by 0."""

    def one(left: jax.Array, right: jax.Array) -> jax.Array:
        if jnp.issubdtype(left.dtype, jnp.floating):
            same = (left == right) | (jnp.isnan(left) & jnp.isnan(right))
            gap = jnp.where(same, 0.0, jnp.abs(left - right))
        else:
            gap = (left != right).astype(jnp.float32)
        return jnp.nan_to_num(gap.astype(jnp.float32), nan=jnp.inf).max(initial=0.0)

    _checks.check_alike(("a", "b"), a, b)
    gaps = jax.tree.leaves(jax.tree.map(lambda x, y: one(jnp.asarray(x), jnp.asarray(y)), a, b))
    return jnp.stack(gaps).max() if gaps else jnp.zeros(())


@_arguments.checked()
def differences(predictor: Predictor, params: Params, xs: Any, keys: Key) -> dict[str, jax.Array]:
    """How far a predictor is from the promises, as scalars; pure and traceable.

    Variants of the batch run through one mapped body, so that the program compiles two: a chunk
    of the batch (the last one padded) and a single instance.

    Args:
      predictor: any predictor.
      params: its parameters.
      xs: at least three instances on a leading axis; an odd number makes padding happen.
      keys: ``[N]`` typed keys.

    Returns:
      ``{name: largest difference}`` for loop, order, mates and, where ``xs`` has floating leaves,
      poison and poison_ok; those of loop and order are relative to the scale of the results.

    Raises:
      ValueError: fewer than three instances.
    """
    xs = instances(xs, keys)
    found, base = _variants(predictor, params, xs, keys)
    loop = jax.lax.map(lambda pair: predictor(params, *pair), (xs, keys))
    return {"loop": relative_distance(base, loop), **found}


def _variants(
    predictor: Predictor, params: Params, xs: Any, keys: Key
) -> tuple[dict[str, jax.Array], Any]:
    """Compares variants of the batch; also returns the results of the batch as it is."""
    count = keys.shape[0]
    if count < 3:
        raise ValueError(f"An audit needs at least 3 instances to mix, got {count}.")
    same = np.arange(count)
    rolled = np.roll(same, 1)
    # Instance 1 keeps its place; every mate is another instance.
    others = np.where(same == 1, 1, (same + 1 + (same == 0)) % count)
    variants = [rows((xs, keys), places) for places in (same, rolled, others)]
    if can_poison(xs):
        variants.append((poisoned(xs, 1), keys))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *variants)
    parallel = batching.batched(predictor, chunk_size=(count + 1) // 2)
    results = jax.lax.map(lambda variant: parallel(params, *variant), stacked)
    base = rows(results, 0)
    found = {
        "order": relative_distance(rows(rows(results, 1), np.argsort(rolled)), base),
        "mates": distance(rows(base, 1), rows(rows(results, 2), 1)),
    }
    if can_poison(xs):
        spoiled, clean = rows(results, 3), np.delete(same, 1)
        found["poison"] = distance(rows(base, clean), rows(spoiled, clean))
        info = spoiled[1]
        if info.loss.shape[-1]:
            # A filter may have skipped it, which is ok and updates nothing.
            fault = info.updated[1] | ~jnp.isfinite(info.loss[1]).all()
            found["poison_ok"] = (info.ok[1] & fault).astype(jnp.float32)
    return found, base


@_arguments.checked(num_steps=_arguments.count())
def adapter_differences(
    adapter: Adapter,
    apply: Callable[[Params, Any], Any],
    params: Params,
    xs: Any,
    keys: Key,
    *,
    num_steps: int = 2,
) -> dict[str, jax.Array]:
    """How far an adapter is from the promises of its predictors; pure and traceable.

    Compares the traced episodic predictor, in parallel chunks, with its own variants, with zero
    steps, and with a stream that resets after every instance (which is the loop).

    Args:
      adapter: any adapter.
      apply: one-instance function ``(params, x) -> output``.
      params: the pristine parameters.
      xs: at least three instances on a leading axis.
      keys: ``[N]`` typed keys.
      num_steps: inner steps, at least 1.

    Returns:
      ``{name: largest difference}``; those of order and every_1 are relative to the scale of the
      results.
    """
    xs = instances(xs, keys)
    traced = predictors.episodic(adapter, apply, num_steps=num_steps, trace=True)
    untouched = predictors.episodic(adapter, apply, num_steps=0)
    source = predictors.source(apply)
    zero, plain = jax.lax.map(
        lambda pair: (untouched(params, *pair), source(params, *pair)), (xs, keys)
    )
    spoilable = can_poison(xs)
    never = keys.shape[0] + 1

    def run(variant: Any) -> Any:
        period, pairs = variant
        stream = online_lib.online(adapter, apply, num_steps=num_steps, reset=resets.every(period))

        def step(carry: Any, pair: Any) -> Any:
            return stream.step(params, carry, *pair)

        return jax.lax.scan(step, stream.init(params), pairs)[1]

    variants = [(jnp.asarray(1), (xs, keys))]
    swapped = np.arange(keys.shape[0])
    swapped[:2] = 1, 0
    if spoilable:
        # Without resets: a spoiled instance that leaves no trace may as well come first.
        spoiled = (poisoned(xs, 1), keys)
        variants += [
            (jnp.asarray(never), spoiled),
            (jnp.asarray(never), rows(spoiled, swapped)),
        ]
    runs = jax.lax.map(run, jax.tree.map(lambda *leaves: jnp.stack(leaves), *variants))
    outputs, infos = rows(runs, 0)
    found, (path, episodes) = _variants(traced, params, xs, keys)
    found["every_1"] = relative_distance(
        (outputs, infos.loss, infos.ok),
        (rows(path, (slice(None), -1)), episodes.loss, episodes.ok),
    )
    found["updates"] = 1.0 - episodes.updated.any().astype(jnp.float32)
    found["zero_steps"] = distance(zero, plain)
    found["trace"] = distance(rows(path, (slice(None), 0)), plain[0])
    if spoilable:
        clean = np.delete(np.arange(keys.shape[0]), 1)
        found["stream_poison"] = distance(
            rows(rows(runs, 1), clean),
            rows(rows(rows(runs, 2), swapped), clean),
        )
    return found


@_arguments.checked(num_steps=_arguments.count(0))
def findings(values: dict[str, Any], *, num_steps: int = 1) -> list[Finding]:
    """Judges measured differences: bitwise where it is promised, :func:`tolerance` elsewhere."""
    strange = sorted(set(values) - set(MEANING))
    if strange:
        raise ValueError(f"values must be of checks ({', '.join(MEANING)}); got {strange[0]!r}.")
    return [
        Finding(MEANING[name], float(value), 0.0 if name in BITWISE else tolerance(num_steps))
        for name, value in values.items()
    ]


def _call_once(predictor: Predictor, params: Params, xs: Any, keys: Key) -> list[tuple[str, bytes]]:
    """The snapshot before one call outside of any trace, which has left everything as it was.

    ``jit`` hands copies of the containers to what it traces, so that only this call can see a
    model that writes into them.
    """
    xs = instances(xs, keys)
    before = snapshot(params)
    predictor(params, *rows((jax.tree.map(jnp.asarray, xs), keys), 0))
    changed = float(before != snapshot(params))
    require(findings({"pristine": changed}))
    return before


@_arguments.checked(num_steps=_arguments.count(0))
def check(
    predictor: Predictor, params: Params, xs: Any, keys: Key, *, num_steps: int = 1
) -> list[Finding]:
    """Checks that a predictor keeps the promises, on these instances.

    Args:
      predictor: any predictor, with your own loss, adapter or model inside.
      params: its parameters.
      xs: at least three instances on a leading axis.
      keys: ``[N]`` typed keys.
      num_steps: inner steps of the predictor, from which the allowed difference between programs
        of different shape follows; comparisons within one program are bitwise.

    Returns:
      The findings, all passed.

    Raises:
      AuditError: naming each promise that does not hold.
    """
    _contract.require_predictor("predictor", predictor)
    before = _call_once(predictor, params, xs, keys)
    with jax.default_matmul_precision("highest"):
        values = jax.jit(lambda p, x, k: differences(predictor, p, x, k))(params, xs, keys)
    return _judge(before, params, values, num_steps)


@_arguments.checked(num_steps=_arguments.count())
def check_adapter(
    adapter: Adapter,
    apply: Callable[[Params, Any], Any],
    params: Params,
    xs: Any,
    keys: Key,
    *,
    num_steps: int = 2,
) -> list[Finding]:
    """Checks an adapter in episodic and online use; see :func:`adapter_differences`.

    Raises:
      AuditError: naming each promise that does not hold.
    """
    before = _call_once(predictors.episodic(adapter, apply, num_steps=1), params, xs, keys)

    def measure(p: Params, x: Any, k: Key) -> dict[str, jax.Array]:
        return adapter_differences(adapter, apply, p, x, k, num_steps=num_steps)

    with jax.default_matmul_precision("highest"):
        values = jax.jit(measure)(params, xs, keys)
    return _judge(before, params, values, num_steps)


def _judge(
    before: list[tuple[str, bytes]], params: Params, values: Any, num_steps: int
) -> list[Finding]:
    changed = float(before != snapshot(params))
    found = findings({**values, "pristine": changed}, num_steps=num_steps)
    require(found)
    return found


@_arguments.checked()
def copied_frozen(
    predictor: Predictor, selection: Selection, params: Params, xs: Any, keys: Key
) -> list[str]:
    """Frozen matrices of which the compiled program holds one copy (or gradient) per instance.

    Compiles ``batched(predictor)`` and looks for arrays with the shape of a frozen leaf and the
    sample axis in any position. Vectors are left out, and the frozen matrices should have
    shapes that no activation has: choose an unusual number of instances.

    Returns:
      The paths of the copied leaves; empty when frozen parameters stay shared.
    """
    count = keys.shape[0]
    instances(xs, keys)
    _, frozen = selection.split(params)
    lowered = jax.jit(batching.batched(predictor)).lower(params, xs, keys)
    text = lowered.compile().as_text() or ""
    copied = []
    for path, leaf in _trees.named_leaves(frozen):
        if leaf is None or leaf.ndim < 2:
            continue
        shapes = {order for order in itertools.permutations((count, *leaf.shape))}
        if any("[" + ",".join(map(str, shape)) + "]" in text for shape in shapes):
            copied.append(path)
    return copied


@_arguments.checked()
def everything_but(selection: Selection) -> Selection:
    """The complement of a selection, for asking what stayed frozen."""
    return select_lib.exclude(select_lib.everything(), selection)


@_arguments.checked(task=_audit_task.RULE, seed=_arguments.count(0), max_batches=_arguments.count())
def check_task(task: Any, *, seed: int = 0, max_batches: int = 2) -> None:
    """Raises :class:`AuditError` naming every rule that a :class:`ttt_jax.task.Task` breaks.

    Checked on the first ``max_batches`` batches of each stream: see ``broken_rules``.
    """
    if broken := _audit_task.broken_rules(task, seed=seed, max_batches=max_batches):
        raise AuditError(f"{task.name} breaks {len(broken)} rules: " + " ".join(broken))
