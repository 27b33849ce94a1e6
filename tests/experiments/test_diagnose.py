"""The numbers of the diagnostics program and its page, recomputed by other means."""

import base64
import json
import re
import shutil
import statistics
from xml.etree import ElementTree

import jax
import ml_collections
import numpy as np
import pytest

import ttt_jax as ttt
from docs import alignment as results_page
from experiments import diagnose, pristine
from experiments.report import alignment, committed
from experiments.tasks import image_order
from experiments.tasks.images import ImageModel, load_data
from tests.experiments import tiny_config
from tests.experiments.diagnosed import OPTIONS, PRIOR, RATES, get_config
from ttt_jax import checkpoint, data, models

pytestmark = pytest.mark.usefixtures("dense")
LABELED_MAPS = {"entropy_map", "effective_classes_map", "oracle_error_map"}


@pytest.fixture(scope="module")
def by_hand(dense_folder):
    """The cell (fog, 5) with its model, outside of the program."""
    config = get_config()
    source = load_data(config, "test")
    built = ImageModel(config, source)
    variables = checkpoint.load(dense_folder / "checkpoints" / "seed_0").params
    plan = data.streams.shuffled(source, seed=0, domain="fog", severity=5)
    examples = [source[int(i)] for i in plan.index[:3]]
    images = np.stack(
        [data.corruptions.corrupt(e.image, "fog", 5, seed=(0, e.id)) for e in examples]
    )
    labels = np.asarray([e.label for e in examples])
    keys = [jax.random.fold_in(jax.random.key(0), e.id) for e in examples]
    return built, variables, images, labels, keys


def row_of(record, domain, severity):
    (row,) = [r for r in record["rows"] if (r["domain"], r["severity"]) == (domain, severity)]
    return row


def heads_of(built):
    return built.heads(norm=PRIOR, private=True)


def rotation_loss(built):
    return ttt.losses.rotation(heads_of(built)["rotation"], copies=2, augment=built.view)


