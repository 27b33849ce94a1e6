"""How far corruptions move a model's features, in units of the source's own scatter.

Usage::

    python -m experiments.feature_shift --workdir=W --config=C [--checkpoint=P] [--norm=batch]

compares mean and covariance of the features of test images with those of training images, as the
moment matching of TTT++ does (``experiments/methods/contrastive.py``): 1 is what as many source
images would show. The gradient of that loss, and with it the largest useful step, goes with these
numbers. Prints a table and writes ``W/feature_shift.json``.
"""

import json
import pathlib
from collections.abc import Sequence
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


def moments_of(features: Any, params: Any, images: np.ndarray) -> dict[str, jax.Array]:
    """Mean and second moment of the features of images, in batches."""
    measure = ttt.losses.feature_moments(features)
    parts = [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
    found = [measure(params, part) for part in parts]
    weights = jnp.array([len(part) for part in parts]) / len(images)
    return jax.tree.map(lambda *leaves: jnp.tensordot(weights, jnp.stack(leaves), 1), *found)


def distances(source: Any, target: Any, count: int) -> tuple[float, float]:
    """Distances of covariance and mean, each in units of what ``count`` source images show."""
    covariances = [m["outer"] - jnp.outer(m["mean"], m["mean"]) for m in (source, target)]
    width = source["mean"].shape[0]
    coral = jnp.square(covariances[0] - covariances[1]).sum() / (4 * width**2)
    means = jnp.square(source["mean"] - target["mean"]).mean() / 2
    units = contrastive.scatter(source, count)
    return float(coral / units[0]), float(means / units[1])


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
      num_images: of the test and of the training split, at least 2.

    Returns:
      A row per domain.

    Raises:
      UserError: a model without features, an unknown domain or norm, or too few images.
    """
    launch.chosen("norm", [norm], NORMS)
    launch.chosen("domain", domains, data.corruptions.CORRUPTIONS)
    if num_images < 2:
        raise launch.UserError(f"--num_images must be at least 2; got {num_images}.")
    workdir = launch.open_workdir(folder)
    test, train = (problem_lib.load_data(config, split) for split in ("test", "train"))
    problem = problem_lib.build(config, test, shared_kernels=True)
    seed = config.seeds[0]
    path = checkpoint_path or problem_lib.checkpoint_path(workdir, seed)
    pristine = problem_lib.load_checkpoint(path, problem, config)
    plain = problem.model(norm).features
    if plain is None:
        raise launch.UserError(
            f"model.name={config.model.name!r} has no features to compare; choose resnet or vit."
        )
    features = jax.jit(plain)
    count = min(num_images, len(test), len(train))
    source = moments_of(features, pristine.params, train.take(np.arange(count)).image)
    rows = []
    for domain in ("clean", *domains):
        severity = 0 if domain == "clean" else config.adapt.severity
        plan = data.streams.shuffled(test, seed=seed, domain=domain, severity=severity)
        plan = data.streams.Plan(*(column[:count] for column in plan))
        loader = data.Loader(test, plan, batch_size=count, seed=config.adapt.corruption_seed)
        target = moments_of(features, pristine.params, next(iter(loader)).image)
        covariance, mean = distances(source, target, count)
        rows.append(
            {"domain": domain, "severity": severity, "num_examples": count, "norm": norm}
            | {"mean": mean, "covariance": covariance}
            | {"dataset": test.title, "seed": seed, "checkpoint": pristine.fingerprint}
        )
        print(f"{domain:18} mean {mean:9.1f}  covariance {covariance:9.1f}", flush=True)
    record = launch.provenance(config) | {"rows": rows}
    text = json.dumps(record, indent=1) + "\n"
    launch.write_atomically(pathlib.Path(workdir) / "feature_shift.json", text)
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
    _NUM_IMAGES = flags.DEFINE_integer("num_images", 1536, "Images per domain, and of the source.")
    launch.run(main)
