"""TTT++ as a method: its distances are in units of the source's scatter; the stream is its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ttt_jax as ttt
from experiments import methods, problem
from experiments.methods import contrastive
from tests.core import golden
from tests.experiments import tiny_config, tiny_model
from tests.experiments.test_batch_methods import Lab, close
from ttt_jax import data

OPTIONS = {"learning_rate": 0.05, "queue": 30, "count": 50, "select": "params/(encoder|bn)/.*"}


def published(source, features, between):
    """The distance as vita-epfl/ttt-plus-plus measures and weighs it, in NumPy."""

    def coral(a, b):
        return np.square(a - b).sum() / (4 * len(a) ** 2)

    cov, mu = np.cov(source.T), source.mean(axis=0)
    corals = [coral(np.cov(a.T), np.cov(b.T)) for a, b in between]
    means = [np.square(a.mean(axis=0) - b.mean(axis=0)).mean() for a, b in between]
    of_mean = np.square(mu - features.mean(axis=0)).mean()
    return coral(cov, np.cov(features.T)) / np.mean(corals) + 0.5 * of_mean / np.mean(means)


@pytest.mark.parametrize("kind", ["mean", "covariance"])
def test_the_distance_is_the_published_one(kind):
    rng = np.random.default_rng(0)
    root, mean = rng.normal(size=(8, 8)) / 3, rng.normal(size=8)

    def draw(count):
        return mean + rng.normal(size=(count, 8)) @ root.T

    source = draw(40_000)
    moments = {"mean": jnp.array(source.mean(axis=0)), "outer": jnp.array(source.T @ source / 4e4)}
    loss = contrastive.matching(lambda params, x: x, moments, queue=350, count=400)
    value = jax.jit(lambda memory, x: loss.value(0.0, memory, x, jax.random.key(0)))
    features = draw(400)
    features = features + 0.5 if kind == "mean" else mean + 2 * (features - mean)
    # The authors compare one first set with all others; pairs vary less.
    expected = published(source, features, [(draw(400), draw(400)) for _ in range(400)])
    # 350 come before the batch of 50, through the queue.
    memory = loss.init(0.0)
    for part in np.split(features, 8):
        found, memory = value(memory, part)
        memory = loss.after(0.0, memory)
    assert found == pytest.approx(expected, rel=0.08)


def test_as_many_source_images_are_three_quarters_away():
    rng = np.random.default_rng(0)
    root = np.array([[1.0, 0.0, 0.0], [0.5, 2.0, 0.0], [0.0, -1.0, 0.5]])
    mean = np.array([1.0, -2.0, 0.5])
    moments = {"mean": jnp.array(mean), "outer": jnp.array(root @ root.T + np.outer(mean, mean))}
    loss = contrastive.matching(lambda params, x: x, moments, queue=50, count=50)
    value = jax.jit(lambda x: loss.value(0.0, loss.init(0.0), x, jax.random.key(0))[0])
    # Of 50 images with an empty queue; 400 draws of a mean with a deviation of about 0.4.
    drawn = [value(mean + rng.normal(size=(50, 3)) @ root.T) for _ in range(400)]
    assert np.mean(drawn) == pytest.approx(0.75, abs=0.08)


def get_config():
    config = tiny_config.with_methods(tiny_config.get_batch_norm_config(), ttt_plus=OPTIONS)
    # Two batches of one size: one program.
    config.data.test = "test[:40]"
    config.model.projection = 5
    return config


def images_of(lab):
    return np.concatenate([batch.image for batch in lab.batches])


def batch_normalized(p, images):
    """``tiny_model`` up to its features, with the statistics of the batch, in NumPy."""
    flat = (np.asarray(images, np.float64).reshape(len(images), -1) - 0.5) / 0.5
    rows, _ = golden.standardize(golden.dense(p, "encoder", flat))
    return np.maximum(rows * p["bn/scale"] + p["bn/bias"], 0)


def at_both_places(p, images):
    features = batch_normalized(p, images)
    return [features, golden.dense(p, "projection_out", features)]


def nt_xent(vectors, temperature):
    """The mean over all views of the cross-entropy to the other view of the image."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    powers = np.exp(unit @ unit.T / temperature) * (1 - np.eye(len(unit)))
    places = np.arange(len(unit))
    return -np.log(powers[places, places ^ 1] / powers.sum(axis=1)).mean()


