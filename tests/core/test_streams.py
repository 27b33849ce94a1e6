"""Streams: what is carried over, what a reset restores, and what a bad instance leaves behind."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from ttt_jax import losses, resets, select

from . import models
from .compiling import quickly
from .streaming import (
    IMAGES,
    KEY,
    KEYS,
    PARAMS,
    N,
    adam_with_memory,
    assert_equal,
    classify,
    rows,
    run,
    scanned,
    walk,
    walk_stream,
)


class TestOrderWithinAStep:
    """``w`` moves half of the way to x: from 0 with 4, 0, 8 it is 2, 1, 4.5."""

    XS = (4.0, 0.0, 8.0)

    def test_after(self):
        _, (outputs, info), _ = walk_stream(self.XS, reset=resets.never())
        np.testing.assert_allclose(outputs, [2, 1, 4.5])
        np.testing.assert_allclose(info.loss[:, 0], [8, 2, 24.5])
        np.testing.assert_allclose(info.grad_norm[:, 0], [4, 2, 7])

    def test_before(self):
        carry, (outputs, info), _ = walk_stream(self.XS, reset=resets.never(), predict="before")
        np.testing.assert_allclose(outputs, [0, 2, 1])
        np.testing.assert_allclose(info.loss[:, 0], [8, 2, 24.5])
        np.testing.assert_allclose(carry.state.fast, 4.5)
        assert info.ok.all() and info.updated.all() and not info.reset.any()

    def test_the_answer_flips(self):
        """The sign of ``w`` is the class: right after the update, wrong before it."""
        for predict, sign in (("before", -1), ("after", 1)):
            stream = ttt.online(
                walk(0.5), lambda w, x: jnp.sign(w), reset=resets.never(), predict=predict
            )
            params = jnp.asarray(-1.0)
            _, (output, _) = quickly(stream.step, params, stream.init(params), 5.0, KEY)
            assert output == sign

    def test_several_inner_steps(self):
        _, (outputs, info), _ = walk_stream(self.XS, reset=resets.never(), num_steps=2)
        np.testing.assert_allclose(outputs, [3, 0.75, 6.1875])
        assert info.loss.shape == (3, 2)

    def test_zero_inner_steps_are_the_source(self):
        _, (outputs, info), _ = walk_stream(self.XS, reset=resets.never(), num_steps=0)
        np.testing.assert_array_equal(outputs, [0, 0, 0])
        assert info.loss.shape == (3, 0) and info.ok.all() and not info.updated.any()

    def test_the_reset_comes_last(self):
        """It sees the output of its step, and that output is not the pristine one."""
        _, (outputs, info), carries = walk_stream(self.XS, reset=resets.every(2))
        np.testing.assert_allclose(outputs, [2, 1, 4])
        np.testing.assert_array_equal(info.reset, [False, True, False])
        np.testing.assert_allclose(carries.state.fast, [2, 0, 4])

    def test_errors(self):
        with pytest.raises(ValueError, match="'before' or 'after', got 'during'"):
            ttt.online(walk(), classify, reset=resets.never(), predict="during")
        with pytest.raises(ValueError, match="num_steps must be an integer of at least 0, got -1"):
            ttt.online(walk(), classify, reset=resets.never(), num_steps=-1)


class TestKeys:
    def test_the_reset_has_a_key_of_its_own(self):
        """It differs from the instance's key and from that of any inner step."""
        seen = []

        def apply(carry, state, pristine, output, info, key):
            seen.append(key)
            return carry, state, jnp.zeros((), bool)

        stream = ttt.online(walk(), lambda w, x: w, num_steps=3, reset=ttt.Reset(lambda: (), apply))
        params = jnp.asarray(0.0)

        def step(params, key):
            stream.step(params, stream.init(params), 1.0, key)
            return seen.pop()

        used = jax.random.key_data(quickly(step, params, KEY))
        steps = jax.random.key_data(ttt.sample_keys(KEY, np.arange(1000)))
        others = np.concatenate([steps, jax.random.key_data(KEY)[None]])
        assert not (others == np.asarray(used)[None]).all(axis=-1).any()


