"""How far corruptions move a model's features, in units of the source's own scatter.

Usage::

    python -m experiments.feature_shift --workdir=W --config=C [--checkpoint=P] [--norm=batch]

compares mean and covariance of the features of test images with those of all training images, as
the moment matching of TTT++ does (``ttt_jax.methods.ttt_plus_plus``): 1 is what as many source
images would show. Features are the mean of the encoder's last map or tokens. The gradient of that
loss, and with it the largest useful step, goes with these numbers. Prints a table and appends a
line per domain to ``W/feature_shift.jsonl``, which keeps the rows of all options. At the end
``W/feature_shift.json`` holds those of the options at hand (model, norm, images, severity), of
earlier runs too, with their origin. Run it again to resume.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags

import ttt_jax as ttt
from experiments import (
    config_check,
    config_files,
    journal,
    launch,
    pristine as pristine_lib,
    provenance,
    tasks,
)
from experiments.tasks import image_order, images as image_task
from ttt_jax import data, diagnostics
from ttt_jax.source import Moments, mean_of

NORMS = ("running", "batch")
_BATCH = 256
# What of a config a row depends on beside its other fields and the model's parameters.
_MADE_WITH = ("data.name", "data.train", "data.imbalance", "data.test")
_MADE_WITH += ("adapt.corruption_seed", "model.dtype")


def moments_of(features: Any, params: Any, images: Iterable[np.ndarray]) -> Moments:
    """Mean and covariance of the features of images that come in batches.

    Args:
      features: ``(params, images[N, H, W, C]) -> [N, D]``.
      params: the model's.
      images: batches ``[N, H, W, C]``; N may differ.

    Returns:
      Those of all images, as ``ttt_jax.losses.feature_moments`` has them.
    """
    measure = ttt.losses.feature_moments(features)
    parts, counts = zip(*((measure(params, batch), len(batch)) for batch in images), strict=True)
    return mean_of(parts, counts)


def _parts(count: int) -> list[np.ndarray]:
    """Indices of images in about equal batches: a batch of one has no statistics."""
    return np.array_split(np.arange(count), -(-count // _BATCH))


def run(
    config: ml_collections.ConfigDict,
    folder: str,
    *,
    checkpoint_path: str | None = None,
    norm: str = "running",
    domains: Sequence[str] = data.corruptions.CORRUPTIONS,
    num_images: int = 1536,
) -> list[dict[str, Any]]:
    """Measures clean images and some corruptions at the config's severity.

    Args:
      config: see ``experiments/configs``.
      folder: the work folder.
      checkpoint_path: of the model; None takes the folder's own of the first seed.
      norm: statistics of a BatchNorm model, ``"running"`` or the batch's.
      domains: corruptions, each once.
      num_images: of the test split, at least 2; a smaller split is used whole.

    Returns:
      A row per domain, those of earlier runs with the same options first.

    Raises:
      UserError: a model without features, an unknown domain or norm, a choice that is empty or
        doubled, the batch's statistics for a model without BatchNorm, or too few images.
    """
    config_check.check(config)
    launch.chosen("--norm value", [norm], NORMS)
    launch.chosen("--domains value", domains, data.corruptions.CORRUPTIONS)
    seed, severity = config.seeds[0], config.adapt.severity
    data.corruptions.check_name(domains[0], severity)
    test, train = (image_task.load_data(config, split) for split in ("test", "train"))
    count = min(num_images, len(test))
    if count < 2:
        raise launch.UserError(
            "--num_images and the images of data.test must be at least 2; got "
            f"{num_images} and {len(test)} of {config.data.test!r}. Take more of both."
        )
    network = image_task.ImageModel(config, test)
    plain = network.heads(norm=norm).get("features")
    if plain is None:
        raise launch.UserError(
            f"model.name={config.model.name!r} has no features to compare; choose resnet or vit."
        )
    if norm == "batch" and not network.has_batch_norm:
        raise launch.UserError(
            "--norm=batch is for a model with BatchNorm, and this one has none; use --norm=running."
        )
    workdir = launch.open_workdir(folder)
    path = pristine_lib.paths(workdir, [seed], checkpoint_path)[seed]
    pristine = pristine_lib.load(path, tasks.build(config), config)
    features = jax.jit(plain)
    same = {
        "num_examples": count,
        "norm": norm,
        "dataset": test.title,
        "seed": seed,
        "checkpoint": pristine.fingerprint,
        "config": journal.made_with(config, _MADE_WITH),
    }

    def identity(row: dict[str, Any]) -> tuple[Any, ...]:
        # All that makes a row, so that rows of several options stay apart.
        names = ("domain", "severity", *same)
        return tuple(json.dumps(row[name], sort_keys=True) for name in names)

    with launch.locked(workdir):
        book = journal.Journal(workdir / "feature_shift.jsonl", identity=identity)
        record = workdir / "feature_shift.json"
        if record.exists() and not book.path.exists():
            raise launch.UserError(
                f"{record} has rows that {book.path} lacks, and would be replaced; move it away, "
                "or use another --workdir."
            )
        splits = {"test": test.fingerprint, "train": train.fingerprint}
        provenance.note_data(workdir, config, splits)
        wanted = {"clean": 0} | dict.fromkeys(domains, severity)
        cells = [{"domain": domain, "severity": level} for domain, level in wanted.items()]
        todo = [cell for cell in cells if book.get(**cell, **same) is None]
        if todo:
            batches = (train.take(part).image for part in _parts(len(train)))
            source = moments_of(features, pristine.params, batches)
        for cell in todo:
            batch = image_order.first_images(config, test, **cell, count=count, seed=seed)
            batches = (batch.image[part] for part in _parts(count))
            target = moments_of(features, pristine.params, batches)
            shift = diagnostics.feature_shift(source, target, count=count)
            measured = {name: float(value) for name, value in shift._asdict().items()}
            book.add(cell | measured | {"status": "ok"} | same)
        rows = [row for row in book.rows() if row["severity"] in (0, severity)]
        rows = [row for row in rows if same.items() <= row.items()]
        launch.write_json(record, provenance.of(config) | {"rows": rows})
    for row in rows:
        where = f"{row['domain']:18} {row['severity']}"
        print(f"{where}  mean {row['mean']:9.1f}  covariance {row['covariance']:9.1f}")
    return rows


def main(argv: Sequence[str]) -> None:
    """The program."""
    del argv
    run(_CONFIG.value, _WORKDIR.value, **{name: flag.value for name, flag in _FLAGS.items()})


if __name__ == "__main__":
    _CONFIG, _WORKDIR = config_files.define_flags()
    _FLAGS = {
        "checkpoint_path": flags.DEFINE_string(
            "checkpoint", None, "Default: WORKDIR/checkpoints/seed_SEED."
        ),
        "norm": flags.DEFINE_enum("norm", "running", NORMS, "Statistics of a BatchNorm model."),
        "domains": flags.DEFINE_list("domains", list(data.corruptions.CORRUPTIONS), "Corruptions."),
        "num_images": flags.DEFINE_integer("num_images", 1536, "Test images per domain."),
    }
    launch.run(main)
