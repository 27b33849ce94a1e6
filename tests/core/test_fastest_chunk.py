"""The fastest number of instances in flight, with a clock of numbers in place of the machine's."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from tests.core.models import classify, make_images, make_params
from tests.core.test_evaluation import episodic, task_of
from ttt_jax import _chunks, budget, evaluation, tuning

COUNT = 37
PARAMS = make_params()
KEYS = ttt.sample_keys(jax.random.key(0), jnp.arange(COUNT))
SOURCE = ttt.source(ttt.unbatched(classify))


class Clock:
    """Seconds of a call that depend on its size; a size of none of them fails as out of memory."""

    def __init__(self, monkeypatch, seconds_of, step=0.0):
        self.calls, self._seconds_of = [], seconds_of
        self.now = 0.0
        monkeypatch.setattr(_chunks, "_seconds", self._seconds)
        monkeypatch.setattr(_chunks.time, "perf_counter", self._tick)
        self._step = step

    def _tick(self):
        self.now += self._step
        return self.now

    def _seconds(self, program, *arguments):
        size = program(*arguments)
        self.calls.append(size)
        seconds = self._seconds_of(size)
        if seconds is None:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")
        return seconds


class Sized:
    """In place of a compiled program: a call gives the size, memory is a line in it."""

    def __init__(self, size):
        self._size = size

    def lower(self, *arguments):
        return self

    def compile(self):
        return self

    def memory_analysis(self):
        return budget_of(self._size)

    def __call__(self, *arguments):
        return self._size


def budget_of(size):
    return types.SimpleNamespace(
        temp_size_in_bytes=100 * size,
        argument_size_in_bytes=0,
        output_size_in_bytes=0,
        alias_size_in_bytes=0,
    )


@pytest.fixture
def sized(monkeypatch):
    """Programs are sizes, and as many fit as the test says."""
    run_of = {}

    def jit(function):
        return Sized(run_of[id(function)])

    def make(size):
        def function(*arguments):
            return arguments[-1]

        run_of[id(function)] = size
        kept.append(function)
        return function

    kept = []
    monkeypatch.setattr(_chunks.jax, "jit", jit)

    def measure(most=COUNT, fits=COUNT, max_seconds=1e9):
        monkeypatch.setattr(budget, "free_bytes", lambda: 100 * fits + 16 * most)
        data = (np.zeros(most, np.float32),)
        return _chunks.seconds_by_size(make, (), data, max_seconds=max_seconds)

    return measure


def chunks_timed(size, most):
    """How many chunks a size is timed on: at least two, and sixteen instances, where there are."""
    return -(-min(most, size * max(2, -(-16 // size))) // size)


def test_sizes_are_powers_of_two_and_the_most_that_fit_in_even_chunks(monkeypatch, sized):
    clock = Clock(monkeypatch, lambda size: 1.0)
    found = sized(most=37)
    # 8 and 16 would pad the last of 5 and of 3 chunks; 32 needs two, as 19 does.
    assert set(found) == {1, 2, 4, 8, 13, 19, 37}
    assert clock.calls[0] == 37 and 1 in clock.calls[:5]


def test_what_does_not_fit_is_not_tried(monkeypatch, sized):
    Clock(monkeypatch, lambda size: 1.0)
    assert max(sized(most=64, fits=20)) <= 20


@pytest.mark.parametrize("fastest", [1, 2, 4, 8, 13, 19, 37])
def test_the_fastest_comes_first(monkeypatch, sized, fastest):
    def seconds(size):
        return chunks_timed(size, 37) * size * (0.5 if size == fastest else 1.0)

    Clock(monkeypatch, seconds)
    assert next(iter(sized(most=37))) == fastest


def test_seconds_are_per_instance_of_the_whole_batch(monkeypatch, sized):
    """10 instances in chunks of 4 take three of them, whatever was timed."""
    Clock(monkeypatch, lambda size: 2.0 * chunks_timed(size, 10))
    assert sized(most=10)[4] == pytest.approx(2.0 * 3 / 10)


def test_the_end_of_the_time_leaves_both_ends(monkeypatch, sized):
    Clock(monkeypatch, lambda size: 1.0, step=5.0)
    assert set(sized(most=64, fits=64, max_seconds=0)) == {64, 1}


def test_a_size_that_fails_is_left_out(monkeypatch, sized):
    Clock(monkeypatch, lambda size: None if size > 8 else 1.0)
    assert max(sized(most=64, fits=64)) == 8
    Clock(monkeypatch, lambda size: None)
    with pytest.raises(jax.errors.JaxRuntimeError):
        sized(most=64)


def test_a_size_far_slower_is_timed_once(monkeypatch, sized):
    clock = Clock(monkeypatch, lambda size: chunks_timed(size, 64) * size * (9 if size == 4 else 1))
    sized(most=64)
    assert clock.calls.count(4) == 1 and clock.calls.count(8) == 3


def test_a_slow_start_of_a_short_call_is_no_reason_to_leave_a_size_out(monkeypatch, sized):
    begun = set()

    def seconds(size):
        start = 0.0 if size in begun else 0.3
        begun.add(size)
        return start + 1e-4 * chunks_timed(size, 64) * size * (0.5 if size == 4 else 1.0)

    Clock(monkeypatch, seconds)
    assert next(iter(sized(most=64, fits=64))) == 4


def test_a_real_predictor_on_one_device_and_on_several():
    xs = make_images(COUNT)
    expected = jax.jit(ttt.batched(SOURCE))(PARAMS, xs, KEYS)[0]
    size = tuning.fastest_chunk(SOURCE, PARAMS, xs, KEYS, max_seconds=0)
    found = jax.jit(ttt.batched(SOURCE, chunk_size=size))(PARAMS, xs, KEYS)[0]
    ttt.audit.require_close(found, expected)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("data",))
    seconds = tuning.chunk_seconds(SOURCE, PARAMS, xs, KEYS, mesh=mesh, max_seconds=0)
    assert set(seconds) == {1, 19}


def test_what_is_refused():
    xs = make_images(COUNT)
    with pytest.raises(ValueError, match="max_seconds must be a number of at least 0; got -1"):
        tuning.fastest_chunk(SOURCE, PARAMS, xs, KEYS, max_seconds=-1)
    with pytest.raises(ValueError, match="one key per instance"):
        tuning.fastest_chunk(SOURCE, PARAMS, xs, KEYS[:3])
    with pytest.raises(TypeError, match="predictor must be a predictor"):
        tuning.fastest_chunk(ttt.batched(SOURCE), PARAMS, xs, KEYS)


class TestEvaluation:
    """``chunk_size="fastest"`` of the loop over a task."""

    def rows(self, monkeypatch, noted, times):
        asked = []

        def seconds_by_size(run_of, fixed, data, **options):
            asked.append(data[1].shape)
            return times

        monkeypatch.setattr(_chunks, "seconds_by_size", seconds_by_size)
        task = task_of()
        made = evaluation.Evaluation(
            *(task, PARAMS), role="reported", seed=0, chunk_size="fastest", chunk_sizes=noted
        )
        method = evaluation.Parametric(lambda values: episodic(), (), key=("toy", "ttt"))
        return [row for name in made.streams for row in made.rows("ttt", method, (name,))], asked

    def test_is_measured_once_noted_and_used(self, monkeypatch):
        noted = {}
        rows, asked = self.rows(monkeypatch, noted, {2: 0.1, 4: 0.2})
        assert asked == [(4,)] and noted == {"('toy', 'ttt')": {2: 0.1, 4: 0.2}}
        others, asked = self.rows(monkeypatch, noted, {})
        assert asked == []
        for row, other in zip(rows, others, strict=True):
            assert row.sums == other.sums

    def test_a_note_larger_than_a_batch_is_the_batch(self, monkeypatch):
        rows, asked = self.rows(monkeypatch, {"('toy', 'ttt')": {500: 0.1}}, {})
        assert rows and asked == []

    def test_another_word_is_refused(self):
        with pytest.raises(ValueError, match="'fastest'; got 'fast'"):
            evaluation.Evaluation(task_of(), PARAMS, role="reported", seed=0, chunk_size="fast")


def test_streams_and_batches_have_no_chunks(monkeypatch):
    monkeypatch.setattr(_chunks, "seconds_by_size", lambda *a, **k: pytest.fail("was measured"))
    tent = ttt.methods.tent(classify, optimizer=optax.sgd(0.1))
    made = evaluation.Evaluation(task_of(), PARAMS, role="reported", seed=0, chunk_size="fastest")
    assert made.rows("tent", evaluation.InBatches(tent, 4), ("a",))
