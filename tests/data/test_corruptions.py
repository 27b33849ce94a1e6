import numpy as np
import pytest

from ttt_jax.data import corruptions
from ttt_jax.data.corruptions import common, spatter

NAMES = corruptions.CORRUPTIONS + corruptions.VALIDATION_CORRUPTIONS

# Published constants do not raise the distance at every step for these: mud (from severity 4)
# follows water, the elastic and glass sets trade range for strength, and frost dims as it grows.
UNEVEN = {"glass_blur", "elastic_transform", "frost", "pixelate", "spatter", "saturate"}


def rms(a, b):
    return float(np.sqrt(np.mean((a - b) ** 2)))


def test_names_and_order():
    assert len(corruptions.CORRUPTIONS) == 15 and len(corruptions.VALIDATION_CORRUPTIONS) == 4
    assert corruptions.CORRUPTIONS[0] == "gaussian_noise"
    assert corruptions.CORRUPTIONS[-1] == "jpeg_compression"
    assert corruptions.VALIDATION_CORRUPTIONS == (
        "speckle_noise",
        "gaussian_blur",
        "spatter",
        "saturate",
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 11, 3), (28, 28, 1), (64, 48, 3), (90, 120, 3)])
def test_any_size_gives_eight_bits(name, shape, scene):
    image = scene(max(shape), shape[2])[: shape[0], : shape[1]].astype(np.float32)
    before = image.copy()
    for severity in (1, 5):
        out = corruptions.corrupt(image, name, severity, seed=(3, 7))
        assert out.shape == shape and out.dtype == np.float32
        assert out.min() >= 0 and out.max() <= 1
        np.testing.assert_array_equal(np.rint(out * 255) / np.float32(255), out)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("name", NAMES)
def test_severity_on_digits_and_on_32_pixels(name, digits, scene):
    images = digits.take(np.arange(40)).image
    colored = np.stack([np.roll(scene(32), 3 * k, 1) for k in range(12)])
    for batch in (images, colored):
        ids = np.arange(len(batch))
        distance = [
            rms(batch, corruptions.corrupt_batch(batch, name, s, seed=0, ids=ids))
            for s in range(1, 6)
        ]
        assert distance[4] > 0.02  # five gray levels
        if name not in UNEVEN:
            assert np.all(np.diff(distance) > -0.005), distance
            assert distance[4] > 1.2 * distance[0]


@pytest.mark.parametrize("name", NAMES)
def test_depends_on_the_seed_and_the_id_alone(name, digits):
    images = digits.take(np.arange(6)).image
    ids = np.array([4, 900, 2, 31, 5, 0])
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    out = corruptions.corrupt_batch(images, name, 4, seed=11, ids=ids)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    order = np.array([5, 2, 0, 1, 4, 3])
    np.testing.assert_array_equal(
        corruptions.corrupt_batch(images[order], name, 4, seed=11, ids=ids[order]), out[order]
    )
    loop = [corruptions.corrupt(im, name, 4, seed=(11, int(i))) for im, i in zip(images, ids)]  # noqa: B905
    np.testing.assert_array_equal(np.stack(loop), out)


@pytest.mark.parametrize("name", ["gaussian_noise", "frost", "fog", "snow", "glass_blur"])
def test_seed_id_and_severity_each_change_the_draw(name, scene):
    image = scene(32)
    one = corruptions.corrupt(image, name, 3, seed=(0, 1))
    assert rms(one, corruptions.corrupt(image, name, 3, seed=(0, 2))) > 0.01
    assert rms(one, corruptions.corrupt(image, name, 3, seed=(1, 1))) > 0.01
    # A longer seed that begins alike is another seed.
    assert rms(one, corruptions.corrupt(image, name, 3, seed=(0, 1, 0))) > 0.01


def test_name_and_severity_are_mixed_into_the_draw():
    image = np.full((32, 32, 1), 0.5)
    a = corruptions.corrupt(image, "gaussian_noise", 4, seed=0) - 0.5
    b = corruptions.corrupt(image, "gaussian_noise", 5, seed=0) - 0.5
    c = corruptions.corrupt(image, "speckle_noise", 5, seed=0) - 0.5
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.15
    assert abs(np.corrcoef(b.ravel(), c.ravel())[0, 1]) < 0.15


@pytest.mark.parametrize(
    ("name", "severity", "near"),
    [("gausian_noise", 1, "gaussian_noise"), ("jpeg", 2, "jpeg_compression"), ("zzz", 1, "known")],
)
def test_unknown_name(name, severity, near):
    with pytest.raises(ValueError, match=near):
        corruptions.corrupt(np.zeros((8, 8, 1)), name, severity, seed=0)


@pytest.mark.parametrize("severity", [0, 6, 2.5, True, "3"])
def test_severity_outside_one_to_five(severity):
    with pytest.raises(ValueError, match="from 1"):
        corruptions.corrupt(np.zeros((8, 8, 1)), "fog", severity, seed=0)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((8, 8)), ValueError, r"\[H, W, C\]"),
        (np.zeros((2, 8, 8, 3)), ValueError, r"\[H, W, C\]"),
        (np.zeros((8, 8, 2)), ValueError, "C = 1 or 3"),
        (np.zeros((7, 8, 1)), ValueError, "at least 8 x 8"),
        (np.zeros((8, 8, 1), np.uint8), TypeError, "divide"),
        (np.full((8, 8, 1), 1.5), ValueError, r"in \[0, 1\]"),
        (np.full((8, 8, 1), -0.1), ValueError, r"in \[0, 1\]"),
        (np.full((8, 8, 1), np.nan), ValueError, "NaN"),
        (np.full((8, 8, 1), np.inf), ValueError, "infinity"),
    ],
)
def test_bad_images(image, error, message):
    with pytest.raises(error, match=message):
        corruptions.corrupt(image, "fog", 1, seed=0)


def test_bad_seeds_and_ids():
    image = np.zeros((8, 8, 1))
    with pytest.raises(ValueError, match="negative"):
        corruptions.corrupt(image, "fog", 1, seed=-1)
    with pytest.raises(TypeError, match="seed"):
        corruptions.corrupt(image, "fog", 1, seed=0.5)
    with pytest.raises(ValueError, match="one id"):
        corruptions.corrupt_batch(image[None], "fog", 1, seed=0, ids=[1, 2])


def test_black_and_white_images_stay_finite():
    for value in (0.0, 1.0):
        image = np.full((16, 16, 3), value)
        for name in NAMES:
            assert np.isfinite(corruptions.corrupt(image, name, 3, seed=0)).all()


def test_quantize_keeps_all_8_bit_values():
    levels = (np.arange(256, dtype=np.float32) / np.float32(255)).reshape(16, 16, 1)
    np.testing.assert_array_equal(common.quantize(levels.astype(np.float64)), levels)


def test_canny_finds_a_step_as_one_line():
    image = np.zeros((9, 10))
    image[:, 5:] = 200
    edges = spatter.canny(image, 50, 150)
    np.testing.assert_array_equal(edges.sum(1), np.ones(9))
    assert edges[:, 4:6].any()
    # 4 x 20 = 80 lies between the thresholds: no strong pixel, so no edge.
    assert not spatter.canny(image / 10, 50, 150).any()


def test_equalize_by_hand():
    image = np.array([[10, 10], [20, 30]], np.uint8)
    # The first level maps to 0; the other two share 255 equally (OpenCV's rule).
    np.testing.assert_array_equal(spatter.equalize(image), [[0, 0], [128, 255]])
    flat = np.full((3, 3), 7, np.uint8)
    np.testing.assert_array_equal(spatter.equalize(flat), flat)
