"""The promises of the library, measured in one program for each method and judged on the host.

A program is compiled for each method, and compiling is what the tests take their time for. So it
runs every variant of the instances through one mapped body, and all streams through another.
"""

import jax
import jax.numpy as jnp
import numpy as np

import ttt_jax as ttt
from tests.core.compiling import quickly
from tests.core.streaming import rows, scanned
from ttt_jax import audit

# Instance 1 is the spoiled one, and keeps its place where only its mates change.
SPOILED = 1


def measured(function, *args):
    """The results of one program, on the host: there nothing more is compiled to compare them."""
    return jax.device_get(quickly(function, *args))


def _spoil(xs):
    return xs.at[SPOILED].set(jnp.nan)


def _orders(count):
    same = np.arange(count)
    others = np.where(same == SPOILED, SPOILED, (same + 1 + (same == 0)) % count)
    return same, np.roll(same, 1), others


def _swapped(count):
    """Instance 1 first."""
    return np.array([1, 0, *range(2, count)])


def in_company(predict, params, xs, keys):
    """Results ``[4, N, ...]``, in chunks: as they are, rolled, among other mates, one spoiled."""
    variants = [(xs[order], keys[order]) for order in _orders(len(xs))] + [(_spoil(xs), keys)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *variants)
    parallel = ttt.batched(predict, chunk_size=(len(xs) + 1) // 2)
    return jax.lax.map(lambda variant: parallel(params, *variant), stacked)


def in_streams(stream_of, params, xs, keys):
    """Results ``[3, N, ...]`` of ``stream_of(period)``: forgetting at once; lasting, one spoiled.

    The third is the second with the spoiled instance first.
    """
    never, swapped = len(xs) + 1, _swapped(len(xs))
    spoiled = _spoil(xs)
    variants = ((1, xs, keys), (never, spoiled, keys), (never, spoiled[swapped], keys[swapped]))

    def run(variant):
        period, *pairs = variant
        _, results, _ = scanned(stream_of(period), params, *pairs)
        return results

    return jax.lax.map(run, jax.tree.map(lambda *leaves: jnp.stack(leaves), *variants))


def alone(predict, params, xs, keys):
    """The loop over single instances."""
    return jax.lax.map(lambda pair: predict(params, *pair), (xs, keys))


def equal(actual, expected):
    """Bitwise, as within one program."""
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def close(actual, expected, *, num_steps):
    """Up to rounding, relative to the scale of ``expected``; see :func:`ttt_jax.audit.tolerance`.

    What :func:`ttt_jax.audit.require_close` says, without compiling its parts.
    """
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(expected)]
    sizes = [
        np.abs(leaf[np.isfinite(leaf)]).max(initial=0) for leaf in leaves if leaf.dtype.kind == "f"
    ]
    size = max(sizes, default=0) or 1.0

    def compare(left, right):
        limit = size * audit.tolerance(num_steps) if np.asarray(right).dtype.kind == "f" else 0
        np.testing.assert_allclose(np.float32(left), np.float32(right), rtol=0, atol=limit)

    jax.tree.map(compare, actual, expected)


def require_company(results, *, num_steps):
    """Order and mates do not matter; a spoiled instance leaves the others bitwise alone.

    Returns:
      The results of the instances as they are, ``[N, ...]``.
    """
    base, rolled, among_others, spoiled = (rows(results, i) for i in range(4))
    count = len(base[1].ok)
    _, order, _ = _orders(count)
    close(rows(rolled, np.argsort(order)), base, num_steps=num_steps)
    equal(rows(among_others, SPOILED), rows(base, SPOILED))
    clean = np.delete(np.arange(count), SPOILED)
    equal(rows(spoiled, clean), rows(base, clean))
    info = rows(spoiled[1], SPOILED)
    if info.loss.size:
        # A filter may have skipped it, which is ok and updates nothing.
        assert not (info.ok and (info.updated or not np.isfinite(info.loss).all()))
    return base


def require_streams(results, episodes, *, num_steps):
    """A stream that forgets at once is its episodes; a spoiled instance leaves no trace.

    Args:
      results: of :func:`in_streams`.
      episodes: ``(output, info)`` of the same instances.
      num_steps: updates up to a result.
    """
    outputs, infos = rows(results, 0)
    forgetful = infos.loss, infos.grad_norm, infos.ok, infos.updated, infos.aux
    close((outputs, forgetful), (episodes[0], tuple(episodes[1])), num_steps=num_steps)
    assert infos.updated.any()
    count = len(infos.ok)
    clean = np.delete(np.arange(count), SPOILED)
    late, early = rows(results, 1), rows(results, 2)
    equal(rows(rows(early, _swapped(count)), clean), rows(late, clean))


def moved(served, source):
    """The collections of ``served`` with a leaf that is not that of ``source``."""
    return {
        name
        for name, tree in served.items()
        if any(
            (np.asarray(new) != np.asarray(old)).any()
            for new, old in zip(jax.tree.leaves(tree), jax.tree.leaves(source[name]), strict=True)
        )
    }
