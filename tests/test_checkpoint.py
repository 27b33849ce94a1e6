"""Checkpoints that are whole: what goes in comes out, and what cannot be asked is refused."""

import os
import pathlib
import resource
import signal
import subprocess
import sys
import textwrap
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ttt_jax import checkpoint
from ttt_jax.checkpoint import CheckpointError, store


class Pair(NamedTuple):
    left: jax.Array
    right: jax.Array | None


def make_params():
    return {
        "params": {
            "conv": {"kernel": jnp.arange(16.0).reshape(4, 4), "bias": jnp.full((4,), -0.0)},
            "norm": {"scale": jnp.full((8,), 1.5, jnp.bfloat16)},
        },
        "batch_stats": {"norm": {"mean": np.linspace(0, 1, 8, dtype=np.float32)}},
    }


def bits(leaf):
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
    return str(leaf.dtype), leaf.shape, array.tobytes()


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        assert bits(a) == bits(b), path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "pristine"
    checkpoint.save(path, make_params(), metadata={"mean": (0.5, 0.25), "model": {"depth": 26}})
    return path


def test_round_trip_of_every_kind_of_leaf_and_container(tmp_path, capfd, caplog):
    dtypes = "float16 bfloat16 float8_e4m3fn complex64 int4 int8 int32 uint8 uint16 uint32 bool"
    params = {
        "dtypes": {name: jnp.asarray([1, 0, 1], name) for name in dtypes.split()},
        "scalar": jnp.float32(2.5),
        "numpy scalar": np.int16(7),
        "empty": jnp.zeros((0, 3), jnp.bfloat16),
        "column major": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "list": [jnp.ones(2), (jnp.zeros(1), None), {}],
        "int keys": {3: jnp.ones(1), 20: jnp.zeros(1)},
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
        "hole": None,
    }
    checkpoint.save(tmp_path / "c", params)
    pristine = checkpoint.load(tmp_path / "c")
    assert_same(pristine.params, params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(pristine.params))
    assert pristine.fingerprint == checkpoint.fingerprint(params)
    # Orbax logs a warning on every save, and its logger would print it.
    assert capfd.readouterr() == ("", "") and not caplog.records


@pytest.mark.parametrize(
    "names",
    [
        ("a/b", "a.b"),
        ("_METADATA", "_sharding"),
        ("array_metadatas", ""),
        ("%", "%2E"),
        (" é", ".."),
    ],
)
def test_names_that_are_special_on_disk(tmp_path, names):
    params = {name: {"a": jnp.full((2,), i), "": jnp.ones(1)} for i, name in enumerate(names)}
    params["array_metadatas "] = jnp.ones(1)
    checkpoint.save(tmp_path / "c", params)
    assert_same(checkpoint.load(tmp_path / "c").params, params)


def test_a_bare_array_is_a_tree(tmp_path):
    checkpoint.save(tmp_path / "c", jnp.arange(3))
    assert_same(checkpoint.load(tmp_path / "c").params, jnp.arange(3))
    with pytest.raises(
        CheckpointError, match=r"only leaf .* int32\[3\], `like` expects int32\[4\]"
    ):
        checkpoint.load(tmp_path / "c", like=jnp.arange(4))


def test_other_containers_come_back_as_dicts_or_as_like(tmp_path):
    params = {"pair": Pair(jnp.ones(2), None)}
    checkpoint.save(tmp_path / "c", params)
    assert_same(
        checkpoint.load(tmp_path / "c").params, {"pair": {"left": jnp.ones(2), "right": None}}
    )
    assert_same(checkpoint.load(tmp_path / "c", like=params).params, params)


def test_metadata_and_versions(saved):
    pristine = checkpoint.load(saved)
    assert pristine.metadata == {"mean": [0.5, 0.25], "model": {"depth": 26}}
    assert pristine.versions["jax"] == jax.__version__
    assert {"ttt_jax", "flax", "numpy", "orbax-checkpoint"} <= set(pristine.versions)


def test_other_orbax_programs_read_the_arrays(saved):
    with ocp.StandardCheckpointer() as other:
        assert_same(other.restore(saved / "params"), jax.tree.map(np.asarray, make_params()))


def test_relative_paths_and_new_parents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.save("runs/one/pristine", make_params())
    pristine = checkpoint.load("runs/one/pristine")
    monkeypatch.chdir("/")
    assert_same(pristine.restore("orbax"), make_params())


def test_an_existing_destination_is_kept(saved, tmp_path):
    before = checkpoint.load(saved).fingerprint
    with pytest.raises(CheckpointError, match=r"exists and .* never overwritten.*another path"):
        checkpoint.save(saved, {"w": jnp.ones(1)})
    assert checkpoint.load(saved).fingerprint == before
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="exists"):
        checkpoint.save(tmp_path / "empty", {"w": jnp.ones(1)})


