"""Every config can be read, says what it costs and shows, and builds its methods."""

import pathlib

import numpy as np
import pytest

from experiments import launch, methods, problem

CONFIGS = sorted((pathlib.Path(launch.__file__).parent / "configs").glob("[!_]*.py"))


def stand_in(config, folder):
    """Noise in the shape of CIFAR-10 for configs that read files of their own."""
    if config.data.name.startswith("npz:"):
        images = np.random.default_rng(0).random((20, 32, 32, 3), np.float32)
        labels = np.arange(20, dtype=np.int32) % 10
        np.savez(folder / "test.npz", images=images, labels=labels)
        config.data.name = f"npz:{folder}/{{split}}.npz"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(path, tmp_path):
    text = path.read_text()
    for word in ("Command: ``", "Cost: ", "Expect: "):
        assert word in text, f"{path.name} does not say its {word}"
    config = launch.config_from(path)
    stand_in(config, tmp_path)
    source = problem.load_data(config, "test")
    built = problem.build(config, source)
    plain = problem.build(config, source, shared_kernels=True)
    made = methods.build(config, built, plain)
    assert set(made) == set(config.methods)
    for method in made.values():
        for settings in method.grid:
            forwards, backwards = method.cost(settings)
            assert forwards >= 1 and backwards >= 0
