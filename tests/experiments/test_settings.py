"""From names of a config to optimizers, selections and methods; what there is not is refused."""

import math

import jax
import pytest

import ttt_jax as ttt
from experiments import pristine, settings
from experiments.tasks import images
from tests.experiments import tiny_config, tiny_model

CHOSEN = {
    "all": lambda path: True,
    "norm": lambda path: "/norm" in path,
    "biases": lambda path: path.endswith("/bias"),
    r".*encoder/block_0/.*": lambda path: "encoder/block_0/" in path,
}


@pytest.fixture(scope="module")
def task():
    return images.task(tiny_config.get_config())


@pytest.mark.parametrize("select", CHOSEN)
def test_a_selection_and_its_counts(task, select):
    shapes = pristine.layout(task)
    leaves = jax.tree_util.tree_flatten_with_path(shapes["params"])[0]
    sizes = {
        "params/" + jax.tree_util.keystr(path, simple=True, separator="/"): math.prod(leaf.shape)
        for path, leaf in leaves
    }
    expected = {path for path in sizes if CHOSEN[select](path)}
    assert set(ttt.select.describe(settings.selection(select), shapes).paths) == expected
    found = settings.parameter_counts(settings.selection(select), shapes)
    total = sum(sizes.values())
    adapted = sum(sizes[path] for path in expected)
    assert found == {"adapted_parameters": adapted, "total_parameters": total}
    found = settings.parameter_counts(None, shapes)
    assert found == {"adapted_parameters": 0, "total_parameters": total}


def test_labels_side_by_side(task):
    """One config may report the same steps on several subsets, each under a label of its own."""
    rotation = {"method": "ttt_rotation", "copies": 2, "num_steps": 3}
    rotation |= {"learning_rate": (0.01, 0.1)}
    config = tiny_config.with_methods(
        tiny_config.get_config(),
        rotation={**rotation, "select": "all"},
        rotation_norm={**rotation, "select": "norm"},
    )
    found = settings.candidates(config, task)
    assert {label: len(grid) for label, grid in found.items()} == dict.fromkeys(config.methods, 2)
    for label, grid in found.items():
        assert [c.settings["select"] for c in grid] == [config.methods[label].select] * 2
        assert {c.scope for c in grid} == {"per_sample"} and grid[0].facts["num_steps"] == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "rotate"}, r"methods\.m: method must be a function of .*got 'rotate'.*memo"),
        ({"method": "no.such:thing"}, r"methods\.m: method must be PACKAGE.MODULE:NAME.*no\.such"),
        ({"method": "memo", "copis": 2}, r"methods\.m: 'copis' is no setting of memo; choose"),
        ({"method": "memo", "learning_rate": ()}, r"methods\.m: learning_rate lists no candidate"),
        ({"method": "ttt_plus_plus", "learning_rate": 0.1}, r"methods\.m: .*needs 'project'"),
        ({"method": "memo", "momentum": 0.9, "optimizer": "sgd"}, ""),
        (
            {"method": "memo", "learning_rate": 0.1, "optimizer": "adma"},
            r"methods\.m: optimizer must be 'sgd'.*got 'adma'",
        ),
        ({"method": "memo", "serve": "some"}, r"serve must be 'plain' or 'every_view'; got 'some'"),
        ({"method": "memo", "probe": "mea"}, r"probe must be one of .*; got 'mea'"),
        (
            {"method": "memo", "augment": "augmx"},
            r"methods\.m: memo needs 'augmx'; .* has .*augmix",
        ),
    ],
)
def test_what_there_is_not_is_one_sentence(task, options, words):
    config = tiny_config.with_methods(tiny_config.get_config(), m=options)
    if not words:
        assert settings.candidates(config, task)["m"]
        return
    with pytest.raises(ValueError, match=words):
        settings.candidates(config, task)


def test_a_function_of_a_user_is_a_method(task):
    path = "ttt_jax.methods:source"
    config = tiny_config.with_methods(tiny_config.get_config(), m={"method": path})
    (candidate,) = settings.candidates(config, task)["m"]
    assert (candidate.label, candidate.scope) == ("m", "per_sample")


@pytest.mark.parametrize(("rim", "value"), [("black", 0.0), ("edge", 1.0)])
def test_views_of_a_config_have_its_rim(rim, value):
    config = tiny_config.get_config()
    config.views.rim = rim
    made = images.ImageModel(config, images.load_data(config, "test"))
    white = jax.numpy.ones(made.image_shape)
    assert made.every_view(white)[0][0].max() == value
    drawn = jax.vmap(made.view, (None, 0))(white, jax.random.split(jax.random.key(0), 50))
    assert drawn.min() == value


def test_another_rim_is_named():
    config = tiny_config.get_config()
    config.views.rim = "white"
    with pytest.raises(ValueError, match=r"rim must be one of .*edge.*got 'white'"):
        images.task(config)


def test_a_measured_method_knows_its_scope_before_it_measures(monkeypatch):
    tiny_model.install(monkeypatch)
    config = tiny_config.with_methods(
        tiny_config.get_batch_norm_config(), eata={"learning_rate": 0.01}
    )
    (candidate,) = settings.candidates(config, images.task(config))["eata"]
    assert candidate.scope == "stream" and candidate.facts["predict"] == "before"
    # What is left out is the method's own: the affine parameters of norms.
    shapes = pristine.layout(images.task(config))
    chosen = ttt.select.describe(candidate.select, shapes).paths
    assert chosen and all("bn" in path for path in chosen)


def test_statistics_of_a_batch_need_a_model_that_has_them():
    config = tiny_config.with_methods(tiny_config.get_config(), bn_adapt={})
    with pytest.raises(
        ValueError, match=r"methods.bn_adapt: bn_adapt needs a model with BatchNorm"
    ):
        settings.candidates(config, images.task(config))
