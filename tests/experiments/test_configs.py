"""Every config can be read, says what it costs and shows, and builds its methods."""

import pathlib
import re

import jax
import numpy as np
import pytest

import ttt_jax as ttt
from experiments import config_files, launch, pristine, settings, tasks
from experiments.tasks import networks
from tests.experiments import tiny_decoder

CONFIGS = sorted((pathlib.Path(launch.__file__).parent / "configs").glob("[!_]*.py"))


@pytest.fixture(scope="module", autouse=True)
def traced_once():
    """Configs of equal networks trace the parameters' layout once."""
    with pytest.MonkeyPatch.context() as patch:
        init = jax.jit(networks.Network.init, static_argnums=0)
        patch.setattr(networks.Network, "init", lambda self, key: init(self, key))
        yield


def stand_in(config, folder):
    """Noise in the shape of CIFAR-10, or a tiny decoder, for configs that read files."""
    tiny_decoder.stand_in(config, folder)
    if config.data.name.startswith("npz:"):
        images = np.random.default_rng(0).random((40, 32, 32, 3), np.float32)
        labels = np.arange(40, dtype=np.int32) % 10
        for split in ("train", "validation", "test"):
            np.savez(folder / f"{split}.npz", images=images, labels=labels)
        if "imbalance" in config.data:
            config.data.imbalance = 2
        config.data.train = "train"
        config.data.name = f"npz:{folder}/{{split}}.npz"


def assert_selects(text, selection, shapes):
    """A selection adapts some of the parameters, and something by each name in its pattern."""
    chosen = ttt.select.describe(selection, shapes)
    assert chosen.paths and (text == "all") == (chosen.num_elements == chosen.total_elements)
    for names in re.findall(r"\(([^()]+)\)", text):
        for name in names.split("|"):
            found = [path for path in chosen.paths if re.search(rf"(^|/){name}(/|$)", path)]
            assert found, f"{text} adapts nothing by the name {name}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(path, tmp_path):
    text = path.read_text()
    for word in ("Command: ``", "Cost: ", "Expect: "):
        assert word in text, f"{path.name} does not say its {word}"
    config = config_files.config_from(path)
    stand_in(config, tmp_path)
    task = tasks.build(config)
    made = settings.candidates(config, task)
    shapes = {"params": pristine.layout(task)["params"]}
    assert set(made) == set(config.methods)
    for grid in made.values():
        for candidate in grid:
            if select := candidate.settings.get("select"):
                assert_selects(select, settings.selection(select), shapes)
    chosen = launch.setting(config, "train.main_select")
    if chosen != "all":
        assert_selects(chosen, ttt.select.paths(chosen), shapes)


@pytest.mark.parametrize("name", ["cifar10c_level5", "cifar10c_level5_bn", "pacs"])
def test_rotation_leaves_the_main_branch_alone(name, tmp_path):
    """Of its blocks and its classifier the auxiliary head reads nothing."""
    config = config_files.config_from(CONFIGS[0].parent / f"{name}.py")
    stand_in(config, tmp_path)
    selection = settings.selection(config.methods.rotation.select)
    paths = ttt.select.describe(selection, pristine.layout(tasks.build(config))).paths
    parts = {path.split("/")[1] for path in paths}
    shared = {"conv1", "layer1", "layer2"}
    assert shared < parts and all(part.startswith("rotation_") for part in parts - shared)