def test_a_row_per_cell_with_its_origin(diagnosed):
    folder, record = diagnosed
    lines = (folder / "diagnostics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == record["rows"]
    assert json.loads((folder / "diagnostics.json").read_text()) == record
    assert {"command", "device", "device_count", "versions", "commit"} <= set(record)
    cells = [(row["domain"], row["severity"]) for row in record["rows"]]
    assert cells == [("contrast", 1), ("fog", 1), ("contrast", 5), ("fog", 5)]
    for row in record["rows"]:
        assert row["learning_rates"] == list(RATES) and row["num_examples"] == 3
        assert row["settings"]["learning_rate"] == 0.03 and row["non_finite"] == 0
        for name in LABELED_MAPS:
            assert np.shape(row[name]) == (3, 3)
    # Compiled once, for the first cell.
    assert [row["compile_seconds"] > 0.01 for row in record["rows"]] == [True, *3 * [False]]


def flat(params):
    """What both heads read: normalization and heads belong to one loss."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params["params"]["encoder"])])


def test_alignment_is_that_of_plain_gradients(diagnosed, by_hand):
    built, variables, images, labels, keys = by_hand
    apply = models.from_linen(built.private.module, norm=PRIOR)

    def main(params, image, label):
        logits = apply(params, (image[None] - 0.5) / 0.5)[0]
        return jax.nn.logsumexp(logits) - logits[label]

    main_grad, aux_grad = jax.jit(jax.grad(main)), jax.jit(jax.grad(rotation_loss(built)))
    inner, cosine, norms = [], [], []
    for image, label, key in zip(images, labels, keys, strict=True):
        g = flat(main_grad(variables, image, label)).astype(np.float64)
        h = flat(aux_grad(variables, image, jax.random.fold_in(key, 0))).astype(np.float64)
        inner.append(g @ h)
        norms.append(np.sqrt([g @ g, h @ h]))
        cosine.append(g @ h / norms[-1].prod())
    row = row_of(diagnosed[1], "fog", 5)
    assert row["inner_product"] == pytest.approx(np.mean(inner), rel=1e-4)
    assert row["cosine"] == pytest.approx(np.mean(cosine), rel=1e-4)
    measured = [row["main_norm"], row["aux_norm"]]
    assert measured == pytest.approx(np.mean(norms, axis=0).tolist(), rel=1e-4)
    assert row["aligned_share"] == pytest.approx(np.mean(np.array(inner) > 0))


def test_errors_gain_and_monitors_by_hand(diagnosed, by_hand):
    built, variables, images, labels, keys = by_hand
    heads = heads_of(built)
    classify, rotate = jax.jit(heads["classify"]), jax.jit(heads["rotation"])
    grad = jax.jit(jax.grad(rotation_loss(built)))
    before, after, moved, right = [], [], [], []
    for image, key in zip(images, keys, strict=True):
        params = variables["params"]
        for step in range(2):
            grads = grad({**variables, "params": params}, image, jax.random.fold_in(key, step))
            params = jax.tree.map(lambda p, g: p - 0.03 * g, params, grads["params"])
        trees = [variables, {**variables, "params": params}]
        before.append(classify(trees[0], image[None])[0])
        after.append(classify(trees[1], image[None])[0])
        start, end = map(flat, trees)
        moved.append(np.linalg.norm(end - start) / np.linalg.norm(start))
        turned = np.stack([np.rot90(image, k) for k in range(4)])
        right.append([(rotate(tree, turned).argmax(-1) == np.arange(4)).mean() for tree in trees])
    before, after = np.asarray(before), np.asarray(after)
    wrong, still = before.argmax(-1) != labels, after.argmax(-1) != labels
    row = row_of(diagnosed[1], "fog", 5)
    assert row["source_error"] == pytest.approx(wrong.mean())
    assert row["ttt_error"] == pytest.approx(still.mean())
    assert row["gain"] == pytest.approx(wrong.mean() - still.mean(), abs=1e-7)
    assert row["turned_right"] == pytest.approx((wrong & ~still).mean())
    assert row["turned_wrong"] == pytest.approx((~wrong & still).mean())
    assert row["agreement"] == pytest.approx((before.argmax(-1) == after.argmax(-1)).mean())
    assert row["drift"] == pytest.approx(np.mean(moved), rel=1e-3)
    measured = [row["auxiliary_accuracy_before"], row["auxiliary_accuracy_after"]]
    assert measured == pytest.approx(np.mean(right, axis=0).tolist())
    for place, logits in ((0, before), (-1, after)):
        p = np.exp(logits.astype(np.float64))
        p /= p.sum(-1, keepdims=True)
        entropy, mean = -(p * np.log(p)).sum(-1).mean(), p.mean(0)
        assert row["entropy_map"][1][place] == pytest.approx(entropy, rel=1e-4)
        classes = np.exp(-(mean * np.log(mean)).sum())
        assert row["effective_classes_map"][1][place] == pytest.approx(classes, rel=1e-4)
    assert row["effective_classes_after"] == pytest.approx(classes, rel=1e-4)
    for name, logits in (("before", before), ("after", after)):
        shares = np.unique(logits.argmax(-1), return_counts=True)[1] / len(labels)
        expected = np.exp(-(shares * np.log(shares)).sum())
        assert row[f"predicted_classes_{name}"] == pytest.approx(expected, rel=1e-4)


def test_choices_come_from_the_maps(diagnosed):
    for row in diagnosed[1]["rows"]:
        errors, entropy = np.array(row["oracle_error_map"]), np.array(row["entropy_map"])
        classes = np.array(row["effective_classes_map"])
        assert errors[1, -1] == pytest.approx(row["ttt_error"])
        assert errors[:, 0] == pytest.approx(row["source_error"])
        assert row["oracle_error"] == pytest.approx(errors.min())
        place = RATES.index(row["oracle_learning_rate"]), row["oracle_num_steps"]
        assert errors[place] == errors.min()
        allowed = np.where(classes >= 0.9 * classes[0, 0], entropy, np.inf)
        place = RATES.index(row["label_free_learning_rate"]), row["label_free_num_steps"]
        assert allowed[place] == allowed.min()
        assert row["label_free_error"] == pytest.approx(errors[place])


def test_another_method_has_rows_of_its_own(diagnosed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(diagnosed[0], folder)
    config = get_config()
    memo = {
        "method": "memo",
        "augment": "crops",
        "trace": True,
        "num_views": 2,
        "num_steps": 1,
        "learning_rate": (0.03,),
        "select": "all",
        "prior": PRIOR,
    }
    config.methods.memo_crops = ml_collections.ConfigDict(memo)
    config.adapt.corruption_seed = 7  # another method's rows may be about other images
    before = (folder / "diagnostics.jsonl").read_text()
    record = diagnose.run(
        config, str(folder), OPTIONS._replace(method="memo_crops", severities=(5,))
    )
    assert [row["method"] for row in record["rows"]] == ["memo_crops", "memo_crops"]
    # Its task is that of the method, whatever the entry is called.
    assert config.methods.rotation.method == "ttt_rotation"
    assert "auxiliary_accuracy_after" in diagnosed[1]["rows"][0]
    assert "auxiliary_accuracy_after" not in record["rows"][0]
    assert record["rows"][0]["settings"]["augment"] == "crops" and record["rows"][0]["aux_norm"] > 0
    # Contrast draws nothing: there both met the same images.
    of_both = (row_of(found, "contrast", 5)["source_error"] for found in (record, diagnosed[1]))
    assert len(set(of_both)) == 1
    # Two sets are too few; with the four of rotation there would be a correlation.
    assert record["correlation"] == {"inner_product_and_gain": None, "sets": 2}
    after = (folder / "diagnostics.jsonl").read_text()
    assert after.startswith(before) and len(after.splitlines()) == 6
    # And the record of the first method can be had again.
    assert diagnose.run(get_config(), str(folder), OPTIONS)["rows"] == diagnosed[1]["rows"]
    assert (folder / "diagnostics.jsonl").read_text() == after


def test_masked_reconstruction_is_aligned_in_the_encoder(tmp_path):
    config = tiny_config.get_mae_config()
    config.model = {"name": "dense_mae"}
    config.methods.mae.learning_rate = (0.03,)
    source = load_data(config, "test")
    built = ImageModel(config, source)
    heads, variables = built.heads(private=True), jax.jit(built.init)(jax.random.key(0))
    checkpoint.save(pristine.path_of(tmp_path, 0), variables, metadata=pristine.metadata(config))
    options = diagnose.Options(
        method="mae", severities=(5,), corruptions=("fog",), num_images=2, learning_rates=(0.03,)
    )
    (row,) = diagnose.run(config, str(tmp_path), options)["rows"]
    batch = image_order.first_images(config, source, "fog", 5, count=2, seed=0)

    def reconstruct(params, image, label, key):
        loss = ttt.losses.masked_reconstruction(
            heads["reconstruct"], patch=4, mask_ratio=0.5, num_masks=2
        )
        return loss(params, image, jax.random.fold_in(key, 0))

    def main(params, image, label, key):
        return -jax.nn.log_softmax(heads["classify"](params, image[None])[0])[label]

    @jax.jit
    def product(*example):
        grads = [
            jax.grad(loss)(variables, *example)["params"]["encoder"] for loss in (reconstruct, main)
        ]
        return sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), *grads)))

    keys = [jax.random.fold_in(jax.random.key(0), number) for number in batch.id]
    inner = [product(*example) for example in zip(batch.image, batch.label, keys, strict=True)]
    assert row["inner_product"] == pytest.approx(float(np.mean(inner)), rel=1e-3)
    assert row["ttt_error"] is not None and "auxiliary_accuracy_before" not in row


def test_the_committed_rows_are_readable():
    record = committed.read("alignment_cifar10c")
    assert len(record["rows"]) == 75 and "config" not in record["rows"][0]
    assert "r = 0.91" in results_page.markdown(record) and "r = 0.91" in alignment.render(record)


def test_the_share_of_noise_in_the_gains():
    def row(right, wrong):
        turned = {"turned_right": right, "turned_wrong": wrong, "gain": right - wrong}
        return turned | {"num_examples": 100}

    # Gains 0.1, 0.2 and 0.3: variance 2/300; of an image 0.09, 0.16 and 0.25.
    rows = [row(0.1, 0.0), row(0.2, 0.0), row(0.32, 0.02)]
    assert results_page.noise_share(rows) == pytest.approx(0.005 / 3 / (0.02 / 3))
    assert results_page.noise_share(rows[:2]) is None
    assert results_page.noise_share([row(0.1, 0.0)] * 3) is None
    # Fewer images, more noise, but no more than there is variance.
    assert results_page.noise_share([r | {"num_examples": 1} for r in rows]) == 1


def test_correlation_and_scatter(diagnosed):
    def row(inner, gain, severity=1):
        where = {"domain": "fog", "severity": severity, "seed": 0}
        return where | {"inner_product": inner, "gain": gain}

    rows = [row(1.0, 0.02), row(2.0, 0.03), row(4.0, 0.01, 5), row(None, 0.5)]
    # Deviations -4/3, -1/3, 5/3 and 0, 1, -1: covariance -2, squares 42/9 and 2.
    assert alignment.correlation(rows) == pytest.approx(-2 / np.sqrt(42 / 9 * 2))
    assert alignment.correlation(rows[:2]) is None
    assert alignment.correlation([row(1.0, g) for g in (0.1, 0.2, 0.3)]) is None
    drawing = alignment.scatter(rows).to_dict()
    assert drawing["title"] == "r = -0.65, 3 sets"
    (held,) = drawing["datasets"].values()
    assert [one["gain"] for one in held] == [2.0, 3.0, 1.0] and held[2]["severity"] == 5
    folder, record = diagnosed
    section = results_page.markdown(record)
    ones = [r for r in record["rows"] if r["severity"] == 1]
    gain = 100 * statistics.mean(r["gain"] for r in ones)
    assert len(ones) == 2 and section.splitlines()[-2].startswith("| 1 | ")
    assert section.splitlines()[-2].endswith(f" {gain:.2f} |") and "[Diagnostics]" in section
    (coded,) = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', section)
    drawing = ElementTree.fromstring(base64.b64decode(coded))
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    marks = [one for one in drawing.iter() if "point" == one.get("aria-roledescription")]
    assert len(marks) == len(record["rows"])
    pairs = [(r["inner_product"], r["gain"]) for r in record["rows"]]
    r = record["correlation"]["inner_product_and_gain"]
    if len({gain for _, gain in pairs}) == 1:
        assert r is None
    else:
        assert r == pytest.approx(statistics.correlation(*zip(*pairs, strict=True)))
    page = (folder / "diagnostics.html").read_text()
    assert "<img" in page and "r = 0.93" in page
    assert "http" not in page.replace("http://www.w3.org", "")
