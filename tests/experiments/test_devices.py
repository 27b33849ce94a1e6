"""The work of a run on all devices of a process: same rows and choices."""

import json
import shutil

import jax
import numpy as np
import pytest

from experiments import adapt, launch
from tests.experiments import tiny_config
from tests.experiments.test_programs import assert_equal_rows, rows_of

pytestmark = [
    pytest.mark.usefixtures("dense"),
    pytest.mark.cpu,
    pytest.mark.skipif(
        jax.local_device_count() < 4,
        reason="needs four devices (CPU: --xla_force_host_platform_device_count)",
    ),
]

PART = adapt.Part(domains=("clean", "fog", "saturate"))


def every_scope():
    """50 images in batches of 20: nothing divides by the number of devices or processes."""
    return tiny_config.with_methods(
        tiny_config.get_batch_norm_config(),
        source={},
        # Of the methods that adapt to each image alone, the one with the smallest program.
        memo={
            "num_views": 2,
            "trace": True,
            "num_steps": 1,
            "learning_rate": (0.01, 0.03),
            "select": "all",
        },
        rotation_online={
            "method": "ttt_rotation_online",
            "copies": 2,
            "learning_rate": 0.01,
            "probe": "rotation",
        },
        tent={"episodic": True, "predict": "after", "learning_rate": 0.05, "optimizer": "sgd"},
        tent_online={"method": "tent", "learning_rate": 0.05, "optimizer": "sgd"},
    )


@pytest.fixture(scope="module")
def trained(dense_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(dense_folder / "checkpoints", folder / "checkpoints")
    return folder


@pytest.fixture(scope="module")
def alone(dense, trained, tmp_path_factory):
    """One process, one device."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    shutil.copytree(trained, folder)
    assert adapt.run(every_scope(), str(folder), part=PART, devices=1) == 0
    return folder


def assert_same(folder, alone, part=PART):
    methods = part.methods or every_scope().methods
    wanted = [row for row in rows_of(alone) if row["method"] in methods]
    assert_equal_rows(rows_of(folder), wanted)
    chosen = [json.loads((at / "selection.json").read_text())["chosen"] for at in (folder, alone)]
    assert chosen[0] == {name: chosen[1][name] for name in methods}


def test_all_devices_of_a_process_equal_one(trained, alone, tmp_path, monkeypatch):
    folder = shutil.copytree(trained, tmp_path / "run")
    used = []
    load = adapt.pristine_lib.load

    def loaded(*args, **options):
        pristine = load(*args, **options)
        used.extend(leaf.sharding.device_set for leaf in jax.tree.leaves(pristine.params))
        return pristine

    monkeypatch.setattr(adapt.pristine_lib, "load", loaded)
    assert adapt.run(every_scope(), str(folder), part=PART) == 0
    assert_same(folder, alone)
    # The default is all of them, and the checkpoint was restored onto them.
    assert used and all(devices == set(jax.local_devices()) for devices in used)
    assert json.loads((folder / "run.json").read_text())["devices"] == len(jax.devices())


def test_a_number_of_devices():
    assert adapt.mesh_of(1) is None
    assert adapt.mesh_of(3).size == 3
    assert adapt.mesh_of(0).size == jax.local_device_count()
    for count in (-1, 99):
        with pytest.raises(launch.UserError, match=rf"--devices must lie .* got {count}\."):
            adapt.mesh_of(count)


def test_instances_beside_the_rows_are_the_rows(alone):
    """What every image adds to a mean, as paired intervals need it."""
    for row in rows_of(alone):
        unit = (row["method"], row["stream"], row["seed"], row["split_role"])
        saved = np.load(alone / "instances" / ("__".join(map(str, unit)) + ".npz"))
        column = saved["metrics"].tolist().index("error")
        assert saved["sums"][:, column].mean() == pytest.approx(row["error"], abs=1e-6)
        assert len(np.unique(saved["id"])) == row["num_examples"]