class TestBadInstances:
    def adapter(self, name):
        loss = {
            "rotation": losses.rotation(models.turn),
            "stateful": models.moving_center(),
            "weighted_entropy": losses.weighted(
                (1.0, losses.entropy(models.classify)), (0.5, models.moving_center())
            ),
        }[name]
        return adam_with_memory(loss)

    @pytest.mark.parametrize(
        ("name", "predict"),
        [("rotation", "before"), ("stateful", "after"), ("weighted_entropy", "before")],
    )
    def test_a_nan_step_is_not_taken(self, name, predict):
        """State, memory and count keep their values; the output is that of the state before."""
        clean = np.delete(np.arange(N), 2)
        stream = ttt.online(
            self.adapter(name), classify, reset=resets.never(), predict=predict, num_steps=2
        )

        def both(xs, order):
            """With the instance, and with one more at the end in its stead."""
            return jax.lax.map(lambda at: scanned(stream, PARAMS, xs[at], KEYS[at])[1:], order)

        order = np.stack([np.arange(N), np.append(clean, 0)])
        results = quickly(both, IMAGES.at[2].set(jnp.nan), order)
        ((outputs, info), carries), ((without, _), others) = rows(results, 0), rows(results, 1)
        np.testing.assert_array_equal(info.ok, np.arange(N) != 2)
        np.testing.assert_array_equal(info.updated, np.arange(N) != 2)
        assert_equal(rows(carries.state, 1), rows(carries.state, 2))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(carries.state))
        # The stream goes on as if the instance had never come.
        ttt.audit.require_close(outputs[clean], without[:-1], num_steps=2 * len(clean))
        np.testing.assert_array_equal(carries.state.count[clean], others.state.count[:-1])

    def test_output_comes_from_the_last_finite_state(self):
        """The second inner step overflows; the first one is kept."""

        def step(params, x, key):
            return jnp.where(params > 0.5, jnp.nan, -params)

        adapter = ttt.gradient_adapter(step, optax.sgd(1.0), select=select.everything())
        stream = ttt.online(adapter, lambda w, x: w, num_steps=3, reset=resets.never())
        params = jnp.asarray(0.0)
        carry, (output, info) = quickly(stream.step, params, stream.init(params), 1.0, KEY)
        assert output == 1.0 and carry.state.fast == 1.0 and carry.state.count == 1
        assert not info.ok and info.updated
        np.testing.assert_array_equal(np.isfinite(info.loss), [True, False, False])

    def test_a_huge_step_size(self):
        """Only the updated parameters are not finite."""
        adapter = ttt.gradient_adapter(
            losses.rotation(models.turn), optax.sgd(1e38), select=select.everything()
        )

        def both(xs, keys):
            stream = ttt.online(adapter, classify, reset=resets.never())
            return scanned(stream, PARAMS, xs, keys), models.classify(PARAMS, xs)

        (carry, (outputs, info), _), source = quickly(both, IMAGES, KEYS)
        assert not info.ok.any() and np.isfinite(info.loss).all()
        ttt.audit.require_close(outputs, source, num_steps=0)
        assert_equal(carry.state, adapter.init(PARAMS))


