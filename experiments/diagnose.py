"""Will rotation TTT help, did it, and did it harm: a row per corruption and severity.

Usage::

    python -m experiments.diagnose --workdir=W --config=C [--severities=1,3,5] [--num_images=1000]

Measures the trained checkpoint of ``W`` (or ``--checkpoint``) and appends one line per
(corruption, severity, seed) to ``W/diagnostics.jsonl``: gradient alignment, errors before and
after, monitors of collapse and harm, a map over learning rates and steps. At the end
``W/diagnostics.json`` holds all rows with their origin and the correlation between mean inner
product and gain, ``W/diagnostics.html`` their scatter plot. Run it again to resume.
"""

import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm
from absl import flags

import ttt_jax as ttt
from experiments import (
    chunks,
    diagnosis,
    journal,
    launch,
    methods as methods_lib,
    problem as problem_lib,
    runner as runner_lib,
)
from experiments.reporting import alignment
from ttt_jax import data

METHODS = ("rotation", "rotation_jump", "rotation_norm", "rotation_biases", "rotation_blocks")
# Of the learning rate of the config.
FACTORS = (0.3, 1.0, 3.0, 10.0)
CORRUPTIONS = {
    "test": data.corruptions.CORRUPTIONS,
    "validation": data.corruptions.VALIDATION_CORRUPTIONS,
}
ROLES = {"test": "reported", "validation": "validation"}


class Options(NamedTuple):
    """What to measure.

    Attributes:
      method: the entry of the config's ``methods`` whose settings are used, one of
        :data:`METHODS`.
      split: ``test`` or ``validation``.
      severities: 1 to 5; not used where the config has no corruptions.
      corruptions: their names; None for those of the split's role.
      num_images: of the split, the same ones in every cell; a smaller split is used whole.
      learning_rates: of the map; None for :data:`FACTORS` times the method's.
    """

    method: str = "rotation"
    split: str = "test"
    severities: Sequence[int] = (1, 2, 3, 4, 5)
    corruptions: Sequence[str] | None = None
    num_images: int = 1000
    learning_rates: Sequence[float] | None = None


def settings_of(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, method: str
) -> dict[str, Any]:
    """The settings of a method: the config's, or of several candidates the one that adapt chose.

    Raises:
      UserError: the config lacks the method, or nothing was chosen yet.
    """
    if method not in METHODS or method not in config.methods:
        there = [name for name in METHODS if name in config.methods]
        raise launch.UserError(
            f"--method must be a rotation method of the config ({', '.join(there) or 'none'}); "
            f"got {method!r}."
        )
    grid = methods_lib.grid_of(config.methods[method])
    if len(grid) == 1:
        return grid[0]
    path = workdir / "selection.json"
    chosen = json.loads(path.read_text())["chosen"].get(method) if path.exists() else None
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
    if min(rates) <= 0:
        raise launch.UserError(f"--learning_rates must be positive; got {list(rates)}.")
    return tuple(sorted({*rates, own}))


def images_of(
    source: data.Source, domain: str, severity: int, count: int, config: Any, seed: int
) -> data.DomainBatch:
    """One batch of the first ``count`` images of the shuffled split; severity 0 leaves them."""
    corruption = domain if severity else "clean"
    plan = data.streams.shuffled(source, seed=seed, domain=corruption, severity=severity)
    plan = data.streams.Plan(*(column[:count] for column in plan))
    loader = data.Loader(source, plan, batch_size=count, seed=config.adapt.corruption_seed)
    return next(iter(loader))


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
            self._compiled = chunks.compiled(compile_for, self._chunk_size, most)
        compiled = time.perf_counter()
        values = jax.block_until_ready(self._compiled(*arguments))
        done = time.perf_counter()
        row = {name: _plain(value) for name, value in values.items()}
        for choice in ("label_free", "oracle"):
            row[f"{choice}_learning_rate"] = self._rates[row.pop(f"{choice}_rate_index")]
        return row | {"seconds": done - compiled, "compile_seconds": compiled - start}


