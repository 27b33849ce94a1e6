"""Diagnostics against numbers worked out by hand, and maps against separate runs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from ttt_jax import diagnostics, losses, select

from . import models
from .compiling import quickly

KEY = jax.random.key(3)
EIGENVALUES = np.array([1.0, 3.0], np.float32)


def quadratic(params, x, label, key):
    """Smooth with beta = 3; its gradient at (1, 2) is (1, 6)."""
    return 0.5 * jnp.sum(EIGENVALUES * jnp.square(params["w"]))


def linear(params, x, key):
    """Its gradient is x, and 5 in the other parameter."""
    return jnp.sum(params["w"] * x) + 5 * params["other"]


PARAMS = {"w": np.array([1.0, 2.0], np.float32), "other": np.float32(1.0)}
ONLY_W = select.paths("w")
align = diagnostics.gradient_alignment(quadratic, linear, select=ONLY_W)


def alignment_of(x, build=align):
    return quickly(build, PARAMS, np.array(x, np.float32), None, KEY)


class TestAlignment:
    def test_by_hand(self):
        found = alignment_of([2.0, 1.0])
        assert all(value.dtype == jnp.float32 and value.shape == () for value in found)
        expected = (8.0, 8 / np.sqrt(37 * 5), np.sqrt(37), np.sqrt(5))
        np.testing.assert_allclose(found, expected, rtol=1e-6)

    def test_opposed_and_zero_gradients(self):
        np.testing.assert_allclose(alignment_of([-1.0, -6.0]).cosine, -1, rtol=1e-6)
        found = alignment_of([0.0, 0.0])
        assert (found.inner, found.cosine, found.aux_norm) == (0, 0, 0)

    def test_other_parameters_do_not_count_unless_selected(self):
        whole = diagnostics.gradient_alignment(quadratic, linear, select=select.everything())
        found = alignment_of([2.0, 1.0], whole)
        np.testing.assert_allclose((found.inner, found.aux_norm), (8, np.sqrt(30)), rtol=1e-6)

    def test_maps_over_instances_with_labels(self):
        def labelled(params, x, label, key):
            return params["w"][label]

        align = diagnostics.gradient_alignment(labelled, linear, select=ONLY_W)
        xs, labels = np.array([[2.0, 1.0], [4.0, 3.0]], np.float32), np.array([0, 1])
        mapped = jax.vmap(align, in_axes=(None, 0, 0, 0))
        found = quickly(mapped, PARAMS, xs, labels, jax.random.split(KEY, 2))
        np.testing.assert_array_equal(found.inner, [2, 3])
        np.testing.assert_allclose(found.cosine, [2 / np.sqrt(5), 3 / 5], rtol=1e-6)

    def test_the_auxiliary_gradient_is_that_of_the_first_inner_step(self):
        def noisy(params, x, key):
            return jnp.sum(params["w"] * jax.random.normal(key, (2,)))

        adapter = ttt.gradient_adapter(noisy, optax.sgd(0.1), select=ONLY_W)
        predict = ttt.episodic(adapter, lambda params, x: x, num_steps=1)
        align = diagnostics.gradient_alignment(quadratic, noisy, select=ONLY_W)
        (_, info), found = quickly(
            lambda p, key: (predict(p, 0.0, key), align(p, None, None, key)), PARAMS, KEY
        )
        assert found.aux_norm == info.grad_norm[0]

    def test_a_loss_with_memory_is_refused(self):
        with pytest.raises(TypeError, match=r"aux_loss must be .*got a StatefulLoss.*init"):
            diagnostics.gradient_alignment(quadratic, models.moving_center(), select=ONLY_W)

    def test_a_vector_is_refused(self):
        align = diagnostics.gradient_alignment(
            lambda params, x, label, key: params["w"], linear, select=ONLY_W
        )
        with pytest.raises(ValueError, match=r"main_loss must return a scalar; got shape \(2,\)"):
            align(PARAMS, jnp.ones(2), None, KEY)


class TestGuaranteedStep:
    def test_by_hand(self):
        step = diagnostics.guaranteed_step(alignment_of([2.0, 1.0]), smoothness=3.0)
        np.testing.assert_allclose(step, 8 / (3 * 37), rtol=1e-6)

    def test_it_lowers_the_main_loss_by_what_the_theorem_promises(self):
        def fall(x):
            found = align(PARAMS, x, None, KEY)
            step = diagnostics.guaranteed_step(found, smoothness=3.0)
            adapter = ttt.gradient_adapter(linear, optax.sgd(step), select=ONLY_W)
            loss = ttt.episodic(adapter, lambda p, x: quadratic(p, x, None, None), num_steps=1)
            after, _ = loss(PARAMS, x, KEY)
            return quadratic(PARAMS, None, None, None) - after, found

        xs = np.array([[2.0, 1.0], [-4.0, 1.0], [30.0, -1.0], [0.0, 50.0]], np.float32)
        falls, found = quickly(lambda xs: jax.lax.map(fall, xs), xs)
        bound = np.maximum(found.main_norm, found.aux_norm)
        promised = found.inner**2 / (2 * 3 * bound**2)
        assert (falls >= promised).all() and (promised > 0).all()

    def test_with_the_main_loss_itself_it_reaches_the_minimum(self):
        def bowl(params, x, label, key):
            return 2 * jnp.sum(jnp.square(params["w"]))

        align = diagnostics.gradient_alignment(
            bowl, lambda params, x, key: bowl(params, x, None, key), select=ONLY_W
        )
        found = quickly(align, PARAMS, None, None, KEY)
        step = diagnostics.guaranteed_step(found, smoothness=4.0)
        np.testing.assert_allclose(step, 1 / 4, rtol=1e-6)

    def test_no_step_where_the_theorem_is_silent(self):
        def steps_of(xs, smoothness):
            found = jax.vmap(align, in_axes=(None, 0, None, None))(PARAMS, xs, None, KEY)
            return diagnostics.guaranteed_step(found, smoothness=smoothness)

        xs = [[-2.0, -1.0], [6.0, -1.0], [0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]]
        steps = quickly(steps_of, np.array(xs, np.float32), 3.0)
        np.testing.assert_array_equal(steps, np.zeros(5, np.float32))


def sure(*chosen, count=3):
    """Logits that predict these classes with certainty."""
    return 99 * np.eye(count, dtype=np.float32)[list(chosen)]


def damaged(logits, place):
    """A copy with nan at a place."""
    copy = np.array(logits)
    copy[place] = np.nan
    return copy


class TestMonitors:
    def test_effective_classes(self):
        stack = np.stack([sure(0, 1, 2), sure(1, 1, 1), np.zeros((3, 3)), sure(0, 0, 1)])
        found = quickly(diagnostics.effective_classes, np.float32(stack))
        # The last has the frequencies 2/3 and 1/3.
        np.testing.assert_allclose(found, [3, 1, 3, 3 / 2 ** (2 / 3)], rtol=1e-6)
        alone = quickly(diagnostics.effective_classes, stack[3])
        np.testing.assert_allclose(alone, found[3], rtol=1e-6)

    def test_predicted_classes(self):
        unsure = 1e-3 * sure(0, 0, 0)
        stack = np.stack([sure(0, 1, 2), sure(1, 1, 1), unsure, sure(0, 0, 1)])
        found = quickly(diagnostics.predicted_classes, stack)
        np.testing.assert_allclose(found, [3, 1, 1, 3 / 2 ** (2 / 3)], rtol=1e-6)
        # Certainty says nothing else than the class does; without it the first sees no collapse.
        assert quickly(diagnostics.effective_classes, unsure) > 2.99

    @pytest.mark.parametrize("name", ["effective_classes", "predicted_classes"])
    def test_a_nan_prediction_is_no_class(self, name):
        count = getattr(diagnostics, name)
        stack = np.stack([damaged(sure(0, 1, 2, 2), 3), np.full((4, 3), np.nan, np.float32)])
        np.testing.assert_allclose(quickly(count, stack), [3, np.nan], rtol=1e-6)

    def test_agreement(self):
        adapted = np.stack([sure(0, 1, 2, 0), sure(0, 0, 0, 0)])
        found = diagnostics.agreement(adapted, sure(0, 1, 1, 0))
        np.testing.assert_array_equal(found, [0.75, 0.5])

    def test_nan_agrees_with_nothing(self):
        bad = damaged(sure(0, 1), 0)
        assert diagnostics.agreement(bad, bad) == 0.5
        assert diagnostics.harm(bad, sure(0, 1), np.array([0, 1])).turned_wrong == 1
        assert diagnostics.harm(bad, bad, np.array([-1, 1])).turned_wrong == 0

    def test_drift(self):
        before = {"a": np.array([3.0]), "b": np.array([4.0]), "c": np.array([7.0])}
        after = {"a": np.array([3.0]), "b": np.array([5.0]), "c": np.array([0.0])}
        chosen = select.paths("a", "b")
        np.testing.assert_allclose(diagnostics.drift(before, after, chosen), 1 / 5, rtol=1e-6)
        assert diagnostics.drift(before, before, chosen) == 0
        zero = jax.tree.map(np.zeros_like, before)
        assert diagnostics.drift(zero, zero, chosen) == 0
        assert diagnostics.drift(zero, after, chosen) == jnp.inf

    def test_drift_refuses_other_shapes(self):
        with pytest.raises(ValueError, match=r"same structure; got .*\(1,\).*\(2,\).*jax\.vmap"):
            diagnostics.drift({"a": jnp.ones(1)}, {"a": jnp.ones(2)}, select.everything())

    def test_harm_equals_a_hand_count(self):
        labels = np.array([0, 1, 2, 0, 1])
        pristine = sure(0, 1, 0, 1, 2)  # right, right, wrong, wrong, wrong
        adapted = sure(0, 2, 2, 0, 0)  # right, wrong, right, right, wrong
        found = quickly(diagnostics.harm, adapted, pristine, labels)
        assert (found.turned_right, found.turned_wrong) == (2, 1)
        np.testing.assert_allclose(found.rate, 0.2, rtol=1e-6)
        stacked = quickly(diagnostics.harm, np.stack([pristine, adapted]), pristine, labels)
        np.testing.assert_array_equal(stacked.turned_wrong, [0, 1])

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: diagnostics.effective_classes(jnp.ones(3)), r"\[\.\.\., N, C\].*\(3,\)"),
            (lambda: diagnostics.effective_classes(jnp.ones((0, 3))), r"\(0, 3\)"),
            (lambda: diagnostics.agreement(sure(0, 1), sure(0)), r"\(2, 3\) and \(1, 3\)"),
            (lambda: diagnostics.harm(sure(0), sure(0), jnp.array([1.0])), "float32"),
            (
                lambda: diagnostics.harm(sure(0), sure(0), jnp.array([1, 2])),
                r"\(1,\); got .*\(2,\)",
            ),
        ],
    )
    def test_bad_input(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()


class TestAuxiliaryAccuracy:
    @staticmethod
    def corner(params, images):
        """Knows the rotation by the corner that the bright pixel went to."""
        places = [images[:, 0, 0], images[:, -1, 0], images[:, -1, -1], images[:, 0, -1]]
        return jnp.concatenate(places, axis=-1) * params

    def test_by_hand(self):
        bright = np.zeros((4, 4, 1), np.float32)
        bright[0, 0] = 1
        accuracy = jax.jit(diagnostics.auxiliary_accuracy(self.corner))
        assert accuracy(np.float32(1), bright) == 1
        assert accuracy(np.float32(-1), bright) == 0
        assert accuracy(np.float32(0), bright) == 0.25  # always class 0
        pair = np.stack([bright, np.rot90(bright)])
        found = quickly(jax.vmap(accuracy, in_axes=(None, 0)), np.float32(1), pair)
        np.testing.assert_array_equal(found, [1, 0])

    def test_bad_input(self):
        accuracy = diagnostics.auxiliary_accuracy(self.corner)
        with pytest.raises(ValueError, match=r"square image.*\(2, 4, 4, 1\).*vmap"):
            accuracy(jnp.ones(()), jnp.ones((2, 4, 4, 1)))
        accuracy = diagnostics.auxiliary_accuracy(models.classify)
        with pytest.raises(ValueError, match=r"\[N, 4\]; got shape \(4, 3\)"):
            jax.eval_shape(accuracy, models.make_params(), models.make_images(1)[0])


RATES = [0.03, 0.1, 0.3]
classify = ttt.unbatched(models.classify)


def make(learning_rate):
    loss = losses.rotation(models.turn, augment=models.jitter)
    optimizer = optax.sgd(learning_rate, momentum=0.9)
    return ttt.gradient_adapter(loss, optimizer, select=select.norm_affine())


class TestStepSizeMap:
    def test_equals_separate_runs(self):
        params, images = models.make_params(), models.make_images(3)
        keys = ttt.sample_keys(KEY, np.arange(3))
        mapped = diagnostics.step_size_map(make, classify, learning_rates=RATES, num_steps=3)
        outputs, info = quickly(ttt.batched(mapped), params, images, keys)
        assert outputs.shape == (3, 3, 4, models.CLASSES)
        assert info.loss.shape == (3, 3, 3) and info.ok.all() and info.updated.all()

        def separate(rate):
            predict = ttt.episodic(make(rate), classify, num_steps=3, trace=True)
            return ttt.batched(predict)(params, images, keys)

        expected, run = quickly(lambda rates: jax.lax.map(separate, rates), np.float32(RATES))
        ttt.audit.require_close(outputs.swapaxes(0, 1), expected, num_steps=3)
        ttt.audit.require_close(info.loss.swapaxes(0, 1), run.loss, num_steps=3)
        gap = jnp.abs(outputs[:, :, 1:] - outputs[:, :1, :1]).max(axis=(0, 3))
        assert (gap > 1e-4).all()  # every entry differs from the source prediction

    def test_one_step_shares_the_gradient(self):
        """Of all matrix products only the last prediction's is made for each learning rate."""

        def make(learning_rate):
            loss = losses.entropy(lambda params, x: x @ params)
            return ttt.gradient_adapter(loss, optax.sgd(learning_rate), select=select.everything())

        mapped = diagnostics.step_size_map(
            make, lambda params, x: params.T @ x, learning_rates=jnp.ones(7), num_steps=1
        )
        jaxpr = jax.make_jaxpr(mapped)(jnp.ones((5, 3)), jnp.ones(5), KEY)
        text = [line for line in str(jaxpr).splitlines() if "= dot_general" in line]
        assert len(text) == 4
        assert sum("7" in line.split("=")[0].split(":")[-1] for line in text) == 1

    def test_a_rate_that_diverges_leaves_the_others_alone(self):
        rates = jnp.array([0.1, 3e38])
        mapped = diagnostics.step_size_map(make, classify, learning_rates=rates, num_steps=2)
        params, image = models.make_params(), models.make_images(1)[0]
        outputs, info = quickly(mapped, params, image, KEY)
        np.testing.assert_array_equal(info.ok, [True, False])
        np.testing.assert_array_equal(outputs[1, 2], outputs[1, 0])
        assert (outputs[0, 2] != outputs[0, 0]).any()

    def test_zero_steps(self):
        mapped = diagnostics.step_size_map(make, classify, learning_rates=RATES, num_steps=0)
        outputs, info = quickly(mapped, models.make_params(), models.make_images(1)[0], KEY)
        assert outputs.shape == (3, 1, models.CLASSES) and info.loss.shape == (3, 0)

    def test_bad_input(self):
        def build(make=make, rates=RATES, num_steps=1):
            return diagnostics.step_size_map(
                make, classify, learning_rates=rates, num_steps=num_steps
            )

        with pytest.raises(ValueError, match=r"vector of at least one number; got shape \(\)"):
            build(rates=0.1)
        with pytest.raises(ValueError, match=r"got shape \(0,\)"):
            build(rates=[])
        with pytest.raises(ValueError, match="num_steps must be an integer of at least 0, got -1"):
            build(num_steps=-1)
        with pytest.raises(TypeError, match=r"make must return an Adapter .* got float"):
            build(make=lambda rate: 0.5)(models.make_params(), jnp.ones(3), KEY)


