"""Meta-learned beside joint training: the outer loss by hand, what is chosen, and the program."""

import io
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from benchmarks import meta_images, meta_learning, meta_training
from benchmarks.meta_images import mask_of, masked
from benchmarks.meta_training import Place
from experiments import launch
from tests.core.compiling import quickly

pytest.importorskip("qwix", reason="low-rank adaptation needs qwix")

SETTINGS = {
    "data": "digits",
    "pack": "",
    "trainings": meta_learning.TRAININGS,
    "num_steps": 1,
    "outer_rate": 1e-3,
    "views": 2,
    "severity": 5,
    "outer_chunk": 0,
    "seconds": 0,
    "smoke": True,
    **meta_learning.SMOKE,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The settings, the images and the network of the smoke run."""
    folder = str(tmp_path_factory.mktemp("tfds"))
    settings = ml_collections.ConfigDict(SETTINGS | {"pack": folder})
    config = meta_images.config_of(settings)
    test, split = meta_images.split_of(config, settings)
    return settings, split, meta_images.network(config, test, settings.views)


def test_shifts_and_images_of_the_roles_are_apart(small):
    settings, split, _ = small
    names = [set(meta_images.TRAINED), set(split.validation), set(split.reported)]
    assert sum(map(len, names)) == len(set.union(*names)) == 19
    held = {each for images in split.validation.values() for each in images.id.tolist()}
    assert not held & set(split.training.id.tolist()) and len(held) == settings.validation_images
    # Each image as it is, and once more.
    assert len(split.training.label) == 2 * settings.train_images


def test_a_mask_is_its_selection():
    params = {"w": jnp.arange(3.0), "scale": jnp.ones(2)}
    select = ttt.select.paths("scale")
    loss = lambda params, x, key: ((params["w"].sum() + params["scale"]) ** 2).sum()  # noqa: E731

    def adapted(select):
        adapter = ttt.gradient_adapter(loss, optax.sgd(0.1), select=select)
        state, _ = ttt.inner_loop(adapter, 2)(params, adapter.init(params), 0, jax.random.key(0))
        return adapter.merge(params, state)

    due, actual = quickly(lambda: (adapted(select), adapted(masked(mask_of(select, params)))))
    jax.tree.map(np.testing.assert_array_equal, actual, due)


@pytest.mark.parametrize("training", meta_learning.TRAININGS)
def test_the_outer_loss_and_its_gradient_are_those_by_hand(small, training):
    _, split, net = small
    run = meta_training.runs_of(net, [Place("norms", 0, 0.2)])
    run = jax.tree.map(lambda leaf: leaf[0], run)
    x = {"image": split.training.image[0] / np.float32(255), "label": split.training.label[0]}

    def entropy(params):
        logits = net.classify(params, x["image"][None])[0]
        return jax.nn.logsumexp(logits) - logits[x["label"]]

    def auxiliary(params):
        return net.losses["rotation"](params, x["image"], jax.random.key(5))

    def by_hand(params):
        gradient = jax.grad(auxiliary)(params)
        if training == "first":
            gradient = jax.lax.stop_gradient(gradient)
        adapted = jax.tree.map(lambda p, g, kept: p - 0.2 * kept * g, params, gradient, run.mask)
        return entropy(params if training == "joint" else adapted) + auxiliary(params)

    outer = meta_training.outer_loss(net, "rotation", training, 1, run)
    (value, gradient), due = quickly(
        lambda params: (
            jax.value_and_grad(lambda p: outer(p, x, jax.random.key(0)))(params),
            jax.value_and_grad(by_hand)(params),
        ),
        net.init(jax.random.key(1)),
    )
    assert float(value) == pytest.approx(float(due[0]), rel=1e-5)
    for leaf, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(due[1]), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-3, atol=1e-5)


def test_factors_are_trained_only_where_they_adapt(small):
    _, _, net = small
    runs = meta_training.runs_of(net, [Place(name, 0, 0.1) for name in ("norms", "low rank")])
    factors = net.masks["low rank"]
    for kept, factor in zip(jax.tree.leaves(runs.trained), jax.tree.leaves(factors), strict=True):
        assert kept.tolist() == [not factor, True]


def test_rates_are_chosen_over_seeds_on_validation():
    settings = ml_collections.ConfigDict({"selections": ("all", "norms"), "rates": ("0.1", "1")})
    given = [
        (index, Place(name, seed, rate))
        for index, (name, rate, seed) in enumerate(
            (name, rate, seed)
            for name in ("all", "norms")
            for rate in (0.3, 0.5)
            for seed in (0, 1)
        )
    ]
    right = np.zeros((8, 2, 4), bool)
    right[0, 0] = True  # the best of one seed, the other has none
    right[2:4, 1, :3] = True
    right[4:6, 0, 0] = True
    actual = meta_learning.chosen(right, given, settings)
    assert [actual["all"][k] for k in ("train_rate", "rate", "rows")] == [0.5, 1.0, [2, 3]]
    assert [actual["norms"][k] for k in ("train_rate", "rate", "rows")] == [0.3, 0.1, [4, 5]]
    assert actual["all"]["candidates"][3]["validation"] == 0.75


def test_the_gain_is_paired():
    joint, after = np.zeros((2, 3, 50)), np.zeros((2, 3, 50))
    after[:, :, :10] = 1
    joint[1, :, 40:] = 1
    actual = meta_learning.gain(after, joint)
    assert actual["gain"] == pytest.approx(0.1)
    assert actual["by_seed"] == pytest.approx([0.2, 0.0])
    low, high = actual["interval"]
    assert -0.05 < low < 0.1 < high < 0.25


def test_the_program(small, tmp_path, capsys):
    path = tmp_path / "meta.json"
    settings = small[0].copy_and_resolve_references()
    settings.trainings = ("joint", "full")
    record = meta_learning.run(str(path), settings)
    assert json.loads(path.read_text())["rows"] == record["rows"]
    rows = {row["training"]: row for row in record["rows"]}
    assert list(rows) == ["joint", "full"]
    for row in rows.values():
        assert len(row["before"]) == 1 and len(row["shifts"]) == 10
        assert row["by_step"] == pytest.approx([row["before"][0], row["after"][0]])
    change = rows["full"]["after"][0] - rows["joint"]["after"][0]
    assert rows["full"]["over_joint"]["gain"] == pytest.approx(change)
    assert capsys.readouterr().out.splitlines()[-1].startswith("rotation  norms      full")
    with pytest.raises(launch.UserError):
        meta_learning.run(str(path), settings)


def test_packed_files_are_cut_at_random(tmp_path):
    """Rows of the packs are sorted by class; no image is in two parts."""
    pillow = pytest.importorskip("PIL.Image")
    for role, count in (("train", 40), ("test", 12)):
        pictures = []
        for shade in range(count):
            buffer = io.BytesIO()
            pillow.new("RGB", (32, 32), (5 * shade, 0, 0)).save(buffer, "JPEG")
            pictures.append(np.frombuffer(buffer.getvalue(), np.uint8))
        np.savez(
            tmp_path / f"{role}_jpegpack.npz",
            header=np.zeros(0, np.uint8),
            data=np.concatenate(pictures),
            offsets=np.cumsum([0, *map(len, pictures)]),
            labels=np.arange(count) * 10 // count,
            class_names=np.array(list("abcdefghij")),
        )
    changes = {"data": "cifar10", "pack": str(tmp_path), "train_images": 20}
    settings = ml_collections.ConfigDict(SETTINGS | changes)
    config = meta_images.config_of(settings)
    _, split = meta_images.split_of(config, settings)
    assert split.training.image.shape == (40, 32, 32, 3)
    held = set(split.validation["saturate"].id.tolist())
    assert len(held) == 8 and not held & set(split.training.id.tolist())
    assert len(set(np.asarray(split.training.label).tolist())) > 5
    settings.pack = str(tmp_path / "nowhere")
    with pytest.raises(launch.UserError, match=r"--pack must name the folder of train_jpegpack"):
        meta_images.config_of(settings)
