"""What a reader wants first: the best method, what it gained, what it cost, what is odd."""

import statistics
from typing import NamedTuple

from experiments.reporting.rows import Row
from experiments.reporting.tables import CLEAN, Grid, Stat

# A backward pass through a layer is two products of the forward's size: one for the
# input's gradient, one for the weights'.
BACKWARD_IN_FORWARDS = 2.0
# Of the classes that the unadapted model predicts: below it a stream has collapsed.
COLLAPSED = 0.5


class Headline(NamedTuple):
    """The comparison the page opens with; errors are fractions.

    Attributes:
      source: name of the reference method, or None if it was not run.
      best: name of the best per-sample adapting method, or None.
      augmented: name of the best test-time augmentation baseline, or None.
      source_mean, best_mean, augmented_mean: mean error over the corruptions.
      reduction: relative reduction of the mean error, best against source, over the seeds
        that both have.
      wins: the number of corruptions on which best is below source.
      clean_change: best minus source on clean, a fraction.
      clean_more_wrong: the same as a number of images, mean over the seeds.
    """

    source: str | None = None
    best: str | None = None
    augmented: str | None = None
    source_mean: Stat | None = None
    best_mean: Stat | None = None
    augmented_mean: Stat | None = None
    reduction: float | None = None
    wins: int | None = None
    clean_change: float | None = None
    clean_more_wrong: float | None = None


class Cost(NamedTuple):
    """What one prediction costs.

    Attributes:
      forwards, backwards: passes of one image through the network, per sample.
      equivalents: ``forwards + 2 * backwards``, in plain forwards.
      samples_per_second: median over domains and seeds (the first ones may hold compilation).
      slowdown: how many times slower than the source method, measured.
    """

    forwards: float | None
    backwards: float | None
    equivalents: float | None
    samples_per_second: float | None
    slowdown: float | None


def source_of(grid: Grid) -> str | None:
    """The reference method: ``source``, or the first whose name begins with it."""
    names = [name for name in grid.methods if name.startswith("source") and grid.baseline(name)]
    return "source" if "source" in names else next(iter(names), None)


def _best(grid: Grid, names: list[str]) -> tuple[str | None, Stat | None]:
    means = {name: stat for name in names if (stat := grid.mean(name)) is not None}
    full = {name: stat for name, stat in means.items() if not stat.partial} or means
    if not full:
        return None, None
    name = min(full, key=lambda key: full[key].mean)
    return name, full[name]


def _wrong(row: Row) -> float:
    return (row.error or 0.0) * (row.num_examples or 0.0)


def headline(grid: Grid) -> Headline:
    """Compares the best per-sample adapting method with source and with augmentation."""
    source = source_of(grid)
    best, best_mean = _best(
        grid, [m for m in grid.methods if grid.scope(m) == "per_sample" and not grid.baseline(m)]
    )
    augmented, augmented_mean = _best(
        grid, [m for m in grid.methods if m.startswith("augmented") and grid.baseline(m)]
    )
    result = Headline(
        source, best, augmented, grid.mean(source) if source else None, best_mean, augmented_mean
    )
    if source is None or best is None:
        return result
    ours, theirs = grid.mean_per_seed(best), grid.mean_per_seed(source)
    both = sorted(ours.keys() & theirs.keys())
    if both and (reference := statistics.fmean(theirs[seed] for seed in both)) > 0:
        reduction = 1.0 - statistics.fmean(ours[seed] for seed in both) / reference
        wins = 0
        for domain in grid.corruptions:
            a, b = grid.per_seed(best, domain), grid.per_seed(source, domain)
            wins += sum(a[s] - b[s] for s in both) < -1e-12
        result = result._replace(reduction=reduction, wins=wins)
    clean = {row.seed: row for row in grid.of(best) if row.domain == CLEAN and row.ok}
    pairs = [
        (clean[row.seed], row)
        for row in grid.of(source)
        if row.domain == CLEAN and row.ok and row.seed in clean
    ]
    if pairs:
        result = result._replace(
            clean_change=statistics.fmean((a.error or 0.0) - (b.error or 0.0) for a, b in pairs),
            clean_more_wrong=statistics.fmean(_wrong(a) - _wrong(b) for a, b in pairs),
        )
    return result


