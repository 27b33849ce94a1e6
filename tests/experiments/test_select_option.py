"""The option ``select``: which parameters a method's steps change."""

import math

import jax
import pytest

import ttt_jax as ttt
from experiments import methods, problem
from experiments.methods import steps
from tests.experiments import tiny_config

CHOSEN = {
    "all": lambda path: True,
    "norm": lambda path: "/norm" in path,
    "biases": lambda path: path.endswith("/bias"),
    r".*encoder/block_0/.*": lambda path: "encoder/block_0/" in path,
}


@pytest.fixture(scope="module")
def built():
    config = tiny_config.get_config()
    return problem.build(config, problem.load_data(config, "test"))


@pytest.mark.parametrize("select", CHOSEN)
def test_the_fast_parameters(built, select):
    params = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape), problem.shapes(built))
    adapter = steps.adapter(lambda params, x, key: 0.0, {"select": select, "learning_rate": 0.1})
    everything = ttt.select.describe(ttt.select.everything(), params).paths
    expected = {path for path in everything if CHOSEN[select](path)}
    fast = adapter.init(params).fast
    found = {path for path, _ in jax.tree_util.tree_flatten_with_path(fast)[0]}
    assert {jax.tree_util.keystr(path, simple=True, separator="/") for path in found} == expected


@pytest.mark.parametrize("select", CHOSEN)
def test_counts(built, select):
    shapes = problem.shapes(built)
    leaves = jax.tree_util.tree_flatten_with_path(shapes["params"])[0]
    sizes = {
        "params/" + jax.tree_util.keystr(path, simple=True, separator="/"): math.prod(leaf.shape)
        for path, leaf in leaves
    }
    total = sum(sizes.values())
    adapted = sum(size for path, size in sizes.items() if CHOSEN[select](path))
    assert 0 < adapted <= total
    found = steps.parameter_counts({"select": select}, shapes)
    assert found == {"adapted_parameters": adapted, "total_parameters": total}
    found = steps.parameter_counts({"num_views": 4}, shapes)
    assert found == {"adapted_parameters": 0, "total_parameters": total}


def test_subsets_side_by_side(built):
    """One config may report the same steps on several subsets, each under a name of its own."""
    options = {"copies": 2, "num_steps": 3, "learning_rate": (0.01, 0.1)}
    config = tiny_config.with_methods(
        tiny_config.get_config(),
        rotation={**options, "select": "all"},
        rotation_norm={**options, "select": "norm"},
        rotation_biases={**options, "select": "biases"},
        rotation_blocks={**options, "select": r".*encoder/block_0/.*"},
    )
    found = methods.build(config, built, built)
    assert {name: len(method.grid) for name, method in found.items()} == dict.fromkeys(found, 2)
    assert [method.grid[0]["select"] for method in found.values()] == [
        config.methods[name].select for name in found
    ]
    assert len(found) == 4
