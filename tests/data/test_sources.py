import io
import pickle
import shutil
import subprocess
import sys
import textwrap
import types

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from ttt_jax import data
from ttt_jax.data import digits as digits_module, records, splits


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (10, 9, 8, 3), dtype=np.uint8)


@pytest.fixture
def save(tmp_path):
    def write(**arrays):
        path = tmp_path / "set.npz"
        np.savez(path, **arrays)
        return f"npz:{path}"

    return write


# -- digits -----------------------------------------------------------------------------------


def test_digits_are_scikit_learns(tfds_dir, digits):
    train = data.load("tfds:digits", "train", data_dir=tfds_dir)
    assert (len(train), len(digits)) == (1437, 360)
    bunch = load_digits()
    train_rows, test_rows = digits_module.split_indices()
    assert sorted([*train_rows, *test_rows]) == list(range(1797))
    expected = np.rint(bunch.images * 255 / 16).astype(np.float32)[..., None] / np.float32(255)
    for source, rows in ((train, train_rows), (digits, test_rows)):
        batch = source.arrays()
        np.testing.assert_array_equal(batch.image, expected[rows])
        np.testing.assert_array_equal(batch.label, bunch.target[rows])
        np.testing.assert_array_equal(batch.id, np.arange(len(rows)))
    counts = np.bincount(digits.labels())
    assert counts.min() >= 34 and counts.max() <= 38
    assert digits.num_classes == 10 and digits.image_shape == (8, 8, 1)
    assert digits.class_names is None and digits.split == "test"