def in_units_of_the_source(rows, mean, covariance, count):
    """Both distances over what they are between two sets of normal source features."""
    width, trace = len(mean), np.trace(covariance)
    coral = np.square(np.cov(rows.T) - covariance).sum() / (4 * width**2)
    off = np.square(rows.mean(axis=0) - mean).mean()
    of_coral = 2 * (np.square(covariance).sum() + trace**2) / (count - 1) / (4 * width**2)
    return coral / of_coral + 0.5 * off / (2 * trace / (count * width))


def views_of(batch):
    """The two views of each image of a batch that the loss draws."""
    seen = []

    def apply(params, images):
        seen.append(images)
        return images.reshape(len(images), -1)

    key = jax.random.fold_in(ttt.sample_keys(jax.random.key(0), batch.id)[0], 0)
    # It is the first of the terms.
    ttt.losses.contrastive(apply, ttt.views.image.simclr(), batch=True)(
        None, batch.image, jax.random.fold_in(key, 0)
    )
    return seen[0]


def test_the_stream_by_its_formulas(tmp_path, monkeypatch):
    """Two batches in NumPy: all three terms, the queues, momentum on central differences."""
    tiny_model.install(monkeypatch)
    lab = Lab(get_config(), tmp_path)
    p = golden.flat(lab.pristine.restore("memory")["params"])
    fast = ("encoder/kernel", "encoder/bias", "bn/scale", "bn/bias")
    train = problem.load_data(lab.config, "train")
    order = data.streams.shuffled(train, seed=0).index
    images = np.stack([train[int(index)].image for index in order])
    parts = [at_both_places(p, images[n : n + 500]) for n in range(0, len(images), 500)]
    sources = [np.concatenate(rows) for rows in zip(*parts, strict=True)]
    moments = [(rows.mean(axis=0), np.cov(rows.T, ddof=0)) for rows in sources]

    def loss(p, views, images, queues):
        value = 0.5 / 0.07 * nt_xent(at_both_places(p, views)[1], 0.5)
        found = at_both_places(p, images)
        for weight, queue, rows, source in zip((0.05, 0.2), queues, found, moments, strict=True):
            rows = np.concatenate([queue, rows])
            value += weight * in_units_of_the_source(rows, *source, count=50)
        return value, None

    optimizer, expected = golden.SGD(0.05, momentum=0.9), []
    queues = [rows[:0] for rows in sources]
    for batch in lab.batches:
        slopes = golden.slopes(loss, p, fast, views_of(batch), batch.image, queues, width=1e-6)
        found = at_both_places(p, batch.image)
        queues = [np.concatenate(pair)[-30:] for pair in zip(queues, found, strict=True)]
        p = optimizer.step(p, slopes)
        expected.append(golden.dense(p, "fc", batch_normalized(p, batch.image)))
    logits = lab.run("ttt_plus").logits
    close(logits, np.concatenate(expected))
    unadapted = lab.plain.model("batch").classify(lab.pristine.restore("memory"), images_of(lab))
    assert np.abs(logits - unadapted).max() > 1e-2


def test_impossible_options_are_refused(monkeypatch):
    tiny_model.install(monkeypatch)
    config = get_config()
    source = problem.load_data(config, "test")

    def build():
        plain = problem.build(config, source)
        return methods.build(config, plain, plain)

    (settings,) = build()["ttt_plus"].grid
    assert settings["head_weight"] == 0.2 and settings["predict"] == "after"
    config.methods.ttt_plus.queue = 1
    with pytest.raises(
        ValueError, match=r"methods\.ttt_plus: queue and count must be .* queue=1, count=50"
    ):
        build()
    config.model.projection = 0
    with pytest.raises(ValueError, match=r"methods\.ttt_plus needs a model with a projection"):
        build()
