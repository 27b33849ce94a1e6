"""From rows to numbers: means over severities, corruptions and seeds, with their gaps."""

import math
import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

from experiments.reporting.rows import Row

CLEAN = "clean"

# The order and the four families of the common corruption benchmark (Hendrycks and
# Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and
# Perturbations", section 4.1), then its four validation corruptions.
CORRUPTIONS = {
    "gaussian_noise": "gauss",
    "shot_noise": "shot",
    "impulse_noise": "impul",
    "defocus_blur": "defoc",
    "glass_blur": "glass",
    "motion_blur": "motn",
    "zoom_blur": "zoom",
    "snow": "snow",
    "frost": "frost",
    "fog": "fog",
    "brightness": "brit",
    "contrast": "contr",
    "elastic_transform": "elast",
    "pixelate": "pixel",
    "jpeg_compression": "jpeg",
}
VALIDATION = {
    "speckle_noise": "speck",
    "gaussian_blur": "gblur",
    "spatter": "spatt",
    "saturate": "satur",
}
_ORDER = {name: place for place, name in enumerate([CLEAN, *CORRUPTIONS, *VALIDATION])}

# Predictions without adaptation: what adapting has to beat.
BASELINES = ("source", "joint", "augmented")

Get = Callable[[Row], float | None]


def short(domain: str) -> str:
    """A column heading of at most five characters for a benchmark domain, six otherwise."""
    return {CLEAN: CLEAN, **CORRUPTIONS, **VALIDATION}.get(domain, domain[:6])


def domain_rank(domain: str) -> int:
    """The place of a domain: clean, the benchmark's corruptions in its order, then all others."""
    return _ORDER.get(domain, len(_ORDER))


def get_error(row: Row) -> float | None:
    """The error of a row, a fraction."""
    return row.error


class Stat(NamedTuple):
    """A mean over seeds.

    Attributes:
      mean: the mean over the seeds that are complete.
      stderr: its standard error, sample deviation over ``sqrt(seeds)``; None for one seed.
      seeds: the number of complete seeds.
      expected: the number of seeds the other methods have there.
    """

    mean: float
    stderr: float | None
    seeds: int
    expected: int

    @property
    def partial(self) -> bool:
        """Whether seeds are missing, so that the mean compares with no other."""
        return self.seeds < self.expected


def over_seeds(values: Iterable[float], expected: int) -> Stat | None:
    """Mean and standard error of one value per seed; None if there is no value."""
    values = list(values)
    if not values:
        return None
    stderr = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Stat(statistics.fmean(values), stderr, len(values), expected)


