"""Will adapting help, did it, and did it harm: a row per corruption and severity.

Usage::

    python -m experiments.diagnose --workdir=W --config=C [--severities=1,3,5] [--num_images=1000]

Measures the trained checkpoint of ``W`` (or ``--checkpoint``) and appends one line per
(corruption, severity, seed) to ``W/diagnostics.jsonl``: gradient alignment, errors before and
after, monitors of collapse and harm, a map over learning rates and steps. At the end
``W/diagnostics.json`` holds all rows of the method with their origin and the correlation between
mean inner product and gain, ``W/diagnostics.html`` their scatter plot. Run it again to resume. Rows
of a method in a work folder are about the same images, settings and model: others are refused.
``experiments.merge --program=diagnose`` joins work folders that have cells of their own.
"""

import concurrent.futures
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm
from absl import flags

import ttt_jax as ttt
from experiments import (
    choice,
    diagnose_record,
    diagnosis,
    journal,
    launch,
    pristine as pristine_lib,
    provenance,
    settings as settings_lib,
    tasks,
)
from experiments.tasks import image_order, images
from ttt_jax import budget, data
from ttt_jax.task import Task

# Of the learning rate of the config.
FACTORS = (0.3, 1.0, 3.0, 10.0)
CORRUPTIONS = {
    "test": data.corruptions.CORRUPTIONS,
    "validation": data.corruptions.VALIDATION_CORRUPTIONS,
}


class Options(NamedTuple):
    """What to measure.

    Attributes:
      method: the entry of the config's ``methods`` whose settings are used; its steps are private
        to each image and descend one loss that :data:`experiments.diagnosis.METHODS` has.
      split: ``test`` or ``validation``.
      severities: 1 to 5, each once; not used where the config has no corruptions.
      corruptions: their names; None for those of the split's role.
      num_images: of the split, the same ones in every cell; a smaller split is used whole.
      learning_rates: of the map, each once; None for :data:`FACTORS` times the method's.
    """

    method: str = "rotation"
    split: str = "test"
    severities: Sequence[int] = (1, 2, 3, 4, 5)
    corruptions: Sequence[str] | None = None
    num_images: int = 1000
    learning_rates: Sequence[float] | None = None


def candidates_of(
    config: ml_collections.ConfigDict, label: str, task: Task
) -> tuple[str, list[dict[str, Any]]]:
    """What a method of the config that can be diagnosed is, and its candidates.

    Returns:
      Its name in :data:`experiments.diagnosis.METHODS`, and its settings.

    Raises:
      UserError: the config lacks it, or it is of another kind.
      ValueError: options that are missing or impossible.
    """
    grids = settings_lib.candidates(config, task)
    names = {known: grid[0].settings.get("method", known) for known, grid in grids.items()}
    names = {known: name for known, name in names.items() if name in diagnosis.METHODS}
    if label not in names:
        raise launch.UserError(
            "--method must be a method of the config with private steps on one loss "
            f"({', '.join(names) or 'none'}); got {label!r}."
        )
    grid = [candidate.settings for candidate in grids[label]]
    if "learning_rate" not in grid[0]:
        raise launch.UserError(
            f"methods.{label} has no learning_rate, around which the map lies; give it one."
        )
    return names[label], grid