def test_tensorflow_is_never_imported(tfds_dir, digits):
    code = f"""
    import sys
    from ttt_jax import data
    heavy = {{"tensorflow", "tensorflow_datasets", "grain", "sklearn", "scipy.ndimage"}}
    assert not heavy & set(sys.modules), heavy & set(sys.modules)
    source = data.load("tfds:digits", "test", data_dir={tfds_dir!r})
    source.arrays()
    assert "tensorflow" not in sys.modules and "sklearn" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_another_process_may_finish_first(tmp_path, monkeypatch):
    final = tmp_path / "digits" / "1.0.0"
    write = digits_module.Digits.download_and_prepare

    def slow(builder):
        write(builder)
        shutil.copytree(builder.data_dir, final)  # what the faster process leaves behind

    monkeypatch.setattr(digits_module.Digits, "download_and_prepare", slow)
    assert len(data.load("tfds:digits", "test", data_dir=str(tmp_path))) == 360
    assert [path.name for path in final.parent.iterdir()] == ["1.0.0"]


def test_a_place_taken_by_something_else_is_an_error(tmp_path):
    final = tmp_path / "digits" / "1.0.0"
    final.mkdir(parents=True)
    (final / "other").write_text("not a data set")
    with pytest.raises(OSError, match="digits"):
        data.load("tfds:digits", "test", data_dir=str(tmp_path))
    assert [path.name for path in final.parent.iterdir()] == ["1.0.0"]


# -- splits, ids, access -----------------------------------------------------------------------


def test_ids_stay_with_their_sample(tfds_dir, digits):
    part = data.load("tfds:digits", "test[100:200]", data_dir=tfds_dir)
    assert len(part) == 100 and part[0].id == 100
    np.testing.assert_array_equal(part[7].image, digits[107].image)
    assert part[7].label == digits[107].label
    batch = part.take([3, 0, 3])
    np.testing.assert_array_equal(batch.id, [103, 100, 103])
    assert (batch.id.dtype, batch.image.dtype, batch.label.dtype) == ("int64", "float32", "int32")
    assert part.split == "test[100:200]"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("test", (0, 7)),
        ("test[:50%]", (0, 4)),
        ("test[50%:]", (4, 7)),
        ("test[2:5]", (2, 5)),
        ("test[-3:]", (4, 7)),
        ("test[:-10%]", (0, 6)),
    ],
)
def test_slices(text, expected):
    assert splits.bounds(splits.parse(text), 7) == expected


def test_slices_agree_with_tfds(tfds_dir, digits):
    builder = digits_module.prepare(tfds_dir)
    for text in ("test[:33%]", "test[10%:]", "test[5:-7]", "test[-20%:]"):
        assert len(data.load("tfds:digits", text, data_dir=tfds_dir)) == len(
            builder.as_data_source(text)
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("test+train", "is written"),
        ("test[3]", "is written"),
        ("test[:8]", "outside"),
        ("test[4:4]", "empty"),
        ("test[5:2]", "empty"),
    ],
)
def test_bad_slices(text, message):
    with pytest.raises(ValueError, match=message):
        splits.bounds(splits.parse(text), 7)


@pytest.mark.parametrize("index", [-1, 360, 10**9])
def test_index_out_of_range(digits, index):
    with pytest.raises(IndexError, match="0 to 359"):
        digits[index]
    with pytest.raises(IndexError, match="0 to 359"):
        digits.take([0, index])


def test_sources_can_be_pickled(digits, save, images):
    for source in (digits, data.load(save(images=images, labels=np.arange(10)), "test[2:]")):
        again = pickle.loads(pickle.dumps(source))
        assert again.fingerprint == source.fingerprint and again[1].id == source[1].id


# -- errors of tfds names ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split", "error", "message"),
    [
        ("tfds:digits", "tst", ValueError, "test, train"),
        ("tfds:cifr10", "test", ValueError, "cifar10"),
        ("tfds:cifar10", "test", FileNotFoundError, "download_and_prepare"),
        ("tfds:mnist/3.0.1", "test", FileNotFoundError, "extra 'tf'"),
        ("digits", "test", ValueError, "tfds:NAME"),
        ("npz:", "test", ValueError, "npz:PATH"),
        ("npz:/nowhere/at/all.npz", "test", FileNotFoundError, "no file"),
    ],
)
def test_names_that_cannot_be_opened(tfds_dir, digits, name, split, error, message):
    with pytest.raises(error, match=message):
        data.load(name, split, data_dir=tfds_dir)


def test_records_on_disk_are_counted(tfds_dir, digits):
    builder = digits_module.prepare(tfds_dir)
    short = types.SimpleNamespace(
        info=builder.info, data_dir=builder.data_dir, as_data_source=lambda split: range(359)
    )
    with pytest.raises(ValueError, match=r"359 records on disk.*metadata say 360"):
        records.RecordReader(short, "test")


# -- npz -----------------------------------------------------------------------------------------


def test_npz_arrays(save, images):
    name = save(images=images, labels=np.arange(10) % 3, class_names=np.array(["a", "b", "c"]))
    source = data.load(name, "train[20%:50%]")
    assert len(source) == 3 and source.class_names == ("a", "b", "c") and source.num_classes == 3
    assert source[0].id == 2 and source[0].image.shape == (9, 8, 3)
    assert source.title == source.name == name
    np.testing.assert_array_equal(source.take([1]).image[0], images[3].astype(np.float32) / 255)


def test_npz_own_ids_and_gray_floats(save):
    pixels = np.linspace(0, 1, 3 * 64).reshape(3, 8, 8)
    name = save(images=pixels, labels=np.array([0, 4, 1]), ids=np.array([70, 5, 9]))
    source = data.load(name, "test[1:]")
    assert source.image_shape == (8, 8, 1) and source.num_classes == 5
    titled = save(images=pixels, labels=np.array([0, 4, 1]), title=np.asarray("gray"))
    titled = data.load(titled, "test")
    assert [s.title for s in (titled, titled.in_memory(), titled.subset([1]))] == ["gray"] * 3
    np.testing.assert_array_equal(source.arrays().id, [5, 9])


def test_fingerprint_sees_pixels_labels_and_ids(save, images):
    labels = np.arange(10)
    first = data.load(save(images=images, labels=labels), "test").fingerprint
    assert first == data.load(save(images=images, labels=labels), "test").fingerprint
    assert len(first) == 8 and int(first, 16) >= 0
    other = images.copy()
    other[4, 0, 0, 0] ^= 1
    seen = {
        first,
        data.load(save(images=other, labels=labels), "test").fingerprint,
        data.load(save(images=images, labels=labels[::-1]), "test").fingerprint,
        data.load(save(images=images, labels=labels, ids=labels + 1), "test").fingerprint,
        data.load(save(images=images, labels=labels), "test[:9]").fingerprint,
    }
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.arange(9)}, "10 images and 9"),
        ({"labels": np.arange(10.0)}, "one integer"),
        ({"labels": np.arange(10) - 1}, "label 0 of .* is -1"),
        ({"class_names": np.array(["a", "b"])}, "label 2 .* 2 class names"),
        ({"ids": np.zeros(10, int)}, "distinct"),
        ({"ids": np.arange(3)}, "ids must be one integer"),
        ({"images": np.zeros((10, 8))}, r"\[N, H, W, C\]"),
        ({"images": np.zeros((10, 8, 8), int)}, "uint8 or floating"),
        ({"images": np.full((10, 8, 8), 2.0)}, r"in \[0, 1\]"),
        ({"images": np.zeros((0, 8, 8), np.uint8), "labels": np.zeros(0, int)}, "empty"),
    ],
)
def test_bad_npz(save, images, change, message):
    with pytest.raises(ValueError, match=message):
        data.load(save(**{"images": images, "labels": np.arange(10), **change}), "test")


def test_non_finite_pixels_name_the_first_image(save):
    pixels = np.zeros((6, 8, 8, 1))
    pixels[3, 2, 2] = np.nan
    pixels[5, 0, 0] = np.inf
    with pytest.raises(ValueError, match=r"image 3 of .*\(2 such"):
        data.load(save(images=pixels, labels=np.zeros(6, int)), "test")


def test_npz_without_the_arrays_or_damaged(save, tmp_path, images):
    with pytest.raises(ValueError, match=r"needs the arrays images.*vessels"):
        data.load(save(vessels=np.zeros(3)), "test")
    path = tmp_path / "cut.npz"
    np.savez(path, images=images, labels=np.arange(10))
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ValueError, match="not a readable npz"):
        data.load(f"npz:{path}", "test")
    np.save(tmp_path / "one.npy", images)
    with pytest.raises(ValueError, match="bare array"):
        data.load(f"npz:{tmp_path / 'one.npy'}", "test")


def pack(images):
    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=75)
        files.append(file.getvalue())
    shared = next(k for k in range(len(files[0])) if len({f[: k + 1] for f in files}) > 1)
    bodies = [f[shared:] for f in files]
    return files, {
        "header": np.frombuffer(files[0][:shared], np.uint8),
        "data": np.frombuffer(b"".join(bodies), np.uint8),
        "offsets": np.cumsum([0, *map(len, bodies)]).astype(np.uint32),
        "labels": np.arange(len(files)).astype(np.uint8),
    }


def test_packed_jpegs(save, images):
    files, arrays = pack(images)
    source = data.load(save(**arrays), "test[4:6]")
    expected = np.asarray(Image.open(io.BytesIO(files[5]))) / np.float32(255)
    np.testing.assert_array_equal(source[1].image, expected)
    assert source[1].id == 5 and source[1].label == 5
    with pytest.raises(ValueError, match="cut short"):
        data.load(save(**{**arrays, "data": arrays["data"][:-9]}), "test")
    with pytest.raises(ValueError, match=r"Image 0 .* JPEG"):
        data.load(save(**{**arrays, "header": arrays["header"][:-40]}), "test")


def test_in_memory_is_the_same_source(tfds_dir):
    stored = data.load("tfds:digits", "test[100:110]", data_dir=tfds_dir)
    held = stored.in_memory()
    assert held.fingerprint == stored.fingerprint
    assert held[3].id == stored[3].id == 103
    np.testing.assert_array_equal(held.arrays().image, stored.arrays().image)
    assert held.split == stored.split


@pytest.mark.parametrize("shape", [(4, 3, 9, 8), (4, 1, 9, 9)])
def test_npz_channels_first(save, shape):
    name = save(images=np.zeros(shape, np.uint8), labels=np.zeros(4, np.int64))
    with pytest.raises(ValueError, match=r"channels last.*transpose\(0, 2, 3, 1\)"):
        data.load(name, "test")


@pytest.mark.parametrize("shape", [(4, 3, 9, 4), (4, 1, 9, 6), (4, 3, 2, 12), (4, 9, 9, 12)])
def test_npz_of_few_rows_or_many_channels(save, shape):
    name = save(images=np.zeros(shape, np.uint8), labels=np.zeros(4, np.int64))
    assert data.load(name, "test").image_shape == shape[1:]


@pytest.mark.parametrize("method", ["take", "subset"])
def test_masks_are_no_indices(save, images, method):
    source = data.load(save(images=images, labels=np.arange(10) % 2), "test")
    with pytest.raises(ValueError, match=r"integer indices; got bool.*np.flatnonzero\(mask\)"):
        getattr(source, method)(source.labels() == 1)
