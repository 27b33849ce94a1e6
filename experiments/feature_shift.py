"""How far corruptions move a model's features, in units of the source's own scatter.

Usage::

    python -m experiments.feature_shift --workdir=W --config=C [--checkpoint=P] [--norm=batch]

compares mean and covariance of the features of test images with those of all training images, as
the moment matching of TTT++ does (``experiments/methods/contrastive.py``): 1 is what as many source
images would show. Features are the mean of the encoder's last map or tokens. The gradient of that
loss, and with it the largest useful step, goes with these numbers. Prints a table and writes
``W/feature_shift.json``; run again, it keeps the rows of the same model, norm and images.
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
from experiments import launch, problem as problem_lib
from experiments.methods import contrastive
from ttt_jax import data

NORMS = ("running", "batch")
_BATCH = 256


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
      images would show (:func:`experiments.methods.contrastive.scatter`).
    """
    covariances = [m["outer"] - jnp.outer(m["mean"], m["mean"]) for m in (source, target)]
    width = source["mean"].shape[0]
    coral = jnp.square(covariances[0] - covariances[1]).sum() / (4 * width**2)
    means = jnp.square(source["mean"] - target["mean"]).mean() / 2
    units = contrastive.scatter(source, count)
    return float(coral / units[0]), float(means / units[1])


def _batches(source: data.Source, places: np.ndarray) -> Iterator[np.ndarray]:
    """Images of about equal batches: a batch of one has no statistics."""
    for some in np.array_split(places, -(-len(places) // _BATCH)):
        yield source.take(some).image


def _kept(path: pathlib.Path, like: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run that agree with some fields."""
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())["rows"]
        return [row for row in rows if {name: row[name] for name in like} == like]
    except (ValueError, KeyError, TypeError) as error:
        raise launch.UserError(f"{path} is damaged ({error!r}); remove it.") from error


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
      domains: corruptions.
      num_images: of the test split, at least 2; a smaller split is used whole.

    Returns:
      A row per domain, those of earlier runs first.

    Raises:
      UserError: a model without features, an unknown domain or norm, the batch's statistics for a
        model without BatchNorm, or too few images.
    """
    launch.chosen("norm", [norm], NORMS)
    launch.chosen("domain", domains, data.corruptions.CORRUPTIONS)
    if num_images < 2:
        raise launch.UserError(f"--num_images must be at least 2; got {num_images}.")
    test, train = (problem_lib.load_data(config, split) for split in ("test", "train"))
    problem = problem_lib.build(config, test, shared_kernels=True)
    plain = problem.model(norm).features
    if plain is None:
        raise launch.UserError(
            f"model.name={config.model.name!r} has no features to compare; choose resnet or vit."
        )
    if norm == "batch" and not problem_lib.has_batch_norm(problem):
        raise launch.UserError(
            "--norm=batch is for a model with BatchNorm, and this one has none; use --norm=running."
        )
    workdir = launch.open_workdir(folder)
    seed, severity = config.seeds[0], config.adapt.severity
    path = checkpoint_path or problem_lib.checkpoint_path(workdir, seed)
    pristine = problem_lib.load_checkpoint(path, problem, config)
    features = jax.jit(plain)
    count = min(num_images, len(test))
    same = {"num_examples": count, "norm": norm, "dataset": test.title, "seed": seed}
    same["checkpoint"] = pristine.fingerprint
    target = workdir / "feature_shift.json"
    with launch.locked(workdir):
        rows = _kept(target, same)
        there = {(row["domain"], row["severity"]) for row in rows}
        wanted = [("clean", 0), *((domain, severity) for domain in domains)]
        todo = [cell for cell in wanted if cell not in there]
        if todo:
            everything = _batches(train, np.arange(len(train)))
            source = moments_of(features, pristine.params, everything)
        for domain, level in todo:
            plan = data.streams.shuffled(test, seed=seed, domain=domain, severity=level)
            plan = data.streams.Plan(*(column[:count] for column in plan))
            loader = data.Loader(test, plan, batch_size=count, seed=config.adapt.corruption_seed)
            corrupted = np.asarray(next(iter(loader)).image)
            parts = iter(np.array_split(corrupted, -(-count // _BATCH)))
            found = moments_of(features, pristine.params, parts)
            covariance, mean = distances(source, found, count)
            row = {"domain": domain, "severity": level, "mean": mean, "covariance": covariance}
            rows.append(row | same)
            record = launch.provenance(config) | {"rows": rows}
            launch.write_json(target, record)
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
