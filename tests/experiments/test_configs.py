"""Every config can be read, says what it costs and shows, and builds its methods."""

import pathlib

import pytest

from experiments import launch, methods, problem

CONFIGS = sorted((pathlib.Path(launch.__file__).parent / "configs").glob("[!_]*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(path):
    text = path.read_text()
    for word in ("Command: ``", "Cost: ", "Expect: "):
        assert word in text, f"{path.name} does not say its {word}"
    config = launch.config_from(path)
    source = problem.load_data(config, "test")
    built = problem.build(config, source)
    plain = problem.build(config, source, shared_kernels=True)
    made = methods.build(config, built, plain)
    assert set(made) == set(config.methods)
    for method in made.values():
        for settings in method.grid:
            forwards, backwards = method.cost(settings)
            assert forwards >= 1 and backwards >= 0
