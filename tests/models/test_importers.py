"""The public ResNet-26 checkpoint: accuracy where the file is there, refusals everywhere."""

import io
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from ttt_jax.models import ResNet, importers, init, load_resnet26_npz

DATA = pathlib.Path(
    os.environ.get("TTT_JAX_DATA", pathlib.Path(__file__).resolve().parents[3] / "shared" / "data")
)
CHECKPOINT = DATA / "checkpoints" / "cifar10_resnet26_gn8.npz"
TEST_SET = DATA / "cifar10_jpeg" / "test_jpegpack.npz"


def _every_twentieth():
    from PIL import Image

    with np.load(TEST_SET) as pack:
        header, data = pack["header"].tobytes(), pack["data"].tobytes()
        offsets, labels = pack["offsets"], pack["labels"]
    rows = range(0, len(labels), 20)
    images = [
        np.asarray(
            Image.open(io.BytesIO(header + data[offsets[i] : offsets[i + 1]])).convert("RGB")
        )
        for i in rows
    ]
    return np.stack(images), labels[::20]


@pytest.mark.skipif(
    not (CHECKPOINT.is_file() and TEST_SET.is_file()),
    reason="needs cifar10_resnet26_gn8.npz and test_jpegpack.npz (set TTT_JAX_DATA)",
)
def test_public_checkpoint_scores_as_published():
    module, variables = load_resnet26_npz(CHECKPOINT)
    images, labels = _every_twentieth()
    forward = jax.jit(lambda x: module.apply(variables, (x / 255 - 0.5) / 0.5))
    logits = [forward(part.astype(np.float32)) for part in np.split(images, 4)]
    # 82.07 % of all 10,000; of every twentieth image 407 of 500, no two logits closer than 4e-3.
    assert int(np.sum(np.argmax(np.concatenate(logits), axis=1) == labels)) == 407


@pytest.fixture(scope="module")
def shapes():
    module = ResNet(depth=26)
    return jax.eval_shape(lambda key: init(module, key, (32, 32, 3)), jax.random.key(0))


@pytest.fixture
def traced(shapes, monkeypatch):
    """The network is not traced for its shapes again."""
    zeros = lambda *_: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)  # noqa: E731
    return lambda: monkeypatch.setattr(importers, "init", zeros)


@pytest.fixture(scope="module")
def arrays(shapes):
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=leaf.shape).astype(np.float32)
        for name, leaf in traverse_util.flatten_dict(shapes["params"], sep="/").items()
        if not name.startswith("rotation_")
    }


def test_branch_is_copied_and_its_head_comes_from_the_key(arrays, traced, tmp_path):
    path = tmp_path / "net.npz"
    np.savez(path, **arrays)
    module, variables = load_resnet26_npz(path, jax.random.key(3), branch=1)
    flat = traverse_util.flatten_dict(variables["params"], sep="/")
    assert module.branch == 1
    for name, leaf in flat.items():
        if "rotation_fc" not in name:
            np.testing.assert_array_equal(leaf, arrays[name.removeprefix("rotation_")])
    assert {name.split("/")[0] for name in flat if name.startswith("rotation_")} == {
        "rotation_layer2",
        "rotation_layer3",
        "rotation_gn",
        "rotation_fc",
    }
    traced()
    _, other = load_resnet26_npz(path, jax.random.key(4), branch=1)
    kernels = [tree["params"]["rotation_fc"]["kernel"] for tree in (variables, other)]
    assert kernels[0].dtype == jnp.float32
    assert not np.array_equal(*kernels)


def test_wrong_files_are_refused(arrays, traced, tmp_path):
    traced()
    path = tmp_path / "net.npz"
    with pytest.raises(FileNotFoundError):
        load_resnet26_npz(path)

    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"must be an \.npz archive"):
        load_resnet26_npz(path)

    renamed = dict(arrays)
    renamed["layer1/0/bn1/scale"] = renamed.pop("layer1/0/gn1/scale")
    np.savez(path, **renamed)
    with pytest.raises(
        ValueError, match=r"'layer1/0/gn1/scale'; the nearest name is 'layer1/0/bn1"
    ):
        load_resnet26_npz(path)

    np.savez(path, **{**arrays, "fc/kernel": np.zeros((64, 100), np.float32)})
    with pytest.raises(ValueError, match=r"'fc/kernel' must be float32 \(64, 10\)"):
        load_resnet26_npz(path)

    np.savez(path, **{**arrays, "fc/kernel": np.zeros((64, 10), np.float16)})
    with pytest.raises(ValueError, match="the file holds float16"):
        load_resnet26_npz(path)
