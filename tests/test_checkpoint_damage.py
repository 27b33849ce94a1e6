"""Damaged checkpoints and changed memory: every change is found and named."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax import checkpoint
from ttt_jax.checkpoint import CheckpointError, manifest

PARAMS = {
    "params": {
        "conv": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3, jnp.bfloat16)},
        "step": jnp.int32(4),
    }
}
LEAVES = ("params/conv/kernel", "params/conv/bias", "params/step")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("damage") / "whole"
    checkpoint.save(path, PARAMS, metadata={"mean": 0.5, "model": "small"})
    return path


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def files(root):
    return sorted(path for path in root.rglob("*") if path.is_file())


def culprit(root, file):
    """What the message must name: the leaf for a file in its folder, else the file."""
    folder = file.parent.name.replace(".", "/")
    return f"leaf {folder!r}" if folder in LEAVES else file.relative_to(root).as_posix()


def assert_named(root, name):
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(root)
    assert name in str(caught.value)


def test_every_file_has_its_culprit(copy):
    # The tests below say nothing if leaves had no folder of their own.
    names = {culprit(copy, file) for file in files(copy)}
    assert {f"leaf {leaf!r}" for leaf in LEAVES} < names
    assert {"ttt_jax.json", "params/_METADATA", "params/_CHECKPOINT_METADATA"} < names


MASKS = (0x01, 0x20, 0xFF)


@pytest.mark.parametrize(
    "masks", [MASKS, *(pytest.param((mask,), marks=pytest.mark.full) for mask in MASKS)]
)
def test_every_flipped_byte_is_found_and_named(copy, masks):
    """The masks take turns; in the full run each of them meets every byte."""
    count = 0
    for file in files(copy):
        name, data = culprit(copy, file), bytearray(file.read_bytes())
        with file.open("r+b", buffering=0) as handle:
            for position, byte in enumerate(data):
                handle.seek(position)
                handle.write(bytes([byte ^ masks[position % len(masks)]]))
                assert_named(copy, name)
                handle.seek(position)
                handle.write(bytes([byte]))
                count += 1
    assert count == sum(file.stat().st_size for file in files(copy)) > 1000
    assert checkpoint.load(copy).fingerprint == checkpoint.fingerprint(PARAMS)


def test_every_truncated_or_longer_file_is_named(copy):
    for file in files(copy):
        name, data = culprit(copy, file), file.read_bytes()
        for size in {0, 1, len(data) // 2, len(data) - 1}:
            file.write_bytes(data[:size])
            assert_named(copy, name)
        file.write_bytes(data + b"\n")
        assert_named(copy, name)
        file.write_bytes(data)
    checkpoint.load(copy)


def test_every_missing_or_replaced_file_is_named(copy):
    for file in files(copy):
        name, data = culprit(copy, file), file.read_bytes()
        file.unlink()
        assert_named(copy, name)
        file.mkdir()
        assert_named(copy, name)
        file.rmdir()
        file.write_bytes(data)
    checkpoint.load(copy)


def test_missing_folders(copy, tmp_path):
    shutil.rmtree(copy / "params" / "params.conv.kernel")
    assert_named(copy, "leaf 'params/conv/kernel'")
    shutil.rmtree(copy / "params")
    assert_named(copy, "is missing")
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*/cop\. Nearest: 'copy'"):
        checkpoint.load(tmp_path / "cop")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file is a file; a checkpoint is a folder"):
        checkpoint.load(tmp_path / "file")


@pytest.mark.parametrize("name", ["extra", "params/extra.0/0", "params/params.step/1"])
def test_foreign_files_are_named(copy, name):
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("x")
    assert_named(copy, name.removesuffix("/0"))


def rewritten(root):
    """Writes the manifest again for the files as they are now: only leaf checks remain."""
    content = manifest.read(root)
    (root / manifest.NAME).unlink()
    found = manifest.list_files(root)
    manifest.write(root, dataclasses.replace(content, files=found))


def test_leaves_are_checked_after_orbax_too(tmp_path):
    path = tmp_path / "c"
    checkpoint.save(path, {"a": jnp.zeros(4), "b": jnp.ones(4)})
    shutil.copy(path / "params" / "a" / "0", path / "params" / "b" / "0")
    rewritten(path)
    assert_named(path, "leaf 'b' came back wrong from orbax")


def test_a_change_of_dtype_on_disk_is_not_cast(tmp_path):
    path = tmp_path / "c"
    checkpoint.save(path, {"a": jnp.arange(4)})
    spec = path / "params" / "a" / ".zarray"
    spec.write_text(spec.read_text().replace("<i4", "<f4"))
    rewritten(path)
    assert_named(path, "leaf 'a' came back wrong from orbax: recorded int32[4]")


def test_what_orbax_cannot_read_is_an_error_of_this_package(tmp_path, capfd):
    path = tmp_path / "c"
    checkpoint.save(path, {"a": jnp.arange(4)})
    (path / "params" / "a" / ".zarray").write_text("{}")
    rewritten(path)
    assert_named(path, "Orbax could not read")


def test_an_unread_leaf_may_be_damaged(copy):
    chunk = copy / "params" / "params.conv.kernel" / "0.0"
    chunk.write_bytes(bytes(chunk.stat().st_size))
    like = jax.tree.map(lambda leaf: leaf, PARAMS)
    like["params"]["conv"]["kernel"] = None
    assert checkpoint.load(copy, like=like).params["params"]["step"] == 4
    assert_named(copy, "leaf 'params/conv/kernel'")


def test_a_newer_format_is_refused(copy, monkeypatch):
    content = manifest.read(copy)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "FORMAT", "ttt_jax checkpoint 2")
        manifest.write(copy, content)
    assert_named(copy, "has the format 'ttt_jax checkpoint 2'")


# The three ways to restore


def test_the_three_modes_agree(whole):
    pristine = checkpoint.load(whole)
    for mode in checkpoint.MODES:
        found = pristine.restore(mode)
        assert checkpoint.fingerprint(found) == pristine.fingerprint
        # Rebinding an entry of what restore gave does not reach the held tree.
        found["params"]["step"] = None
        assert pristine.params["params"]["step"] == 4
    assert "whole" in repr(pristine) and pristine.fingerprint[:12] in repr(pristine)


def test_fingerprint_notices_a_mutated_leaf():
    scale = np.ones(3, np.float32)
    pristine = checkpoint.pristine({"norm": {"scale": scale}, "w": jnp.ones(2)})
    assert pristine.restore("fingerprint")["norm"]["scale"] is scale
    scale[1] = np.nextafter(np.float32(1), np.float32(2))
    with pytest.raises(CheckpointError, match="leaf 'norm/scale' changed in memory"):
        pristine.restore("fingerprint")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["params"].update(step=jnp.int32(5)), "'params/step' changed in memory"),
        (lambda p: p["params"].update(step=jnp.float32(4)), r"recorded int32\[\].*found float32"),
        (lambda p: p["params"].pop("step"), "'params/step' was removed from"),
        (lambda p: p["params"].update(more=jnp.ones(1)), "'params/more' was added to"),
    ],
)
def test_fingerprint_notices_a_rebound_leaf(whole, change, message):
    pristine = checkpoint.load(whole)
    change(pristine.params)
    with pytest.raises(CheckpointError, match=message):
        pristine.restore("fingerprint")
    assert checkpoint.fingerprint(pristine.restore("orbax")) == pristine.fingerprint


@pytest.mark.parametrize("mode", ["memory", "fingerprint"])
def test_a_donated_leaf_is_named(whole, mode):
    pristine = checkpoint.load(whole)
    pristine.params["params"]["conv"]["kernel"].delete()
    with pytest.raises(CheckpointError, match="'params/conv/kernel' was deleted or donated"):
        pristine.restore(mode)
    assert checkpoint.fingerprint(pristine.restore("orbax")) == pristine.fingerprint


def test_orbax_mode_checks_the_files_again(copy):
    pristine = checkpoint.load(copy)
    chunk = copy / "params" / "params.conv.bias" / "0"
    data = chunk.read_bytes()
    chunk.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=r"leaf 'params/conv/bias'.*truncated"):
        pristine.restore("orbax")
    shutil.rmtree(copy)
    checkpoint.save(copy, jax.tree.map(lambda leaf: leaf + 1, PARAMS))
    with pytest.raises(CheckpointError, match="another than the one that was loaded"):
        pristine.restore("orbax")


def test_parameters_from_memory():
    pristine = checkpoint.pristine(PARAMS, metadata={"std": 0.25})
    assert pristine.fingerprint == checkpoint.fingerprint(PARAMS)
    pristine.require(std=0.25)
    with pytest.raises(CheckpointError, match="come from memory and have no file"):
        pristine.restore("orbax")
    with pytest.raises(CheckpointError, match="'w' holds 1 non-finite"):
        checkpoint.pristine({"w": jnp.array([jnp.nan])})


def test_an_unknown_mode_gets_the_nearest(whole):
    with pytest.raises(ValueError, match=r"Unknown restore mode 'orbx'.*Nearest: 'orbax'"):
        checkpoint.load(whole).restore("orbx")


def test_require_compares_metadata(whole):
    pristine = checkpoint.load(whole)
    pristine.require(mean=0.5, model="small")
    with pytest.raises(CheckpointError, match=r"'mean' .* is 0\.5, expected 0\.4914"):
        pristine.require(mean=0.4914)
    with pytest.raises(CheckpointError, match=r"no metadata 'maen'\. Nearest: 'mean'"):
        pristine.require(maen=0.5)
    with pytest.raises(CheckpointError, match=r"'mean' is a ndarray"):
        pristine.require(mean=np.full(1, 0.5))
    tuples = checkpoint.pristine({"w": jnp.ones(1)}, metadata={"mean": (0.1, 0.2)})
    tuples.require(mean=(0.1, 0.2))


def test_fingerprint_depends_on_content_alone():
    tree = {"a": jnp.arange(4), "b": {"c": jnp.zeros(2)}}
    name = checkpoint.fingerprint(tree)
    assert name == checkpoint.fingerprint({"b": {"c": np.zeros(2, np.float32)}, "a": tree["a"]})
    assert name == checkpoint.fingerprint({**tree, "hole": None})
    assert len(name) == 64
    for other in (
        {**tree, "a": jnp.arange(4).reshape(2, 2)},
        {**tree, "a": jnp.arange(4).astype(jnp.uint32)},
        {**tree, "a": jnp.arange(4).at[3].set(4)},
        {"A": tree["a"], "b": tree["b"]},
        {"a": tree["a"], "b": {"c": -tree["b"]["c"]}},
    ):
        assert checkpoint.fingerprint(other) != name


def test_an_older_state_serves_where_the_newest_is_damaged(tmp_path):
    saves = checkpoint.Saves(tmp_path / "training")
    assert saves.load(like=PARAMS) == (0, PARAMS)
    saves.save(5, PARAMS)
    shutil.copytree(tmp_path / "training" / "step_5", tmp_path / "kept")
    newer = jax.tree.map(lambda leaf: leaf + 1, PARAMS)
    saves.save(10, newer)
    assert [path.name for path in (tmp_path / "training").iterdir()] == ["step_10"]
    step, state = saves.load(like=PARAMS)
    assert step == 10 and checkpoint.fingerprint(state) == checkpoint.fingerprint(newer)
    shutil.move(tmp_path / "kept", tmp_path / "training" / "step_5")
    (tmp_path / "training" / "step_10" / "ttt_jax.json").write_text("{")
    with pytest.warns(UserWarning, match=r"step_10 cannot be used, so an older one is: .*"):
        step, state = saves.load(like=PARAMS)
    assert step == 5 and checkpoint.fingerprint(state) == checkpoint.fingerprint(PARAMS)
    saves.remove()
    assert not (tmp_path / "training").exists()