def test_a_destination_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"Cannot save .*file/sub/c"):
        checkpoint.save(tmp_path / "file" / "sub" / "c", {"w": jnp.ones(1)})
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(CheckpointError, match="gs://bucket/c is not a local path"):
        checkpoint.save("gs://bucket/c", {"w": jnp.ones(1)})


@pytest.mark.parametrize("room", [0, 1000, 50_000])
def test_no_space_left_leaves_nothing(tmp_path, room):
    # A limit on the size of files makes real writes fail: first any, then the data, and the
    # manifest where all the data fit.
    params = {"noise": np.random.default_rng(0).standard_normal(8000).astype(np.float32)}
    metadata = {}
    if room == 50_000:
        params, metadata = {"w": jnp.ones(1)}, {"text": "x" * 60_000}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(CheckpointError, match=r"Cannot save .*new/c, .*large"):
            checkpoint.save(tmp_path / "new" / "c", params, metadata=metadata)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_a_kill_in_the_middle_leaves_nothing_that_loads(tmp_path):
    program = f"""
        import os, signal
        import numpy as np
        from ttt_jax import checkpoint
        from ttt_jax.checkpoint import manifest
        manifest.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        checkpoint.save({str(tmp_path / "c")!r}, {{"w": np.ones(3, np.float32)}})
    """
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=env, check=False)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "c")
    [rest] = os.listdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no ttt_jax\.json: an unfinished save"):
        checkpoint.load(tmp_path / rest)
    checkpoint.save(tmp_path / "c", {"w": jnp.ones(3)})
    assert_same(checkpoint.load(tmp_path / "c").params, {"w": jnp.ones(3)})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a": {"w": jnp.array([1.0, jnp.nan])}}, r"'a/w' holds 1 non-finite of 2"),
        ({"w": jnp.array([jnp.inf], jnp.bfloat16)}, r"'w' holds 1 non-finite"),
        ({"w": np.ones(2)}, r"'w' is float64, which JAX would cast"),
        ({"a": {"rate": 0.1}}, r"'a/rate' is a float; .* arrays"),
        ({"name": "resnet"}, r"'name' is a str"),
        ({"w": np.array(["x"])}, r"'w' has dtype <U1"),
        ({"w": jnp.ones(2, jnp.uint4)}, r"'w' has dtype uint4"),
        ({"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, r"Two leaves have the path 'a/b'"),
        ({"a": {(1, 2): jnp.ones(1)}}, r"dict at 'a' has the key \(1, 2\) of type tuple"),
        ({"a": {1: jnp.ones(1), "b": jnp.ones(1)}}, r"not a pytree JAX can flatten"),
        ({"a": {}}, r"no leaves"),
    ],
)
def test_parameters_that_are_refused(tmp_path, params, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(tmp_path / "c", params)
    assert os.listdir(tmp_path) == []


def test_traced_and_deleted_leaves_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="'w' is traced"):
        jax.jit(lambda w: checkpoint.save(tmp_path / "c", {"w": w}))(jnp.ones(2))
    gone = jnp.ones(2)
    gone.delete()
    with pytest.raises(CheckpointError, match="'w' was deleted or donated"):
        checkpoint.save(tmp_path / "c", {"w": gone})


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"model": {"mean": np.ones(2)}}, r"'model/mean' is a ndarray.*\.tolist\(\)"),
        ({"std": [1.0, float("nan")]}, r"'std/1' is nan"),
        ({"model": {3: "x"}}, r"'model' has the key 3 of type int"),
        ({"when": pathlib.Path("x")}, r"'when' is a \w+, which JSON cannot hold"),
        ([1, 2], r"metadata is a list"),
    ],
)
def test_metadata_that_is_refused(tmp_path, metadata, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(tmp_path / "c", {"w": jnp.ones(1)}, metadata=metadata)
    assert os.listdir(tmp_path) == []


def changed(path, leaf):
    """The tree of `make_params` with one leaf put, or removed where it is `...`."""
    params = make_params()
    *parents, last = path.split("/")
    node = params
    for part in parents:
        node = node[part]
    node[last] = leaf
    if leaf is ...:
        del node[last]
    return params


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (
            changed("params/conv/kernel", jnp.ones((4, 5))),
            r"'params/conv/kernel' is stored as float32\[4, 4\], `like` expects float32\[4, 5\]",
        ),
        (
            changed("params/norm/scale", jnp.ones(8)),
            r"'params/norm/scale' is stored as bfloat16\[8\], `like` expects float32\[8\]",
        ),
        (
            changed("params/conv/kernal", jnp.ones((4, 4))),
            r"'params/conv/kernal' of `like` is not in .*Nearest: 'params/conv/kernel'",
        ),
        (
            changed("params/conv/bias", ...),
            r"`like` lacks the stored leaf 'params/conv/bias' \(float32\[4\]\).*None",
        ),
        (changed("params/conv/bias", 0.5), r"'params/conv/bias' of `like` is a float"),
        ({"params": None, "batch_stats": None}, "asks for no leaf"),
    ],
)
def test_like_that_differs(saved, like, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(saved, like=like)


def test_partial_restore_by_holes(saved):
    params = make_params()
    like = jax.eval_shape(lambda: params)
    like["params"]["conv"]["bias"] = None
    like["batch_stats"] = None
    pristine = checkpoint.load(saved, like=like)
    expected = {**changed("params/conv/bias", None), "batch_stats": None}
    assert_same(pristine.params, expected)
    assert pristine.fingerprint == checkpoint.fingerprint(expected)
    assert set(pristine.leaves) == {"params/conv/kernel", "params/norm/scale"}
    for mode in checkpoint.MODES:
        assert_same(pristine.restore(mode), expected)


def test_wide_dtypes_need_x64(tmp_path):
    with jax.enable_x64(True):
        checkpoint.save(tmp_path / "c", {"w": np.ones(2, np.int64)})
        assert checkpoint.load(tmp_path / "c").params["w"].dtype == jnp.int64
    with pytest.raises(CheckpointError, match="'w' is int64, which JAX would cast to 32 bits"):
        checkpoint.load(tmp_path / "c")


@pytest.fixture
def mesh():
    if jax.device_count() < 4:
        pytest.skip("needs four devices (CPU: --xla_force_host_platform_device_count)")
    return jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.mark.cpu
def test_load_onto_shardings(saved, mesh):
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    for sharding in (rows, {"params": rows, "batch_stats": {"norm": whole}}):
        found = checkpoint.load(saved, sharding=sharding)
        assert_same(found.params, make_params())
        assert_same(found.restore("orbax"), make_params())
        kernel = found.params["params"]["conv"]["kernel"]
        assert kernel.sharding == rows
        assert [shard.data.shape for shard in kernel.addressable_shards] == [(1, 4)] * 4
    assert found.params["batch_stats"]["norm"]["mean"].sharding == whole


@pytest.mark.cpu
def test_no_device_ever_holds_more_than_its_shards(tmp_path, mesh, monkeypatch):
    whole = 64 * 1024
    checkpoint.save(tmp_path / "c", {"a": jnp.ones((64, 256)), "b": jnp.zeros((64, 256))})
    rows = NamedSharding(mesh, PartitionSpec("data"))
    before = {id(array) for array in jax.live_arrays()}
    held, place = [], store._place

    def look(path, leaf, value, sharding):
        new = [array for array in jax.live_arrays() if id(array) not in before]
        held.extend(shard.data.nbytes for array in new for shard in array.addressable_shards)
        assert isinstance(value, jax.Array) and value.sharding == sharding
        return place(path, leaf, value, sharding)

    monkeypatch.setattr(store, "_place", look)
    assert len(checkpoint.load(tmp_path / "c", sharding=rows).leaves) == 2
    assert held and max(held) == whole // 4


@pytest.mark.cpu
def test_the_sharding_of_like_is_taken(saved, mesh):
    whole = NamedSharding(mesh, PartitionSpec())
    like = jax.tree.map(jnp.asarray, make_params())
    like["params"] = jax.device_put(like["params"], whole)
    found = checkpoint.load(saved, like=like).params
    assert found["params"]["conv"]["kernel"].sharding == whole
    # Arrays that only happen to be on the first device are free to follow others.
    assert not found["batch_stats"]["norm"]["mean"].committed


@pytest.mark.cpu
def test_sharded_parameters_are_saved_whole(tmp_path, mesh):
    params = {"w": jax.device_put(jnp.arange(8.0), NamedSharding(mesh, PartitionSpec("data")))}
    params["keys"] = jax.random.split(jax.random.key(0), 4)
    checkpoint.save(tmp_path / "c", params)
    assert_same(checkpoint.load(tmp_path / "c").params, params)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    found = checkpoint.load(tmp_path / "c", sharding=rows).params
    assert_same(found, params)
    assert found["keys"].sharding.is_equivalent_to(rows, 1)


@pytest.mark.cpu
def test_shardings_that_do_not_fit(tmp_path, saved, mesh):
    rows = NamedSharding(mesh, PartitionSpec("data"))
    checkpoint.save(tmp_path / "c", {"w": jnp.ones(6)})
    with pytest.raises(CheckpointError, match=r"leaf 'w' of shape \(6,\) does not fit"):
        checkpoint.load(tmp_path / "c", sharding=rows)
    for sharding, message in [
        ({"params": rows}, r"'batch_stats/norm/mean' has no entry in `sharding`"),
        ({"parms": rows, "batch_stats": rows}, r"`sharding` at 'parms' belongs to no leaf"),
        (PartitionSpec("data"), r"`sharding` at '' is a P\w*\. Give .* NamedSharding"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(saved, sharding=sharding)
