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
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags

import ttt_jax as ttt
from experiments import journal, launch, pristine as pristine_lib, provenance, tasks
from experiments.tasks import image_order, images as image_task
from ttt_jax import data

NORMS = ("running", "batch")
_BATCH = 256
# What of a config a row depends on beside its other fields and the model's parameters.
_MADE_WITH = ("data.name", "data.train", "data.imbalance", "data.test")
_MADE_WITH += ("adapt.corruption_seed", "model.dtype")
# What the rows of one record share.
_SAME = ("num_examples", "norm", "dataset", "seed", "checkpoint", "config")


def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What identifies a row: all that makes it, so that rows of several options stay apart."""
    names = ("domain", "severity", *_SAME)
    return tuple(json.dumps(row[name], sort_keys=True) for name in names)


def moments_of(features: Any, params: Any, images: Iterator[np.ndarray]) -> dict[str, jax.Array]:
    """Mean and second moment of the features of images that come in batches.

    Args:
      features: ``(params, images[N, H, W, C]) -> [N, D]``.
      params: the model's.
      images: batches ``[N, H, W, C]``; N may differ.

    Returns:
      ``{"mean": [D], "outer": [D, D]}``, as ``ttt_jax.losses.feature_moments`` has them.
    """
    measure = ttt.losses.feature_moments(features)
    total: Any = None
    count = 0
    for batch in images:
        size, found = len(batch), measure(params, batch)
        weighted = {name: size * leaf for name, leaf in found.items()}
        total = weighted if total is None else jax.tree.map(jnp.add, total, weighted)
        count += size
    return jax.tree.map(lambda leaf: leaf / count, total)


def distances(source: Any, target: Any, count: int) -> tuple[float, float]:
    """How far covariance and mean lie from the source's.

    Args:
      source: ``{"mean": [D], "outer": [D, D]}`` of the source.
      target: the same of some images.
      count: how many images these are, at least 2.

    Returns:
      The distance of the covariances and that of the means, each in units of what ``count`` source
      images would show (:func:`scatter`).
    """
    covariances = [m["outer"] - jnp.outer(m["mean"], m["mean"]) for m in (source, target)]
    width = source["mean"].shape[0]
    coral = jnp.square(covariances[0] - covariances[1]).sum() / (4 * width**2)
    means = jnp.square(source["mean"] - target["mean"]).mean() / 2
    units = scatter(source, count)
    return float(coral / units[0]), float(means / units[1])


def scatter(moments: Any, count: int) -> tuple[jax.Array, jax.Array]:
    """How far the moments of ``count`` source images lie from the source's, for normal features.

    The expected ``|S - S'|_F^2 / (4 D^2)``, which is ``(|S|_F^2 + tr(S)^2) / (n - 1) / (4 D^2)``,
    and the expected ``mean((mu - mu')^2) / 2``, which is ``tr(S) / (2 n D)``.
    """
    mean = moments["mean"]
    covariance = moments["outer"] - jnp.outer(mean, mean)
    width, trace = mean.shape[0], jnp.trace(covariance)
    of_covariance = (jnp.square(covariance).sum() + trace**2) / (count - 1) / (4 * width**2)
    return of_covariance, trace / (2 * count * width)


def _batches(source: data.Source, places: np.ndarray) -> Iterator[np.ndarray]:
    """Images of about equal batches: a batch of one has no statistics."""
    for some in np.array_split(places, -(-len(places) // _BATCH)):
        yield source.take(some).image


def _opened(workdir: pathlib.Path) -> journal.Journal:
    """The rows of a folder.

    Raises:
      UserError: they would be lost, being in the record alone, which has no origin per row.
    """
    book = workdir / "feature_shift.jsonl"
    if not book.exists() and (workdir / "feature_shift.json").exists():
        raise launch.UserError(
            f"{workdir / 'feature_shift.json'} has rows that {book} lacks, and would be replaced; "
            "move it away, or use another --workdir."
        )
    return journal.Journal(book, identity=_identity)


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
    launch.check_seeds(config)
    launch.chosen("--norm value", [norm], NORMS)
    launch.chosen("--domains value", domains, data.corruptions.CORRUPTIONS)
    seed, severity = config.seeds[0], config.adapt.severity
    data.corruptions.check_name(domains[0], severity)
    if num_images < 2:
        raise launch.UserError(f"--num_images must be at least 2; got {num_images}.")
    test, train = (image_task.load_data(config, split) for split in ("test", "train"))
    count = min(num_images, len(test))
    if count < 2:
        raise launch.UserError(
            f"data.test must have at least 2 images; {config.data.test!r} has {count}. Take more, "
            "as --config.data.test='test'."
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
    path = checkpoint_path or pristine_lib.path_of(workdir, seed)
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
    with launch.locked(workdir):
        book = _opened(workdir)
        wanted = [("clean", 0), *((domain, severity) for domain in domains)]
        cells = [{"domain": domain, "severity": level} for domain, level in wanted]
        todo = [cell for cell in cells if book.get(**cell, **same) is None]
        if todo:
            everything = _batches(train, np.arange(len(train)))
            source = moments_of(features, pristine.params, everything)
        for cell in todo:
            batch = image_order.first_images(config, test, **cell, count=count, seed=seed)
            parts = iter(np.array_split(batch.image, -(-count // _BATCH)))
            found = moments_of(features, pristine.params, parts)
            covariance, mean = distances(source, found, count)
            measured = {"mean": mean, "covariance": covariance, "status": "ok"}
            book.add(cell | measured | same)
        rows = [
            row
            for row in book.rows()
            if row["severity"] in (0, severity) and {name: row[name] for name in _SAME} == same
        ]
        launch.write_json(workdir / "feature_shift.json", provenance.of(config) | {"rows": rows})
    for row in rows:
        where = f"{row['domain']:18} {row['severity']}"
        print(f"{where}  mean {row['mean']:9.1f}  covariance {row['covariance']:9.1f}")
    return rows


def main(argv: Sequence[str]) -> None:
    """The program."""
    del argv
    run(
        _CONFIG.value,
        _WORKDIR.value,
        checkpoint_path=_CHECKPOINT.value,
        norm=_NORM.value,
        domains=_DOMAINS.value,
        num_images=_NUM_IMAGES.value,
    )


if __name__ == "__main__":
    _CONFIG, _WORKDIR = launch.define_flags()
    _CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Default: WORKDIR/checkpoints/seed_SEED.")
    _NORM = flags.DEFINE_enum("norm", "running", NORMS, "Statistics of a BatchNorm model.")
    _DOMAINS = flags.DEFINE_list("domains", list(data.corruptions.CORRUPTIONS), "Corruptions.")
    _NUM_IMAGES = flags.DEFINE_integer("num_images", 1536, "Test images per domain.")
    launch.run(main)
