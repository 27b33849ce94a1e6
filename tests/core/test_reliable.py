"""The filters of EATA and SAR and their whole steps, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from ttt_jax import losses, methods

from .compiling import quickly
from .streaming import scanned

KEY = jax.random.key(3)
EVERYTHING = ttt.select.everything()
RNG = np.random.default_rng(0)
# Three batches of four instances with three features, and a linear model over three classes.
XS = RNG.normal(size=(3, 4, 3)).astype(np.float32)
PARAMS = {"w": RNG.normal(size=(3, 3)).astype(np.float32), "b": np.zeros(3, np.float32)}


def linear(params, inputs):
    return inputs @ params["w"] + params["b"][None]


def identity(params, inputs):
    return inputs * params


def probabilities(logits):
    logits = np.asarray(logits, np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def entropies(logits):
    p = probabilities(logits)
    return -(p * np.log(p)).sum(-1)


def logits_of(p):
    """Logits whose softmax is p."""
    return np.log(np.asarray(p, np.float32))


def theta_of(params):
    return np.concatenate([np.asarray(params["b"]), np.asarray(params["w"]).ravel()])


def forward(theta, x):
    return np.asarray(x, np.float64) @ theta[3:].reshape(3, 3) + theta[:3]


def slope(function, theta, step=1e-6):
    """Central differences."""
    steps = step * np.eye(len(theta))
    return np.array([(function(theta + s) - function(theta - s)) / (2 * step) for s in steps])


class TestReliableEntropy:
    P = np.array([[0.7, 0.2, 0.1], [0.92, 0.04, 0.04], [1 / 3] * 3, [0.8, 0.1, 0.1]])

    # E0 in nats: 0.3296, 0.6592, 0.8789.
    @pytest.mark.parametrize(
        ("margin", "expected"),
        [
            (0.3, 0.0),
            (0.6, (0.33422 + 0.63903) / 2),
            (0.8, (0.80182 + 0.33422 + 0.63903) / 3),
        ],
    )
    def test_by_hand(self, margin, expected):
        assert entropies(np.log(self.P)) == pytest.approx(
            [0.80182, 0.33422, 1.09861, 0.63903], 1e-4
        )
        loss = losses.reliable_entropy(identity, margin=margin, batch=True)
        value = quickly(loss, 1.0, logits_of(self.P), KEY)
        np.testing.assert_allclose(value, expected, rtol=1e-4)

    def test_the_published_margin(self):
        """E0 = 0.4 ln 3 = 0.4394: the second instance alone."""
        loss = losses.reliable_entropy(identity, batch=True)
        np.testing.assert_allclose(quickly(loss, 1.0, logits_of(self.P), KEY), 0.33422, rtol=1e-4)

    def test_one_instance(self):
        loss = losses.reliable_entropy(identity)
        values = quickly(jax.vmap(loss, (None, 0, None)), 1.0, logits_of(self.P), KEY)
        np.testing.assert_allclose(values, [0, 0.33422, 0, 0], rtol=1e-4)

    def test_no_reliable_instance_has_a_gradient_of_exactly_zero(self):
        loss = losses.reliable_entropy(identity, margin=0.1, batch=True)
        assert quickly(jax.value_and_grad(loss), 1.0, logits_of(self.P), KEY) == (0, 0)

    def test_reference(self):
        """Sharpened, the first and the last are reliable too, but not under the reference."""
        logits = logits_of(self.P)
        sharp = losses.reliable_entropy(identity, batch=True)
        both = losses.reliable_entropy(identity, reference=1.0, batch=True)
        found = entropies(3 * logits)
        assert (found < 0.4 * np.log(3)).tolist() == [True, True, False, True]
        np.testing.assert_allclose(
            quickly(sharp, 3.0, logits, KEY), found[[0, 1, 3]].mean(), rtol=1e-4
        )
        np.testing.assert_allclose(quickly(both, 3.0, logits, KEY), found[1], rtol=1e-4)

    def test_the_reference_is_a_constant(self):
        def value(params, reference):
            loss = losses.reliable_entropy(identity, reference=reference, batch=True)
            return loss(params, logits_of(self.P), KEY)

        assert quickly(jax.grad(value, argnums=1), 3.0, 1.0) == 0


def eata(logits, average, *, epsilon, e0, decay=0.9):
    """Value, instances taken and new average of one batch, by the published rules."""
    p, entropy = probabilities(logits), entropies(logits)
    taken = entropy < e0
    if average is not None:
        cosine = p @ average / np.linalg.norm(p, axis=-1) / np.linalg.norm(average)
        taken &= cosine < epsilon
    if not taken.any():
        return 0.0, taken, average
    value = (np.exp(e0 - entropy) * entropy)[taken].mean()
    new = p[taken].mean(0)
    return value, taken, new if average is None else decay * average + (1 - decay) * new


class TestSampleAdaptiveEntropy:
    # Sure of class 0, of 0, of 1, and unsure.
    P = np.array([[0.96, 0.02, 0.02], [0.92, 0.04, 0.04], [0.03, 0.94, 0.03], [0.4, 0.3, 0.3]])

    def loss(self, **options):
        options = {"num_classes": 3, "epsilon": 0.4, "batch": True} | options
        return losses.sample_adaptive_entropy(identity, **options)

    def test_by_hand(self):
        """The first batch has one class, the second takes the other class alone."""
        loss = self.loss()

        def run(first, second):
            memory = loss.init(1.0)
            one, memory = loss.value(1.0, memory, first, KEY)
            two, after = loss.value(1.0, memory, second, KEY)
            return one, memory, two, after

        one, memory, two, after = quickly(run, logits_of(self.P[[0, 1, 3]]), logits_of(self.P))
        # E0 = 0.4 ln 3 = 0.43944; H = 0.19567, 0.33422, (1.0889), 0.26855.
        # Weights exp(E0 - H) = 1.27604, 1.11096, and 1.18636 for the second class.
        np.testing.assert_allclose(one, (1.27604 * 0.19567 + 1.11096 * 0.33422) / 2, rtol=1e-4)
        np.testing.assert_allclose(memory["probability"], [0.94, 0.03, 0.03], rtol=1e-5)
        np.testing.assert_allclose(two, 1.18636 * 0.26855, rtol=1e-4)
        np.testing.assert_allclose(after["probability"], [0.849, 0.121, 0.03], rtol=1e-5)
        assert bool(after["started"])

    def test_none_taken_leaves_the_average(self):
        loss = self.loss()
        unsure = logits_of(self.P[[3]])
        value, memory = quickly(loss.value, 1.0, loss.init(1.0), unsure, KEY)
        assert value == 0 and not memory["started"] and (memory["probability"] == 0).all()
        held = {"probability": jnp.array([0.5, 0.2, 0.3]), "started": jnp.array(True)}
        gradient, kept = quickly(
            jax.grad(loss.value, has_aux=True), 1.0, held, logits_of(self.P[[0, 3]]), KEY
        )
        assert gradient == 0 and kept["started"]
        np.testing.assert_array_equal(kept["probability"], held["probability"])

    def test_weights_are_constants_of_the_gradient(self):
        loss, logits = self.loss(), logits_of(self.P)
        gradient, _ = quickly(jax.grad(loss.value, has_aux=True), 1.1, loss.init(1.0), logits, KEY)
        logits = logits.astype(np.float64)
        entropy = entropies(1.1 * logits)
        weights = np.where(entropy < 0.4 * np.log(3), np.exp(0.4 * np.log(3) - entropy), 0)
        assert (weights > 0).sum() == 3
        expected = (
            weights @ (entropies((1.1 + 1e-6) * logits) - entropies((1.1 - 1e-6) * logits)) / 2e-6
        )
        np.testing.assert_allclose(gradient, expected / 3, rtol=1e-3)

    def test_one_instance_form(self):
        """A stream of single predictions is a stream of batches of one."""
        loss, lifted = self.loss(batch=False), self.loss()

        def run(first, second):
            results = []
            for form, wrap in ((loss, lambda x: x), (lifted, lambda x: x[None])):
                _, memory = form.value(1.0, form.init(1.0), wrap(first), KEY)
                results.append(form.value(1.0, memory, wrap(second), KEY))
            return results

        one, batch = quickly(run, logits_of(self.P[0]), logits_of(self.P[2]))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, batch)
        assert one[0] > 0

    def test_hyper_parameters_may_be_traced(self):
        def value(epsilon, margin):
            loss = self.loss(epsilon=epsilon, margin=margin)
            _, memory = loss.value(1.0, loss.init(1.0), logits_of(self.P[[0]]), KEY)
            return loss.value(1.0, memory, logits_of(self.P), KEY)[0]

        values = quickly(jax.vmap(value), np.array([0.4, 1.1]), np.array([0.4, 0.2]))
        assert values[0] > values[1] > 0

    @pytest.mark.parametrize("classes", [1, 3.0, None])
    def test_number_of_classes(self, classes):
        with pytest.raises(ValueError, match=rf"num_classes .* at least 2, got {classes}"):
            self.loss(num_classes=classes)

    @pytest.mark.parametrize(
        ("shape", "words"), [((4, 5), r"\[4, \.\.\., 3\]; got \(4, 5\)"), ((4, 2, 3), r"\[N, C\]")]
    )
    def test_shape_of_logits(self, shape, words):
        loss = self.loss()
        with pytest.raises(ValueError, match=f"sample_adaptive_entropy.*{words}"):
            jax.eval_shape(loss.value, 1.0, loss.init(1.0), np.ones(shape, np.float32), KEY)


def test_eata_is_its_formula_step_by_step():
    """Filters, weights, moving average, Fisher penalty and momentum over three batches."""
    e0, epsilon, beta, rate, momentum = 0.8 * np.log(3), 0.8, 0.7, 0.3, 0.9
    fisher = jax.tree.map(lambda leaf: np.abs(leaf) + 0.1, PARAMS)
    stream = methods.eata(
        linear,
        num_classes=3,
        epsilon=epsilon,
        fisher_weight=beta,
        margin=0.8,
        optimizer=optax.sgd(rate, momentum=momentum),
        select=EVERYTHING,
    ).build(fisher)
    keys = ttt.sample_keys(KEY, np.arange(3))
    carry, (outputs, infos), _ = quickly(lambda p: scanned(stream, p, XS, keys), PARAMS)

    theta, weights = theta_of(PARAMS).astype(np.float64), theta_of(fisher)
    pristine, velocity, average, numbers = theta.copy(), np.zeros(12), None, []
    for step, x in enumerate(XS):
        np.testing.assert_allclose(outputs[step], forward(theta, x), rtol=1e-3, atol=1e-4)
        here = theta
        value, taken, average = eata(forward(here, x), average, epsilon=epsilon, e0=e0)
        coefficient = np.exp(e0 - entropies(forward(here, x)))[taken]
        numbers.append(int(taken.sum()))
        penalty = beta * (weights * (theta - pristine) ** 2).sum()
        np.testing.assert_allclose(infos.loss[step, 0], value + penalty, rtol=1e-3)

        def objective(t, x=x, taken=taken, coefficient=coefficient):
            entropy = entropies(forward(t, x))[taken]
            return (coefficient * entropy).mean() + beta * (weights * (t - pristine) ** 2).sum()

        velocity = momentum * velocity + slope(objective, theta)
        theta = theta - rate * velocity
    np.testing.assert_allclose(theta_of(carry.state.fast), theta, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(carry.state.memory["probability"], average, rtol=1e-3)
    # The filters did something: not all were taken, and some were at every step.
    assert sum(numbers) < 12 and min(numbers) > 0


def sar_stream(rate, rho, margin, reset_below=0.0):
    return methods.sar(
        linear,
        margin=margin,
        rho=rho,
        reset_below=reset_below,
        optimizer=optax.sgd(rate),
        select=EVERYTHING,
    )


def sar(theta, x, *, rate, rho, e0):
    """``(theta, loss at the peak, kept at the peak, reliable at the peak)``."""
    first = entropies(forward(theta, x)) < e0
    ascent = slope(lambda t: entropies(forward(t, x))[first].mean(), theta)
    peak = theta + rho * ascent / np.linalg.norm(ascent)
    second = entropies(forward(peak, x)) < e0
    kept = first & second
    descent = slope(lambda t: entropies(forward(t, x))[kept].mean(), peak)
    return theta - rate * descent, entropies(forward(peak, x))[kept].mean(), kept, second


def one_step(stream, x):
    carry, (_, info) = quickly(lambda p: stream.step(p, stream.init(p), x, KEY), PARAMS)
    return carry.state, info


class TestSAR:
    def test_step(self):
        """With a large radius the two filters differ, and only what both keep counts."""
        x, theta = XS.reshape(12, 3), theta_of(PARAMS).astype(np.float64)
        rate, rho, margin = 0.5, 0.6, 0.8
        expected, value, kept, second = sar(theta, x, rate=rate, rho=rho, e0=margin * np.log(3))
        first = entropies(forward(theta, x)) < margin * np.log(3)
        assert 0 < kept.sum() < min(first.sum(), second.sum())
        state, info = one_step(sar_stream(rate, rho, margin), x)
        np.testing.assert_allclose(theta_of(state.fast), expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(info.loss[0], value, rtol=1e-3)

    def test_no_reliable_sample_no_step(self):
        state, info = one_step(sar_stream(0.5, 0.05, 0.001, reset_below=np.inf), XS[0])
        np.testing.assert_array_equal(theta_of(state.fast), theta_of(PARAMS))
        assert info.ok and not info.reset and state.count == 0

    def test_recovers_by_the_moving_average_of_the_loss_at_the_peak(self):
        """Batches grow surer; the average starts at the first loss and anew after a reset."""
        rate, rho, margin, threshold = 0.02, 0.05, 0.9, 0.45
        # Zeros are of the largest entropy: none is reliable, and the average must not see a 0.
        xs = np.stack([XS[0] * scale for scale in (1, 2, 4, 0, 8, 8, 8, 8, 8, 1, 1)])
        stream = sar_stream(rate, rho, margin, threshold)
        keys = ttt.sample_keys(KEY, np.arange(len(xs)))
        carry, (_, infos), _ = quickly(lambda p: scanned(stream, p, xs, keys), PARAMS)

        pristine = theta_of(PARAMS).astype(np.float64)
        theta, average, fired = pristine, None, []
        for x in xs:
            if not x.any():
                fired.append(False)
                continue
            theta, value, _, _ = sar(theta, x, rate=rate, rho=rho, e0=margin * np.log(3))
            average = value if average is None else 0.9 * average + 0.1 * value
            fired.append(bool(average < threshold))
            if fired[-1]:
                theta, average = pristine, None
        assert fired.index(True) == 7 and sum(fired) == 2
        np.testing.assert_array_equal(infos.reset, fired)
        np.testing.assert_allclose(theta_of(carry.state.fast), theta, rtol=1e-3, atol=1e-4)