def logits_for(*probabilities):
    """``[N, 2]`` logits of these probabilities of class 0."""
    p = np.array(probabilities, np.float32)
    return np.log(np.stack([p, 1 - p], axis=-1))


SOURCE = logits_for(0.6, 0.6, 0.4, 0.4)
MAP = np.stack(
    [
        np.stack([SOURCE, logits_for(0.7, 0.7, 0.3, 0.3), logits_for(0.9, 0.9, 0.1, 0.1)]),
        np.stack([SOURCE, logits_for(0.8, 0.8, 0.3, 0.6), logits_for(0.99, 0.99, 0.99, 0.99)]),
    ]
)


def chosen(criterion, outputs=MAP):
    found = quickly(lambda o: diagnostics.select_label_free(o, criterion=criterion), outputs)
    return int(found.rate_index), int(found.num_steps), float(found.score), bool(found.admissible)


class TestSelection:
    def test_entropy_alone_chooses_the_collapsed_entry_and_the_floor_prevents_it(self):
        assert chosen(diagnostics.lowest_entropy(floor=1.0))[:2] == (1, 2)
        rate, steps, score, admissible = chosen(diagnostics.lowest_entropy(floor=1.9))
        assert (rate, steps, admissible) == (0, 2, True)
        np.testing.assert_allclose(score, 0.9 * np.log(0.9) + 0.1 * np.log(0.1), rtol=1e-5)

    def test_largest_change(self):
        rate, steps, score, _ = chosen(diagnostics.largest_change(threshold=1.0))
        assert (rate, steps) == (0, 2)
        np.testing.assert_allclose(score, 0.3, rtol=1e-5)
        # Three quarters of the classes kept admits [1, 1], whose change is 0.175 only.
        assert chosen(diagnostics.largest_change(threshold=0.75))[:2] == (0, 2)
        rate, steps, score, _ = chosen(diagnostics.largest_change(threshold=0.5))
        assert (rate, steps) == (1, 2)
        np.testing.assert_allclose(score, (2 * 0.39 + 2 * 0.59) / 4, rtol=1e-5)

    def test_nothing_admissible_is_the_pristine_model(self):
        assert chosen(diagnostics.lowest_entropy(floor=2.5)) == (0, 0, -np.inf, False)
        assert chosen(lambda outputs: jnp.full(outputs.shape[:2], jnp.nan))[:2] == (0, 0)

    @pytest.mark.parametrize(
        "criterion",
        [diagnostics.lowest_entropy(floor=1.9), diagnostics.largest_change(threshold=1)],
    )
    def test_an_instance_without_a_prediction_decides_nothing(self, criterion):
        """Three of the instances, beside one whose input is nan: the choice and score of three."""
        four = damaged(MAP, np.s_[:, :, 3])
        assert chosen(criterion, four) == chosen(criterion, MAP[:, :, :3])
        assert chosen(criterion, four)[3]
        # An entry that makes a nan of a prediction that there was is out.
        rate, steps = chosen(criterion)[:2]
        assert chosen(criterion, damaged(MAP, (rate, steps, 1)))[:2] != (rate, steps)

    def test_ties_go_to_the_fewest_steps(self):
        scores = jnp.array([[0.0, 0.0, 5.0], [0.0, 5.0, 1.0]])
        assert chosen(lambda outputs: scores)[:3] == (1, 1, 5.0)
        assert chosen(lambda outputs: jnp.zeros((2, 3)))[:2] == (0, 0)

    def test_a_threshold_may_be_traced(self):
        def steps(floor):
            criterion = diagnostics.lowest_entropy(floor=floor)
            return diagnostics.select_label_free(MAP, criterion=criterion).rate_index

        found = quickly(jax.vmap(steps), np.array([1.0, 1.9], np.float32))
        np.testing.assert_array_equal(found, [1, 0])

    def test_the_oracle_chooses_with_labels_and_says_so(self):
        select_entry = jax.jit(diagnostics.oracle_select)
        found = select_entry(MAP, np.array([0, 0, 1, 0]))
        assert all(name.startswith("oracle_") for name in found._fields)
        assert tuple(map(float, found)) == (1, 1, 1.0)  # [1, 1] predicts 0, 0, 1, 0
        assert select_entry(MAP, np.array([0, 0, 1, 1])).oracle_num_steps == 0

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"\[L, S \+ 1, N, C\].*\(3, 4, 2\).*moveaxis"):
            diagnostics.select_label_free(MAP[0], criterion=diagnostics.lowest_entropy(floor=1))
        with pytest.raises(ValueError, match=r"score per entry, shape \(2, 3\); got \(2,\)"):
            diagnostics.select_label_free(MAP, criterion=lambda outputs: jnp.ones(2))
        with pytest.raises(ValueError, match=r"oracle_select needs one integer label.*\(4,\)"):
            diagnostics.oracle_select(MAP, jnp.array([0]))