def settings_of(
    workdir: pathlib.Path, method: str, grid: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The settings of a method: the only ones, or of several candidates those that adapt chose.

    Raises:
      UserError: nothing was chosen yet.
    """
    if len(grid) == 1:
        return grid[0]
    path = workdir / "selection.json"
    chosen = choice.read(path)["chosen"].get(method) if path.exists() else None
    if chosen not in grid:
        raise launch.UserError(
            f"methods.{method} has {len(grid)} candidates, and {path} chose none of them; run "
            "experiments.adapt in this work folder first, or override the options that are tuples "
            f"with one value each, as --config.methods.{method}.learning_rate='(0.01,)'."
        )
    return chosen


def rates_of(settings: dict[str, Any], wanted: Sequence[float] | None) -> tuple[float, ...]:
    """The learning rates of the map, increasing; that of the settings is always among them."""
    own = settings["learning_rate"]
    rates = [float(f"{factor * own:.6g}") for factor in FACTORS] if wanted is None else wanted
    return tuple(sorted({*rates, own}))


def _plain(value: jax.Array) -> Any:
    """Python numbers; None for those that JSON does not have."""
    array = np.asarray(value)
    if array.ndim:
        return [_plain(item) for item in array]
    number = array.item()
    return number if np.isfinite(number) else None


class _Measure:
    """Compiles the cell program once and makes rows with it."""

    def __init__(
        self,
        cell: Callable[[int], diagnosis.Cell],
        chunk_size: int,
        learning_rates: Sequence[float],
    ):
        self._cell, self._chunk_size, self._rates = cell, chunk_size, learning_rates
        self._compiled: Any = None

    def __call__(self, params: Any, batch: data.DomainBatch, seed: int) -> dict[str, Any]:
        keys = ttt.sample_keys(jax.random.key(seed), batch.id)
        arguments = (params, jnp.asarray(batch.image), jnp.asarray(batch.label), keys)
        start = time.perf_counter()
        if self._compiled is None:

            def compile_for(size: int) -> Any:
                return jax.jit(self._cell(size)).lower(*arguments).compile()

            most = len(batch.id) * len(self._rates)
            if self._chunk_size:
                self._compiled = compile_for(self._chunk_size)
            else:
                fitting = budget.largest_chunk(compile_for, budget.free_bytes(), most=most)
                self._compiled = fitting.compiled
        compiled = time.perf_counter()
        values = jax.block_until_ready(self._compiled(*arguments))
        done = time.perf_counter()
        row = {name: _plain(value) for name, value in values.items()}
        for rule in ("label_free", "oracle"):
            row[f"{rule}_learning_rate"] = self._rates[row.pop(f"{rule}_rate_index")]
        return row | {"seconds": done - compiled, "compile_seconds": compiled - start}


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
    rates = options.learning_rates
    if rates is not None:
        rates = _learning_rates(rates)
    return options._replace(severities=tuple(map(int, severities)), learning_rates=rates)


def _learning_rates(values: Sequence[Any]) -> tuple[float, ...]:
    try:
        rates = tuple(map(float, values))
    except ValueError:
        rates = ()
    positive = all(np.isfinite(rate) and rate > 0 for rate in rates)
    if not rates or not positive or len(set(rates)) < len(rates):
        raise launch.UserError(
            "--learning_rates must list at least one positive number, each once; got "
            f"{','.join(map(str, values))!r}. Write --learning_rates=0.001,0.01."
        )
    return rates


def cells_of(config: ml_collections.ConfigDict, options: Options) -> list[tuple[str, int]]:
    """The pairs (domain, severity) to measure."""
    if launch.setting(config, "adapt.corruptions") == "none":
        return [(launch.setting(config, "data.domain"), 0)]
    names = CORRUPTIONS[options.split] if options.corruptions is None else options.corruptions
    return [(name, severity) for severity in options.severities for name in names]


def _prefetched(make: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """``make(item)`` of each item in order, the next made while one is in use."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
        pending = pool.submit(make, items[0]) if items else None
        for item in items[1:]:
            made, pending = pending.result(), pool.submit(make, item)
            yield made
        if pending is not None:
            yield pending.result()


def run(
    config: ml_collections.ConfigDict,
    folder: str,
    options: Options = Options(),  # noqa: B008 (immutable)
    *,
    checkpoint_path: str | None = None,
) -> dict[str, Any]:
    """Measures all cells that have no row yet.

    Args:
      config: see ``experiments/configs``.
      folder: the work folder.
      options: what to measure.
      checkpoint_path: a checkpoint for all seeds; None takes the folder's own.

    Returns:
      The record that ``diagnostics.json`` holds: origin, ``correlation``, ``rows``.

    Raises:
      UserError: impossible options, or a folder whose rows were made otherwise.
    """
    launch.check_seeds(config)
    options = checked(options)
    where = cells_of(config, options)
    workdir = launch.open_workdir(folder)
    with launch.locked(workdir):
        diagnose_record.require_own(workdir)
        task = tasks.build(config)
        source = images.load_data(config, options.split)
        network = images.ImageModel(config, source)
        name, grid = candidates_of(config, options.method, task)
        settings = settings_of(workdir, options.method, grid)
        rates = rates_of(settings, options.learning_rates)
        count = min(options.num_images, len(source))
        filled = diagnosis.filled(name, settings)
        cell = functools.partial(diagnosis.build, network, name, filled, rates)
        measure = _Measure(cell, config.adapt.chunk_size, rates)
        book = journal.Journal(workdir / "diagnostics.jsonl")
        for seed in config.seeds:
            path = checkpoint_path or pristine_lib.path_of(workdir, seed)
            pristine = pristine_lib.load(path, task, config)
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
            cells = [{"domain": name, "severity": severity, **fields} for name, severity in where]
            todo = [cell for cell in cells if book.get(**cell) is None]

            def make(cell: dict[str, Any], seed: int = seed) -> data.DomainBatch:
                domain = cell["domain"], cell["severity"]
                return image_order.first_images(config, source, *domain, count, seed)

            batches = _prefetched(make, todo)
            bar = tqdm.tqdm(
                zip(todo, batches, strict=True),
                desc=f"seed {seed}", total=len(todo), disable=not sys.stderr.isatty(),
            )  # fmt: skip
            for cell, batch in bar:
                row = measure(pristine.restore("memory"), batch, seed)
                book.add({**cell, "status": "ok", **row})
        rows = [row for row in book.rows() if row["method"] == options.method]
        return diagnose_record.write(workdir, provenance.of(config), rows)


def main(argv: Sequence[str]) -> int:
    """The program."""
    del argv
    values = {name: holder.value for name, holder in _FLAGS.items()}
    run(_CONFIG.value, _WORKDIR.value, Options(**values), checkpoint_path=_CHECKPOINT.value)
    return 0


if __name__ == "__main__":
    _CONFIG, _WORKDIR = launch.define_flags()
    _CHECKPOINT = flags.DEFINE_string(
        "checkpoint", None, "Checkpoint to diagnose; default: WORKDIR/checkpoints/seed_SEED."
    )
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
