"""The distances of moment matching, in units of the source's own scatter."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import feature_shift, launch, problem as problem_lib
from tests.experiments import tiny_config
from ttt_jax import checkpoint


def test_as_many_source_images_are_one_unit_apart():
    """The mean over many draws of normal features; means by the law of large numbers."""
    count, width = 200, 3
    mix = jnp.array([[1.0, 0.0, 0.0], [0.5, 2.0, 0.0], [0.0, -1.0, 0.3]])
    covariance, mean = mix @ mix.T, jnp.array([1.0, -2.0, 0.5])
    source = {"mean": mean, "outer": covariance + jnp.outer(mean, mean)}

    def drawn(key):
        z = mean[None] + jax.random.normal(key, (count, width)) @ mix.T
        return {"mean": z.mean(axis=0), "outer": z.T @ z / count}

    draws = [drawn(jax.random.key(n)) for n in range(300)]
    found = np.array([feature_shift.distances(source, draw, count) for draw in draws])
    np.testing.assert_allclose(found.mean(axis=0), 1.0, rtol=0.1)


def test_moments_in_batches_are_those_of_all(monkeypatch):
    monkeypatch.setattr(feature_shift, "_BATCH", 4)
    z = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    found = feature_shift.moments_of(lambda params, z: params * z, 2.0, z)
    np.testing.assert_allclose(found["mean"], 2 * z.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["outer"], 4 * z.T @ z / 10, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = tiny_config.get_config()
    problem = problem_lib.build(config, problem_lib.load_data(config, "test"))
    path = tmp_path_factory.mktemp("model") / "seed_0"
    metadata = problem_lib.checkpoint_metadata(config)
    checkpoint.save(path, problem_lib.initial(problem, 0), metadata=metadata)
    return config, str(path)


def test_the_program(model, tmp_path, capsys):
    config, path = model
    rows = feature_shift.run(
        config, str(tmp_path), checkpoint_path=path, domains=("contrast",), num_images=25
    )
    assert [(row["domain"], row["severity"], row["num_examples"]) for row in rows] == [
        ("clean", 0, 25),
        ("contrast", 5, 25),
    ]
    # Contrast moves the features of any model; digits of one split are like those of the other.
    assert rows[1]["mean"] > 3 * rows[0]["mean"] > 0
    record = json.loads((tmp_path / "feature_shift.json").read_text())
    assert record["rows"] == rows and {"command", "device", "versions", "commit"} <= set(record)
    assert capsys.readouterr().out.count("covariance") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "mine"}, "unknown norm 'mine'"),
        ({"domains": ("rain",)}, "unknown domain 'rain'"),
        ({"num_images": 1}, "at least 2; got 1"),
    ],
)
def test_refusals(model, tmp_path, options, message):
    with pytest.raises(launch.UserError, match=message):
        feature_shift.run(model[0], str(tmp_path / "w"), checkpoint_path=model[1], **options)
    assert not (tmp_path / "w").exists()