def _mean(values: list[float | None]) -> float | None:
    kept = [value for value in values if value is not None]
    return statistics.fmean(kept) if kept else None


def costs(grid: Grid) -> dict[str, Cost]:
    """The :class:`Cost` of every method."""
    speeds = {}
    for method in grid.methods:
        seen = [row.samples_per_second for row in grid.of(method) if row.ok]
        kept = [value for value in seen if value]
        speeds[method] = statistics.median(kept) if kept else None
    reference = speeds.get(source_of(grid) or "")
    found = {}
    for method, speed in speeds.items():
        rows = [row for row in grid.of(method) if row.ok]
        forwards = _mean([row.forwards_per_sample for row in rows])
        backwards = _mean([row.backwards_per_sample for row in rows])
        equivalents = None
        if forwards is not None:
            equivalents = forwards + BACKWARD_IN_FORWARDS * (backwards or 0.0)
        slowdown = reference / speed if reference and speed else None
        found[method] = Cost(forwards, backwards, equivalents, speed, slowdown)
    return found


def curve(grid: Grid, method: str, domain: str | None = None) -> list[Stat]:
    """Error after 0, 1, 2, ... inner steps, on one domain or as the mean over corruptions."""
    points: list[Stat] = []
    longest = max((len(row.error_by_step or ()) for row in grid.of(method)), default=0)
    for k in range(longest):

        def get(row: Row, k: int = k) -> float | None:
            steps = row.error_by_step or ()
            return steps[k] if k < len(steps) else None

        stat = grid.cell(method, domain, get) if domain else grid.mean(method, get)
        if stat is None:
            break
        points.append(stat)
    return points


def oddities(grid: Grid) -> list[str]:
    """Notes on rows that contradict each other or that a reader should know of."""
    notes = []
    source = source_of(grid)
    if source is None:
        notes.append("No `source` method was run, so there is nothing to compare with.")
    reference = {(r.domain, r.severity, r.seed): r for r in grid.of(source or "") if r.ok}
    off, uneven = set(), set()
    for row in grid.rows:
        base = reference.get((row.domain, row.severity, row.seed))
        if base is None or not row.ok or row.error is None or base.error is None:
            continue
        if row.num_examples != base.num_examples:
            uneven.add(row.method)
        elif (
            row.turned_right is not None
            and row.turned_wrong is not None
            and row.checkpoint == base.checkpoint
            # Right minus wrong is the gain by definition; half an image is rounding.
            and abs(base.error - row.error - row.turned_right + row.turned_wrong)
            > 0.5 / (row.num_examples or 1.0)
        ):
            off.add(row.method)
    if uneven:
        notes.append(
            f"{', '.join(sorted(uneven))}: measured on another number of examples than source."
        )
    if off:
        notes.append(
            f"{', '.join(sorted(off))}: the shares turned right and wrong do not add up to the "
            "change in error against source."
        )
    notes += _collapses(grid)
    for method in grid.methods:
        count = sum(row.non_finite or 0 for row in grid.of(method))
        if count:
            noun = "example" if count == 1 else "examples"
            notes.append(
                f"{method}: a non-finite inner step on {count:,.0f} {noun} in all; "
                "such a step is discarded."
            )
    return notes


def _collapses(grid: Grid) -> list[str]:
    """A note per method that predicts far fewer classes than the model it started from."""
    notes = []
    for method in grid.methods:
        lost = [
            (row.predicted_classes_after / row.predicted_classes_before, row)
            for row in grid.of(method)
            if row.ok and row.predicted_classes_after and row.predicted_classes_before
        ]
        lost = [(share, row) for share, row in lost if share < COLLAPSED]
        if lost:
            _, worst = min(lost, key=lambda pair: pair[0])
            count = f"{len(lost)} rows" if len(lost) > 1 else "1 row"
            notes.append(
                f"{method}: on {count} it predicts less than {COLLAPSED:.0%} of the classes that "
                f"the unadapted model predicts (effective numbers; {worst.domain}: "
                f"{worst.predicted_classes_after:.1f} of {worst.predicted_classes_before:.1f}): "
                "its predictions collapsed."
            )
    return notes
