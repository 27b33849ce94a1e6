"""The corruptions against the published definitions: constants, small references, TFDS."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from ttt_jax.data import corruptions
from ttt_jax.data.corruptions import blur, common

SIZES = [32, 224]


def out(image, name, severity, seed=0):
    return corruptions.corrupt(image, name, severity, seed=seed)


def shipped(name):
    """A corruption function of tensorflow_datasets, on uint8 images; uses the global generator."""
    module = pytest.importorskip("tensorflow_datasets.image_classification.corruptions")

    def run(image, severity):
        np.random.seed(0)  # noqa: NPY002
        return getattr(module, name)(np.rint(image * 255), severity) / 255.0

    return run


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("name", "small", "large"),
    [
        ("gaussian_noise", (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
        ("speckle_noise", (0.06, 0.1, 0.12, 0.16, 0.2), (0.15, 0.2, 0.35, 0.45, 0.6)),
        ("shot_noise", (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    ],
)
def test_noise_levels(size, name, small, large):
    count = 12 if size == 32 else 1
    value = 0.5 if name == "gaussian_noise" else 0.3
    for severity, constant in enumerate(small if size == 32 else large, 1):
        images = np.full((count, size, size, 3), value)
        noisy = corruptions.corrupt_batch(images, name, severity, seed=1, ids=np.arange(count))
        sigma = {
            "gaussian_noise": constant,
            "speckle_noise": constant * value,
            "shot_noise": np.sqrt(value / constant),
        }[name]
        if sigma < 0.15:  # beyond that, clipping narrows it
            assert np.std(noisy) == pytest.approx(sigma, rel=0.03)
            assert np.mean(noisy) == pytest.approx(value - 0.5 / 255, abs=0.004)


@pytest.mark.parametrize("size", SIZES)
def test_impulse_share(size):
    for severity, (small, large) in enumerate(
        zip((0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27), strict=True), 1
    ):
        images = np.full((8 if size == 32 else 1, size, size, 3), 0.4)
        ids = np.arange(len(images))
        noisy = corruptions.corrupt_batch(images, "impulse_noise", severity, seed=0, ids=ids)
        share = small if size == 32 else large
        assert np.mean(noisy == 0) == pytest.approx(share / 2, rel=0.2)
        assert np.mean(noisy == 1) == pytest.approx(share / 2, rel=0.2)


def test_contrast_by_hand():
    image = np.zeros((32, 32, 3))
    image[:16] = [1.0, 0.8, 0.4]
    # Means 0.5, 0.4, 0.2; severity 5 leaves 0.15 of the contrast: 0.575, 0.46, 0.23.
    result = out(image, "contrast", 5)
    np.testing.assert_allclose(result[0, 0] * 255, np.floor([146.625, 117.3, 58.65]))
    np.testing.assert_allclose(result[-1, 0] * 255, np.floor([108.375, 86.7, 43.35]))


def test_brightness_by_hand():
    image = np.zeros((32, 32, 3))
    image[0, 0] = [0.5, 0.25, 0.1]
    image[0, 1] = [0.9, 0.45, 0.0]
    result = out(image, "brightness", 5) * 255  # V + 0.3, hue and saturation kept
    np.testing.assert_allclose(
        result[0, 0], np.floor([204.0 + 1e-3, 102.0 + 1e-3, 40.8]), atol=1e-3
    )
    np.testing.assert_allclose(result[0, 1], [255, 127, 0], atol=1e-3)  # V is clipped at 1
    np.testing.assert_allclose(result[5, 5], [76, 76, 76], atol=1e-3)  # black turns gray


def test_saturate_by_hand():
    image = np.full((32, 32, 3), 0.6)
    image[0, 0] = [0.8, 0.4, 0.4]
    # S = 0.5; severity 5: 2.5 * 0.5 + 0.2 > 1, so fully saturated.
    np.testing.assert_allclose(out(image, "saturate", 5)[0, 0] * 255, [204, 0, 0], atol=1e-3)
    # Severity 1: S = 0.15, so 0.8 * 0.85 = 0.68.
    np.testing.assert_allclose(out(image, "saturate", 1)[0, 0] * 255, [204, 173, 173], atol=1e-3)
    # Gray counts as red: S = 0.2, 0.6 * 0.8 = 0.48.
    np.testing.assert_allclose(out(image, "saturate", 5)[9, 9] * 255, [153, 122, 122], atol=1e-3)


@pytest.mark.parametrize(("size", "quality"), [(32, 40), (224, 7)])
def test_jpeg_is_pillow_at_the_published_quality(size, quality, scene):
    image = scene(size)
    file = io.BytesIO()
    Image.fromarray(np.rint(image * 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    expected = np.asarray(Image.open(file)) / np.float32(255)
    np.testing.assert_array_equal(out(image, "jpeg_compression", 5), expected)


def test_pixelate_by_hand():
    image = np.zeros((32, 32, 1))
    image[:8] = 1.0
    # 224-pixel set, 0.25: every 4 x 4 block becomes its mean.
    large = np.kron(image[..., 0], np.ones((8, 8)))[:224, :224, None]
    large[::2] = 0
    result = out(large, "pixelate", 5)
    assert set(np.unique(np.rint(result * 255))) == {0, 128}
    # 32-pixel set, 0.65: 20 x 20 cells.
    rows = np.unique(np.argmax(out(np.eye(32)[..., None], "pixelate", 5)[..., 0], axis=1))
    assert len(rows) <= 20


def test_zoom_blur_is_the_mean_of_scipy_zooms(scene):
    image = scene(32)
    factors = np.arange(1, 1.26, 0.01)
    total = image.copy()
    for factor in factors:
        kept = int(np.ceil(32 / factor))
        top = (32 - kept) // 2
        crop = image[top : top + kept, top : top + kept]
        zoomed = ndimage.zoom(crop, (factor, factor, 1), order=1)
        trim = (zoomed.shape[0] - 32) // 2
        total += zoomed[trim : trim + 32, trim : trim + 32]
    expected = common.quantize(total / (len(factors) + 1))
    assert np.abs(out(image, "zoom_blur", 5) - expected).max() <= 1.01 / 255
    assert np.mean(out(image, "zoom_blur", 5) != expected) < 0.01


def test_gaussian_blur_is_scipy(scene):
    image = scene(224)
    expected = ndimage.gaussian_filter(image, (6, 6, 0), mode="nearest", truncate=4)
    np.testing.assert_array_equal(out(image, "gaussian_blur", 5), common.quantize(expected))


def test_defocus_kernels():
    # Severity 5 of the 224-pixel set: a disk of radius 10 px, edges softened by sigma 0.5.
    kernel = blur.defocus_kernel(10, 0.5, 1.0)
    line = np.arange(-10, 11)
    inside = line[:, None] ** 2 + line[None] ** 2 <= 100
    assert kernel.shape == (21, 21) and kernel.sum() == pytest.approx(1.01, abs=0.005)
    assert kernel[10, 10] == pytest.approx(1 / inside.sum(), rel=1e-6)
    # Severity 5 of the 32-pixel set: all nine pixels within radius 1.5, hardly softened.
    np.testing.assert_allclose(
        blur.defocus_kernel(1.5, 0.1, 1.0), np.full((3, 3), 1 / 9), atol=1e-6
    )
    # Severity 1: one pixel softened by sigma 0.4 over three taps.
    taps = np.exp(-np.array([1, 0, 1]) / (2 * 0.4**2))
    taps /= taps.sum()
    np.testing.assert_allclose(blur.defocus_kernel(0.3, 0.4, 1.0), np.outer(taps, taps), atol=1e-9)


def test_shrunk_defocus_gathers_by_overlap():
    # At half scale the outer cells of a 3 x 3 box lie half outside the middle pixel.
    side = np.array([1 / 6, 2 / 3, 1 / 6])
    np.testing.assert_allclose(blur.defocus_kernel(1.5, 0.1, 0.5), np.outer(side, side), atol=1e-6)


def test_motion_is_a_one_sided_gaussian():
    image = np.zeros((21, 21, 1))
    image[10, 10] = 1
    moved = common.motion(image, 5, 2, 0.0)[..., 0]
    weights = np.exp(-(np.arange(11) ** 2) / 8)
    expected = np.zeros((21, 21))
    expected[10, :11] = (weights / weights.sum())[::-1]
    np.testing.assert_allclose(moved, expected, atol=1e-3)
    # Along 90 degrees the streak is vertical, and constant images stay what they are.
    assert np.flatnonzero(common.motion(image, 5, 2, 90.0)[..., 0].sum(0) > 1e-9).tolist() == [10]
    flat = np.full((12, 9, 3), 0.3)
    np.testing.assert_allclose(common.motion(flat, 15, 12, 33.0), flat)


def test_glass_blur_moves_pixels_by_at_most_its_reach(scene):
    # Severity 1 at 32 pixels has sigma 0.05, that is no blur: pixels only change places.
    image = scene(32)
    result = out(image, "glass_blur", 1)
    known = {tuple(p) for p in np.rint(image.reshape(-1, 3) * 255).astype(int)}
    assert {tuple(p) for p in np.rint(result.reshape(-1, 3) * 255).astype(int)} <= known
    # The published loop leaves the first row and column and the last ones' places alone.
    np.testing.assert_array_equal(result[:2, :2], image[:2, :2].astype(np.float32))
    assert np.mean(result != image.astype(np.float32)) > 0.3


def test_elastic_severity_one_is_affine():
    # No displacement at 32 pixels, severity 1: a linear ramp stays linear inside.
    y, x = np.mgrid[:32, :32] / 64
    ramp = (0.25 + y + 0 * x)[..., None]
    inner = out(ramp, "elastic_transform", 1)[10:22, 10:22, 0].astype(np.float64)
    basis = np.column_stack([y[10:22, 10:22].ravel(), x[10:22, 10:22].ravel(), np.ones(144)])
    rest = inner.ravel() - basis @ np.linalg.lstsq(basis, inner.ravel(), rcond=None)[0]
    assert np.abs(rest).max() < 1.5 / 255


def test_plasma_fills_the_range_and_gets_smoother():
    rng = np.random.default_rng(0)
    rough, smooth = (
        np.stack([common.plasma(64, decay, rng) for _ in range(6)]) for decay in (1.4, 3.0)
    )
    for fields in (rough, smooth):
        assert (fields.min((1, 2)) == 0).all() and (fields.max((1, 2)) == 1).all()
    assert np.abs(np.diff(rough)).mean() > 1.6 * np.abs(np.diff(smooth)).mean()


def test_spatter_is_mud_from_severity_four(scene):
    image = scene(32)
    assert (out(image, "spatter", 3) >= image - 1.1 / 255).all()  # water only adds light
    changed = np.abs(out(image, "spatter", 5) - image).max(-1) > 0.02
    assert 0.01 < changed.mean() < 0.4


def test_frost_adds_ice_of_about_half_gray():
    images = np.zeros((60, 32, 32, 3))
    ice = corruptions.corrupt_batch(images, "frost", 5, seed=0, ids=np.arange(60))
    assert np.mean(ice) / 0.45 == pytest.approx(0.5, abs=0.12)
    assert np.std(ice, axis=(1, 2, 3)).min() > 0.02
    assert np.mean(ice[..., 2]) > np.mean(ice[..., 0])  # bluish


# -- against the functions that ship with tensorflow_datasets (224 pixels, rounded to 8 bits) --


@pytest.mark.parametrize("name", ["contrast", "zoom_blur"])
def test_equals_tfds(name, scene):
    image = scene(224)
    for severity in (1, 5) if name == "contrast" else (5,):
        difference = out(image, name, severity) - shipped(name)(image, severity)
        assert np.abs(difference).max() <= 1.01 / 255  # truncated here, rounded there


def test_jpeg_equals_tfds(scene):
    for severity in (1, 4):
        expected = shipped("jpeg_compression")(scene(224), severity)
        np.testing.assert_allclose(
            out(scene(224), "jpeg_compression", severity), expected, atol=1e-6
        )


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("gaussian_noise", 0.006),
        ("shot_noise", 0.006),
        ("speckle_noise", 0.006),
        ("pixelate", 0.01),  # bicubic there, box in the original script
    ],
)
def test_statistics_of_tfds(name, tolerance, scene):
    image = scene(224)
    for severity in (1, 5):
        ours, theirs = out(image, name, severity), shipped(name)(image, severity)
        assert np.mean(ours) == pytest.approx(np.mean(theirs), abs=tolerance)
        assert np.std(ours - image) == pytest.approx(np.std(theirs - image), abs=3 * tolerance)


def test_fog_statistics_of_tfds(scene):
    image = scene(224)
    module = pytest.importorskip("tensorflow_datasets.image_classification.corruptions")
    np.random.seed(0)  # noqa: NPY002
    bytes_ = np.rint(image * 255)
    theirs = np.mean([np.mean(module.fog(bytes_, 4)) / 255 for _ in range(6)])
    ours = np.mean([np.mean(out(image, "fog", 4, seed=s)) for s in range(6)])
    assert ours == pytest.approx(theirs, abs=0.06)


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("brightness", "skimage"),
        ("saturate", "skimage"),
        ("gaussian_blur", "skimage"),
        ("defocus_blur", "cv2"),
    ],
)
def test_equals_tfds_where_its_tools_are_installed(name, needs, scene):
    pytest.importorskip(needs)
    difference = out(scene(224), name, 4) - shipped(name)(scene(224), 4)
    assert np.abs(difference).max() <= 1.01 / 255
