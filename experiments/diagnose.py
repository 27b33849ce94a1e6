"""Will adapting help, did it, and did it harm: a row per corruption and severity.

Usage::

    python -m experiments.diagnose --workdir=W --config=C [--severities=1,3,5] [--num_images=1000]

Measures the trained checkpoint of ``W`` (or ``--checkpoint``) and appends one line per
(corruption, severity, seed) to ``W/diagnostics.jsonl``: gradient alignment, errors before and
after, monitors of collapse and harm, a map over learning rates and steps. At the end
``W/diagnostics.json`` holds all rows of the method with their origin and the correlation between
mean inner product and gain, ``W/diagnostics.html`` their scatter plot. Run it again to resume.
``--shard`` is as in ``adapt``. Other images, settings or models of a method are refused.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import ml_collections
import tqdm
from absl import flags

import ttt_jax as ttt
from experiments import (
    config_check,
    config_files,
    diagnose_record,
    diagnosis,
    journal,
    launch,
    pristine as pristine_lib,
    provenance,
    tasks,
)
from experiments.tasks import image_order, images
from ttt_jax import data

CORRUPTIONS = {
    "test": data.corruptions.CORRUPTIONS,
    "validation": data.corruptions.VALIDATION_CORRUPTIONS,
}
# The next cell's images are made while one is measured.
_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)


class Options(NamedTuple):
    """What to measure.

    Attributes:
      method: the entry of the config's ``methods`` whose settings are used; its steps are private
        to each image and descend one loss that :data:`experiments.diagnosis.METHODS` has.
      split: ``test`` or ``validation``.
      severities: 1 to 5, each once; not used where the config has no corruptions.
      corruptions: their names; None for those of the split's role.
      num_images: of the split, the same ones in every cell; a smaller split is used whole.
      learning_rates: of the map, each once; None for ``diagnosis.FACTORS`` times the method's.
    """

    method: str = "rotation"
    split: str = "test"
    severities: Sequence[int] = (1, 2, 3, 4, 5)
    corruptions: Sequence[str] | None = None
    num_images: int = 1000
    learning_rates: Sequence[float] | None = None


def checked(options: Options) -> Options:
    """The options, with numbers for what the command line gives as text.

    Raises:
      UserError: fewer than one image, or a choice that is empty, doubled or unknown.
    """
    if options.num_images < 1:
        raise launch.UserError(f"--num_images must be at least 1; got {options.num_images}.")
    severities = launch.chosen("--severities value", map(str, options.severities), "12345")
    if options.corruptions is not None:
        known = [name for names in CORRUPTIONS.values() for name in names]
        launch.chosen("--corruptions value", options.corruptions, known)
    rates = None if options.learning_rates is None else _learning_rates(options.learning_rates)
    return options._replace(severities=tuple(map(int, severities)), learning_rates=rates)


def _learning_rates(values: Sequence[Any]) -> tuple[float, ...]:
    try:
        rates = tuple(map(float, values))
    except ValueError:
        rates = ()
    usable = {rate for rate in rates if math.isfinite(rate) and rate > 0}
    if not rates or len(usable) < len(rates):
        raise launch.UserError(
            "--learning_rates must list at least one positive number, each once; got "
            f"{','.join(map(str, values))!r}. Write --learning_rates=0.001,0.01."
        )
    return rates


def cells_of(config: ml_collections.ConfigDict, options: Options) -> list[dict[str, Any]]:
    """The domains and severities to measure."""
    if launch.setting(config, "adapt.corruptions") == "none":
        return [{"domain": launch.setting(config, "data.domain"), "severity": 0}]
    names = CORRUPTIONS[options.split] if options.corruptions is None else options.corruptions
    pairs = [(name, severity) for severity in options.severities for name in names]
    return [{"domain": name, "severity": severity} for name, severity in pairs]


def run(
    config: ml_collections.ConfigDict,
    folder: str,
    options: Options = Options(),  # noqa: B008 (immutable)
    *,
    checkpoint_path: str | None = None,
    shard: journal.Shard = journal.WHOLE,
) -> dict[str, Any]:
    """Measures all cells that have no row yet.

    Args:
      config: see ``experiments/configs``.
      folder: the work folder.
      options: what to measure.
      checkpoint_path: a checkpoint for all seeds; None takes the folder's own.
      shard: which of several processes this is; each takes every N-th cell.

    Returns:
      The record of ``diagnostics.json``: origin, ``correlation``, ``rows``; ``{}`` without a row.

    Raises:
      UserError: impossible options, or a folder of other rows.
    """
    config_check.check(config)
    options, workdir = checked(options), launch.open_workdir(folder)
    with journal.locked(workdir, shard):
        paths = pristine_lib.paths(workdir, config.seeds, checkpoint_path)
        task = tasks.build(config)
        source = images.load_data(config, options.split)
        name, grid = diagnosis.candidates_of(config, options.method, task)
        settings = diagnosis.settings_of(workdir, options.method, grid)
        rates = diagnosis.rates_of(settings, options.learning_rates)
        count, network = min(options.num_images, len(source)), images.ImageModel(config, source)
        size = launch.setting(config, "adapt.chunk_size")
        program = diagnosis.Program(network, name, settings, rates, size)
        book = journal.Journal(workdir / "diagnostics.jsonl", shard=shard)
        for seed in config.seeds:
            pristine = pristine_lib.load(paths[seed], task, config)
            fields = {
                "method": options.method,
                "dataset": source.title,
                "seed": seed,
                "split_role": diagnose_record.ROLES[options.split],
                "checkpoint": pristine.fingerprint,
                "num_examples": count,
                "settings": settings,
                "learning_rates": list(rates),
                "config": diagnose_record.made_with(config, options.split),
            }
            diagnose_record.require_same(book, fields, config)
            provenance.note_data(workdir, config, {options.split: source.fingerprint})
            own = [cell for n, cell in enumerate(cells_of(config, options)) if shard.takes(n)]
            todo = [cell for cell in own if book.get(**cell, **fields) is None]

            def read(cell: dict[str, Any], seed: int = seed) -> data.DomainBatch:
                return image_order.first_images(config, source, **cell, count=count, seed=seed)

            ahead = grain.MapDataset.source(todo).map(read).to_iter_dataset(_AHEAD)
            batches = tqdm.tqdm(ahead, desc=f"seed {seed}", total=len(todo), disable=None)
            for cell, batch in zip(todo, batches, strict=True):
                arrays = jnp.asarray(batch.image), jnp.asarray(batch.label)
                arrays += (ttt.sample_keys(jax.random.key(seed, impl="threefry2x32"), batch.id),)
                row = program(pristine.restore("memory"), *arrays)
                book.add({**cell, **fields, "status": "ok", **row})
        rows = [row for row in book.reread().rows() if row["method"] == options.method]
        return diagnose_record.write(workdir, provenance.of(config), rows) if rows else {}


def main(argv: Sequence[str]) -> None:
    """The program."""
    del argv
    options = Options(**{name: holder.value for name, holder in _FLAGS.items()})
    more = {"checkpoint_path": _CHECKPOINT.value, "shard": journal.shard(_SHARD.value)}
    run(_CONFIG.value, _WORKDIR.value, options, **more)


if __name__ == "__main__":
    _CONFIG, _WORKDIR = config_files.define_flags()
    _CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Default: WORKDIR/checkpoints/seed_SEED.")
    _SHARD = journal.define_flag()
    _FLAGS = {
        "method": flags.DEFINE_string("method", "rotation", "Whose settings to use."),
        "split": flags.DEFINE_enum("split", "test", list(diagnose_record.ROLES), "Which images."),
        "severities": flags.DEFINE_list("severities", ["1", "2", "3", "4", "5"], "Severities."),
        "corruptions": flags.DEFINE_list("corruptions", None, "Default: those of the split."),
        "num_images": flags.DEFINE_integer("num_images", 1000, "Images per cell, at most."),
        "learning_rates": flags.DEFINE_list(
            "learning_rates", None, "Of the map; default: 0.3, 1, 3 and 10 times the config's."
        ),
    }
    launch.run(main)