def _missing(book: journal.Journal, cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells without a row.

    Raises:
      UserError: rows of the same cells that were made otherwise.
    """
    missing = []
    for cell in cells:
        row = book.get(**cell)
        if row is None:
            missing.append(cell)
            continue
        changed = [f"{k} was {row.get(k)!r}, now {v!r}" for k, v in cell.items() if row.get(k) != v]
        if changed:
            raise launch.UserError(
                f"{book.path} has rows made otherwise: {'; '.join(changed)}. Use another "
                "--workdir, or remove the file."
            )
    return missing


def cells_of(config: ml_collections.ConfigDict, options: Options) -> list[tuple[str, int]]:
    """The pairs (domain, severity) to measure.

    Raises:
      UserError: fewer than one image.
      ValueError: an unknown corruption or severity.
    """
    if options.num_images < 1:
        raise launch.UserError(f"--num_images must be at least 1; got {options.num_images}.")
    if launch.setting(config, "adapt.corruptions") == "none":
        return [(launch.setting(config, "data.domain"), 0)]
    names = options.corruptions or CORRUPTIONS[options.split]
    cells = [(name, severity) for severity in options.severities for name in names]
    for name, severity in cells:
        data.corruptions.check_name(name, severity)
    return cells


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
    where = cells_of(config, options)
    workdir = launch.open_workdir(folder)
    with launch.locked(workdir):
        source = problem_lib.load_data(config, options.split)
        problem = problem_lib.build(config, source)
        settings = settings_of(config, workdir, options.method)
        rates = rates_of(settings, options.learning_rates)
        count = min(options.num_images, len(source))
        cell = functools.partial(diagnosis.build, problem, settings, rates)
        measure = _Measure(cell, config.adapt.chunk_size, rates)
        book = journal.Journal(workdir / "diagnostics.jsonl")
        for seed in config.seeds:
            path = checkpoint_path or problem_lib.checkpoint_path(workdir, seed)
            pristine = problem_lib.load_checkpoint(path, problem, config)
            fields = {
                "method": options.method,
                "dataset": source.title,
                "seed": seed,
                "split_role": ROLES[options.split],
                "checkpoint": pristine.fingerprint,
                "num_examples": count,
                "settings": settings,
                "learning_rates": list(rates),
            }
            cells = [{"domain": name, "severity": severity, **fields} for name, severity in where]
            todo = _missing(book, cells)

            def make(cell: dict[str, Any], seed: int = seed) -> data.DomainBatch:
                return images_of(source, cell["domain"], cell["severity"], count, config, seed)

            batches = runner_lib.ahead(make, todo)
            bar = tqdm.tqdm(
                zip(todo, batches, strict=True),
                desc=f"seed {seed}", total=len(todo), disable=not sys.stderr.isatty(),
            )  # fmt: skip
            for cell, batch in bar:
                row = measure(pristine.restore("memory"), batch, seed)
                book.add({**cell, "status": "ok", **row})
        return _finish(config, workdir, book)


def _finish(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, book: journal.Journal
) -> dict[str, Any]:
    """Writes the record and its page, each as a whole."""
    rows = book.rows()
    reported = [row for row in rows if row["split_role"] == "reported"] or rows
    r = alignment.correlation(reported)
    record = {
        **launch.provenance(config),
        "correlation": {"inner_product_and_gain": r, "sets": len(reported)},
        "rows": rows,
    }
    launch.write_json(workdir / "diagnostics.json", record)
    page = alignment.render({**record, "rows": reported})
    launch.write_atomically(workdir / "diagnostics.html", page)
    shown = "undefined" if r is None else f"{r:.3f}"
    print(f"{len(rows)} rows in {book.path}; inner product and gain: r = {shown}")
    return record


def _integers(values: Sequence[str], name: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, values))
    except ValueError as error:
        raise launch.UserError(f"--{name} takes integers: {error}.") from error


def main(argv: Sequence[str]) -> int:
    """The program."""
    del argv
    values = {name: holder.value for name, holder in _FLAGS.items()}
    values["severities"] = _integers(values["severities"], "severities")
    if values["learning_rates"] is not None:
        values["learning_rates"] = tuple(map(float, values["learning_rates"]))
    run(_CONFIG.value, _WORKDIR.value, Options(**values), checkpoint_path=_CHECKPOINT.value)
    return 0


if __name__ == "__main__":
    _CONFIG, _WORKDIR = launch.define_flags()
    _CHECKPOINT = flags.DEFINE_string(
        "checkpoint", None, "Checkpoint to diagnose; default: WORKDIR/checkpoints/seed_SEED."
    )
    _FLAGS = {
        "method": flags.DEFINE_enum("method", "rotation", METHODS, "Whose settings to use."),
        "split": flags.DEFINE_enum("split", "test", list(ROLES), "Which images."),
        "severities": flags.DEFINE_list("severities", ["1", "2", "3", "4", "5"], "Severities."),
        "corruptions": flags.DEFINE_list("corruptions", None, "Default: those of the split."),
        "num_images": flags.DEFINE_integer("num_images", 1000, "Images per cell, at most."),
        "learning_rates": flags.DEFINE_list(
            "learning_rates", None, "Of the map; default: 0.3, 1, 3 and 10 times the config's."
        ),
    }
    launch.run(main)