class Grid:
    """The rows of one dataset and one split role, as a grid of methods by domains.

    A cell is the mean over severities, then over seeds. A seed counts only where every
    severity that any method has on that domain is there: means over different sets never
    stand in one column.
    """

    def __init__(self, rows: Iterable[Row]):
        """Builds the grid.

        Args:
          rows: rows of one dataset and one split role.
        """
        self.rows = list(rows)
        self.seeds = sorted({row.seed for row in self.rows})
        self.severities = sorted({row.severity for row in self.rows if row.domain != CLEAN})
        names = {row.domain: None for row in self.rows}
        self.domains = sorted(names, key=domain_rank)
        self.corruptions = [name for name in self.domains if name != CLEAN]
        self._at = {(r.method, r.domain, r.seed, r.severity): r for r in self.rows}
        self._of: dict[str, list[Row]] = {}
        self._needed: dict[str, dict[int, set[float]]] = {}
        for row in self.rows:
            self._of.setdefault(row.method, []).append(row)
            by_seed = self._needed.setdefault(row.domain, {})
            by_seed.setdefault(row.seed, set()).add(row.severity)
        self.methods = sorted(self._of, key=self._rank)

    def _rank(self, method: str) -> tuple[int, int]:
        if self.baseline(method):
            place = next(i for i, name in enumerate(BASELINES) if method.startswith(name))
            return 0, place
        return {"per_sample": 1, "batch": 2, "stream": 3}.get(self.scope(method), 4), 0

    def of(self, method: str) -> list[Row]:
        """The rows of one method, failed ones included."""
        return self._of.get(method, [])

    def baseline(self, method: str) -> bool:
        """Whether a method predicts without adapting: source, joint, augmented, in no steps.

        The steps count too: ``augmented_rotation`` would be a composition that adapts.
        """
        steps = any(row.num_steps for row in self.of(method))
        return method.startswith(BASELINES) and not method.endswith("_online") and not steps

    def scope(self, method: str) -> str:
        """``per_sample``, ``batch`` or ``stream``; empty if every row failed without one."""
        return next((row.scope for row in self.of(method) if row.scope), "")

    def failed(self, method: str, domain: str) -> bool:
        """Whether a run of this cell failed."""
        return any(row.domain == domain and not row.ok for row in self.of(method))

    def per_seed(self, method: str, domain: str, get: Get = get_error) -> dict[int, float]:
        """The mean over severities of each complete seed."""
        found = {}
        for seed, severities in self._needed.get(domain, {}).items():
            values = []
            for severity in severities:
                row = self._at.get((method, domain, seed, severity))
                values.append(get(row) if row is not None and row.ok else None)
            kept = [value for value in values if value is not None]
            if len(kept) == len(values):
                found[seed] = statistics.fmean(kept)
        return found

    def cell(self, method: str, domain: str, get: Get = get_error) -> Stat | None:
        """One cell, over the seeds; None where nothing complete was measured."""
        return over_seeds(
            self.per_seed(method, domain, get).values(), len(self._needed.get(domain, ()))
        )

    def mean_per_seed(self, method: str, get: Get = get_error) -> dict[int, float]:
        """The mean over the corruptions (clean excluded) of each complete seed."""
        columns = [self.per_seed(method, domain, get) for domain in self.corruptions]
        if not columns:
            return {}
        seeds = [seed for seed in self.seeds if all(seed in column for column in columns)]
        return {seed: statistics.fmean(column[seed] for column in columns) for seed in seeds}

    def mean(self, method: str, get: Get = get_error) -> Stat | None:
        """The mean over the corruptions, over the seeds."""
        expected = len({s for domain in self.corruptions for s in self._needed[domain]})
        return over_seeds(self.mean_per_seed(method, get).values(), expected)

    def at_severity(self, severity: float) -> "Grid":
        """The grid of one severity, clean included."""
        return Grid(r for r in self.rows if r.domain == CLEAN or r.severity == severity)

    def lowest(self, stats: dict[str, Stat | None]) -> set[str]:
        """The methods with the lowest complete mean of a column, ties included."""
        full = {name: s.mean for name, s in stats.items() if s is not None and not s.partial}
        return {name for name, mean in full.items() if mean <= min(full.values()) + 1e-12}

    def gaps(self) -> list[str]:
        """One sentence per method that lacks a domain or a seed others have."""
        notes = []
        for method in self.methods:
            cells = {domain: self.cell(method, domain) for domain in self.domains}
            absent = [name for name, stat in cells.items() if stat is None]
            partial = [name for name, stat in cells.items() if stat is not None and stat.partial]
            if absent:
                where = "any domain" if len(absent) == len(cells) else ", ".join(absent)
                notes.append(
                    f"{method} has no complete measurement on {where}"
                    + (": no mean is formed for it." if set(absent) - {CLEAN} else ".")
                )
            if partial:
                where = "every domain" if len(partial) == len(cells) else ", ".join(partial)
                notes.append(
                    f"{method} lacks seeds that other methods have on {where} (marked †): its "
                    "means there are over fewer seeds and are never marked lowest."
                )
            mean = self.mean(method)
            if mean is not None and mean.partial and not partial:
                notes.append(
                    f"{method}: the mean (marked †) is over {mean.seeds} of {mean.expected} seeds; "
                    "the others do not have every corruption yet."
                )
        return notes


def by_dataset(rows: Iterable[Row], role: str) -> dict[str, Grid]:
    """One :class:`Grid` per dataset for a split role, in order of appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.split_role == role:
            groups.setdefault(row.dataset, []).append(row)
    return {dataset: Grid(group) for dataset, group in groups.items()}