class TestMemory:
    def test_a_feature_queue(self):
        """The bank holds the last three instances, the newest first, until a reset."""
        queue = ttt.StatefulLoss(
            init=lambda params: jnp.zeros(3),
            value=lambda params, memory, x, key: (
                0.5 * (params - memory.mean()) ** 2,
                jnp.concatenate([x[None], memory[:-1]]),
            ),
            after=lambda adapted, memory: memory,
        )
        adapter = ttt.gradient_adapter(queue, optax.sgd(0.1), select=select.everything())
        _, _, carries = run(
            adapter,
            reset=resets.every(4),
            params=jnp.asarray(1.0),
            xs=np.arange(1.0, 7.0, dtype=np.float32),
            apply=lambda w, x: w,
        )
        np.testing.assert_array_equal(
            carries.state.memory,
            [[1, 0, 0], [2, 1, 0], [3, 2, 1], [0, 0, 0], [5, 0, 0], [6, 5, 0]],
        )

    def test_a_moving_average_teacher_serves_the_predictions(self):
        """Mean teacher: the student learns, its average over time is asked."""
        teacher = ttt.StatefulLoss(
            init=lambda params: params,
            value=lambda params, memory, x, key: (0.5 * (params - x) ** 2, memory),
            after=lambda adapted, memory: 0.9 * memory + 0.1 * adapted,
        )
        adapter = ttt.gradient_adapter(teacher, optax.sgd(0.5), select=select.everything())
        served = adapter._replace(merge=lambda params, state: state.memory)
        xs = np.array([4.0, 0.0, 8.0], np.float32)
        _, (outputs, _), carries = run(
            served,
            reset=resets.never(),
            params=jnp.asarray(0.0),
            xs=xs,
            keys=KEYS[:3],
            apply=lambda w, x: w,
        )
        np.testing.assert_allclose(carries.state.fast, [2, 1, 4.5])
        average = 0.1 * 2
        expected = [average, 0.9 * average + 0.1, 0.9 * (0.9 * average + 0.1) + 0.45]
        np.testing.assert_allclose(outputs, expected, rtol=1e-5)

    def test_memory_may_hold_keys_and_integers(self):
        """Every choice of states is one that typed keys survive."""
        noisy = ttt.StatefulLoss(
            init=lambda params: {"key": jax.random.key(9), "seen": jnp.zeros((), jnp.int32)},
            value=lambda params, memory, x, key: (
                params * x * jax.random.normal(memory["key"]),
                {"key": jax.random.fold_in(memory["key"], 1), "seen": memory["seen"] + 1},
            ),
            after=lambda adapted, memory: memory,
        )
        adapter = ttt.filtered(
            ttt.gradient_adapter(noisy, optax.sgd(0.1), select=select.everything()),
            lambda params, x, key: ~(x < 0),
        )
        _, (_, info), carries = run(
            adapter,
            reset=resets.every(4),
            params=jnp.asarray(1.0),
            xs=np.array([1.0, -1.0, np.nan, 2.0, 1.0, 1.0], np.float32),
            apply=lambda w, x: w,
        )
        np.testing.assert_array_equal(carries.state.memory["seen"], [1, 1, 1, 0, 1, 2])
        np.testing.assert_array_equal(info.updated, [True, False, False, True, True, True])
        start = jax.random.key_data(jax.random.key(9))
        np.testing.assert_array_equal(jax.random.key_data(carries.state.memory["key"])[3], start)
        predict = ttt.episodic(adapter, lambda w, x: w, num_steps=2)
        pair = np.array([1.0, -1.0], np.float32)
        outputs, info = quickly(ttt.batched(predict), np.float32(1), pair, KEYS[:2])
        np.testing.assert_array_equal(info.updated, [True, False])
        assert outputs[0] != 1.0 and outputs[1] == 1.0


def test_a_memory_that_an_instance_spoils_is_not_kept():
    """The loss reads the memory before the instance enters it, so only the memory sees the NaN."""
    loss = ttt.StatefulLoss(
        init=lambda params: jnp.zeros(()),
        value=lambda params, memory, x, key: ((params["w"] - memory) ** 2, 0.5 * memory + 0.5 * x),
        after=lambda adapted, memory: memory,
    )
    adapter = ttt.gradient_adapter(loss, optax.sgd(0.1), select=ttt.select.everything())
    stream = ttt.online(adapter, lambda params, x: params["w"], reset=ttt.resets.never())
    params = {"w": jnp.ones(())}

    def read(xs):
        return scanned(stream, params, xs, KEYS[:4])[1]

    xs = np.array([[1.0, np.nan, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]], np.float32)
    outputs, info = quickly(lambda xs: jax.lax.map(read, xs), xs)
    assert info.ok[0].tolist() == [True, False, True, True]
    np.testing.assert_array_equal(outputs[0, [0, 2, 3]], outputs[1, :3])
