"""RDumb against NumPy in float64: filters, weights, moving average, resets."""

import numpy as np
import optax

from ttt_jax import methods, resets

from . import linear_model as lab

MARGIN, EPSILON, RATE, MOMENTUM = 0.9, 0.95, 0.4, 0.9


def step(theta, batch, average):
    """``(value, slope, average, number taken)``; the loss is that of EATA without its penalty."""
    limit = MARGIN * np.log(lab.CLASSES)
    logits = lab.forward(theta, batch)
    p, entropy = lab.probabilities(logits), lab.entropies(logits)
    taken = entropy < limit
    if average is not None:
        cosine = p @ average / np.linalg.norm(p, axis=1) / np.linalg.norm(average)
        taken &= cosine < EPSILON
    weights = np.where(taken, np.exp(limit - entropy), 0)

    def loss(theta):
        return (weights * lab.entropies(lab.forward(theta, batch))).sum() / max(taken.sum(), 1)

    if taken.any():
        new = p[taken].mean(axis=0)
        average = new if average is None else 0.9 * average + 0.1 * new
    return loss(theta), lab.slope(loss, theta), average, taken.sum()


def test_stream():
    outputs, infos, carries = lab.run(
        methods.rdumb(
            lab.classify,
            num_classes=lab.CLASSES,
            epsilon=EPSILON,
            margin=MARGIN,
            optimizer=optax.sgd(RATE, momentum=MOMENTUM),
            select=lab.EVERYTHING,
            reset=resets.every(2),
        )
    )
    pristine = lab.theta_of(lab.PARAMS)
    numbers = []
    for i, batch in enumerate(lab.BATCHES):
        if i % 2 == 0:
            theta, velocity, average = pristine, 0.0, None
        lab.close(outputs[i], lab.forward(theta, batch))
        value, gradient, average, number = step(theta, batch, average)
        lab.close(infos.loss[i, 0], value)
        numbers.append(number)
        velocity = MOMENTUM * velocity + gradient
        theta = theta - RATE * velocity
        if i % 2 == 0:
            fast = {name: leaf[i] for name, leaf in carries.state.fast.items()}
            lab.close(lab.theta_of(fast), theta)
            lab.close(carries.state.memory["probability"][i], average)
            assert np.abs(theta - pristine).max() > 0.01
    assert infos.reset.tolist() == [False, True, False, True]
    assert 0 < min(numbers) and sum(numbers) < lab.N * lab.SIZE
