"""The largest chunk that fits, against the compiler's own figures and programs made of numbers."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from tests.core.models import classify, make_images, make_params, turn
from ttt_jax import budget


class Program:
    """A compiled program that needs so many bytes; half of its results lie in its arguments."""

    def __init__(self, needs):
        self._needs = needs

    def memory_analysis(self):
        return types.SimpleNamespace(
            temp_size_in_bytes=self._needs - 30,
            argument_size_in_bytes=30,
            output_size_in_bytes=20,
            alias_size_in_bytes=20,
        )


def line(size):
    return 1000 + 100 * size


@pytest.mark.parametrize(
    ("needs", "limit", "most", "expected", "compiled"),
    [
        (line, 20_000, 500, 190, [4, 8, 190]),
        (line, 20_000, 50, 50, [4, 8, 50]),
        (line, 1_350, 500, 3, [4, 8, 3]),
        (line, 1_100, 500, 1, [4, 8, 1]),
        (line, 20_000, 1, 1, [1]),
        (line, 1_850, 8, 8, [4, 8]),
        # Memory that grows faster than a line: the first guess is too large.
        (lambda n: line(n) + (5000 if n > 16 else 0), 20_000, 500, 140, None),
        (lambda n: line(n) + n * n // 3, 20_000, 500, 130, None),
        # A line that begins flat: the guess is the most, which does not fit.
        (lambda n: 1000 + 100 * max(0, n - 9), 20_000, 500, 198, [4, 8, 500, 198]),
    ],
)
def test_largest_chunk(needs, limit, most, expected, compiled):
    seen = []

    def compile_for(size):
        seen.append(size)
        return Program(needs(size))

    chunk = budget.largest_chunk(compile_for, limit, most=most)
    assert chunk.bytes == needs(chunk.size) == budget.used(chunk.compiled) <= limit
    assert 0.9 * expected <= chunk.size <= expected
    assert len(seen) == len(set(seen))
    if compiled is not None:
        assert (seen, chunk.size) == (compiled, expected)


def test_errors_name_the_value_and_the_fix():
    needs = r"One instance needs 2\.00 GiB and the limit is 1\.00 GiB"
    with pytest.raises(ValueError, match=needs):
        budget.largest_chunk(lambda n: Program((1 + n) * 2**30), 2**30, most=9)
    with pytest.raises(ValueError, match="most must be an integer of at least 1, got 0"):
        budget.largest_chunk(lambda n: Program(n), 10, most=0)
    with pytest.raises(ValueError, match=r"two growing numbers of at least 1, got \(8, 8\)"):
        budget.largest_chunk(lambda n: Program(n), 10, most=9, sizes=(8, 8))
    silent = types.SimpleNamespace(memory_analysis=lambda: None)
    with pytest.raises(ValueError, match="does not say how much memory"):
        budget.used(silent)


def test_what_the_compiler_says_of_a_chunk():
    """The chunk chosen for a limit is the largest whose program the compiler lets through."""
    params, images = make_params(), make_images(64)
    adapter = ttt.gradient_adapter(
        ttt.losses.rotation(turn), optax.adam(1e-2), select=ttt.select.paths(".*/encoder/.*")
    )
    predict = ttt.episodic(adapter, ttt.unbatched(turn), num_steps=1)
    keys = ttt.sample_keys(jax.random.key(0), np.arange(64))

    @functools.cache
    def compile_for(size):
        run = ttt.batched(predict, chunk_size=size)
        return jax.jit(run).lower(params, images, keys).compile()

    needs = {size: budget.used(compile_for(size)) for size in (1, 16)}
    limit = (needs[1] + needs[16]) // 2
    chunk = budget.largest_chunk(compile_for, limit, most=64, sizes=(1, 16))
    assert 1 < chunk.size < 16 and chunk.bytes <= limit
    assert budget.used(compile_for(chunk.size + 1)) > limit
    logits, _ = chunk.compiled(params, images, keys)
    ttt.audit.require_close(logits, compile_for(16)(params, images, keys)[0])


def test_copy_bytes_counts_what_an_instance_owns():
    """Adam keeps two moments of each fast parameter and a count; frozen parameters are shared."""
    params = make_params()
    fast = sum(params["params"]["norm"][name].nbytes for name in ("scale", "bias"))
    adapter = ttt.gradient_adapter(
        ttt.losses.entropy(classify), optax.adam(1e-2), select=ttt.select.norm_affine()
    )
    counts = 2 * jnp.zeros((), jnp.int32).nbytes
    assert budget.copy_bytes(adapter, params) == 3 * fast + counts
    shapes = jax.eval_shape(lambda: params)
    assert budget.copy_bytes(adapter, shapes) == 3 * fast + counts
