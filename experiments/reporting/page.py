"""The HTML page: one file, no outside resource."""

import pathlib
from collections.abc import Sequence
from html import escape
from typing import Any

from experiments.reporting import figures, origin, sections, summary
from experiments.reporting.rows import Row
from experiments.reporting.style import CSS, SCRIPT
from experiments.reporting.tables import CORRUPTIONS, Grid, by_dataset


def _signed(value: float, digits: int = 1) -> str:
    text = f"{value:+.{digits}f}".replace("-", "−")
    return f"{0:.{digits}f}" if not text.strip("+−0.") else text


def lead(grid: Grid, head: summary.Headline) -> str:
    """The page's first sentences, in plain text."""
    count = len(grid.corruptions)
    on = f"{count} corruption{'s' if count != 1 else ''}"
    if head.source is None or head.best is None:
        lacking = "source" if head.source is None else "per-sample adapting"
        return f"Without a {lacking} method there is no comparison to make; the tables follow."
    if head.reduction is None or head.source_mean is None or head.best_mean is None:
        return (
            f"{head.best} and {head.source} have no seed with all of the {on} in common (or "
            "no error to reduce), so no mean is compared; see the gaps below."
        )
    rivals = [m for m in grid.methods if grid.scope(m) == "per_sample" and not grid.baseline(m)]
    stats = [grid.mean(m) for m in rivals]
    kind = "best per-sample method"
    if any(stat is None or stat.partial for stat in stats):
        kind += " among those that are complete"
    verb = "lowers" if head.reduction > 0 else "raises" if head.reduction < 0 else "keeps"
    text = (
        f"{head.best} is the {kind}: over {on} it {verb} the mean error from "
        f"{100 * head.source_mean.mean:.1f} % ({head.source}) to "
        f"{100 * head.best_mean.mean:.1f} %, and is below {head.source} on {head.wins} of {count}."
    )
    if head.augmented and head.augmented_mean is not None:
        text += (
            f" Test-time augmentation alone ({head.augmented}) reaches "
            f"{100 * head.augmented_mean.mean:.1f} %."
        )
    return text


def _tile(value: str, label: str, key: bool = False) -> str:
    kind = "tile key" if key else "tile"
    return f'<div class="{kind}"><b>{escape(value)}</b><span>{escape(label)}</span></div>'


def _tiles(head: summary.Headline) -> str:
    tiles = []
    for name, stat in ((head.source, head.source_mean), (head.best, head.best_mean)):
        if name and stat is not None:
            spread = "" if stat.stderr is None else f" ± {100 * stat.stderr:.1f}"
            label = f"mean error over the corruptions, {name}"
            tiles.append(_tile(f"{100 * stat.mean:.1f}{spread} %", label))
    if head.reduction is not None:
        tiles.append(
            _tile(f"{_signed(-100 * head.reduction)} %", "mean error, relative to source", key=True)
        )
    if head.clean_change is not None and head.clean_more_wrong is not None:
        images = _signed(head.clean_more_wrong, 0 if head.clean_more_wrong % 1 == 0 else 1)
        tiles.append(
            _tile(
                f"{_signed(100 * head.clean_change)} points",
                f"error on clean against source ({images} images wrong per seed)",
            )
        )
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _setting(grid: Grid, dataset: str) -> str:
    examples = sorted({row.num_examples for row in grid.rows if row.num_examples is not None})
    parts = [f"data set {dataset}"]
    if grid.severities:
        parts.append(f"severity {', '.join(f'{s:g}' for s in grid.severities)}")
    parts.append(f"{len(grid.seeds)} seed{'s' if len(grid.seeds) != 1 else ''}")
    if examples:
        span = f"{examples[0]:,.0f}" + (f"–{examples[-1]:,.0f}" if len(examples) > 1 else "")
        parts.append(f"{span} examples per domain")
    if grid.seeds and len(grid.seeds) == 1 and len(examples) == 1:
        parts.append(f"one example is {100 / examples[0]:.2g} points")
    return " · ".join(parts)


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return f'<div class="note"><ul>{"".join(f"<li>{escape(n)}</li>" for n in notes)}</ul></div>'


def notes_of(grid: Grid) -> list[str]:
    """All that a reader must know about the grid beside its numbers."""
    notes = grid.gaps() + summary.oddities(grid)
    run = sum(name in CORRUPTIONS for name in grid.corruptions)
    if 0 < run < len(CORRUPTIONS):
        notes.append(
            f"{run} of the benchmark's {len(CORRUPTIONS)} corruptions were run; means are over "
            "these."
        )
    return notes


def _dataset(grid: Grid, validation: Grid | None) -> str:
    head = summary.headline(grid)
    best = head.best
    spread = " ± is the standard error over the seeds." if len(grid.seeds) > 1 else ""
    parts = [
        f'<p class="lead">{escape(lead(grid, head))}</p>',
        _tiles(head),
        _notes(notes_of(grid)),
    ]
    parts.append(figures_of("means", grid, head))
    parts.append("<h2>Error per corruption</h2>")
    parts.append(
        '<p class="sub">Error in % of examples; the lowest of each column is shaded; the mean is '
        f"over the corruptions, clean excluded.{spread}</p>"
    )
    views = f'<div data-view="error (%)">{sections.errors(grid, best)}</div>'
    if head.source:
        views += (
            '<div data-view="difference to source (points)">'
            '<p class="quiet">Error minus the error of source, in percentage points.</p>'
            f"{sections.differences(grid, head.source, best)}</div>"
        )
    parts.append(f"<div data-views>{views}</div>")
    if by_severity := sections.severities(grid, best):
        parts.append(f"<h3>Mean error over the corruptions, per severity (%)</h3>{by_severity}")
    if by_group := sections.class_groups(grid, best):
        parts.append(f"<h3>Error per group of classes, by their training images (%)</h3>{by_group}")
    parts.append(figures_of("per_domain", grid, head))
    if validation is not None:
        parts.append("<h3>Validation corruptions: chosen on these</h3>")
        parts.append(
            '<p class="sub">Hyper-parameters were compared on these domains, so their errors are '
            "no result; they are not part of any mean above.</p>"
        )
        parts.append(sections.errors(validation, best) + _notes(validation.gaps()))
    parts.append("<h2>Over the inner steps</h2>")
    parts.append(
        figures_of("steps", grid, head) or _absent("the error after each step (`error_by_step`)")
    )
    parts.append("<h2>Auxiliary loss before and after</h2>")
    parts.append(
        '<p class="sub">What the inner steps minimize, each method on its own scale: mean over '
        "the corruptions, then clean.</p>"
    )
    parts.append(
        sections.aux_loss(grid, best)
        or _absent("an auxiliary loss (`aux_loss_before`, `aux_loss_after`)")
    )
    parts.append("<h2>Turned right, turned wrong</h2>")
    shares = sections.turned(grid, best)
    if shares:
        parts.append(
            '<p class="sub">Share of all examples that source gets wrong and the method right '
            "(+), and the reverse (−). Their difference is the gain.</p>"
        )
        parts.append(figures_of("turned", grid, head))
        parts.append(f"<details><summary>Per domain (%)</summary>{shares}</details>")
    else:
        parts.append(_absent("the shares (`turned_right`, `turned_wrong`)"))
    parts.append("<h2>Cost</h2>")
    parts.append(
        '<p class="sub">Passes through the network for one prediction. A backward is counted as '
        "two forwards. Speed is the median over domains and seeds, as measured on the device "
        "named below.</p>"
    )
    parts.append(sections.cost(grid, best) + figures_of("cost", grid, head))
    parts.append(f"<h2>How each method was run</h2>{sections.as_run(grid, best)}")
    return "".join(parts)


def _absent(what: str) -> str:
    return f'<p class="quiet">No row holds {escape(what)}.</p>'


_CAPTIONS = {
    "means": "Mean error over the corruptions. Hollow: no adaptation. Dashed line: source.",
    "per_domain": "Error per domain; the line joins source to the best per-sample method.",
    "steps": "Mean error over the corruptions after each inner step; the figure at the end of a "
    "line is its last value. The axis does not start at zero.",
    "turned": "Left: right under source, wrong after adapting. Right: the reverse.",
    "cost": "Mean error against cost, logarithmic. Lower left is better.",
}


def figures_of(name: str, grid: Grid, head: summary.Headline) -> str:
    """One of the charts of :mod:`experiments.reporting.figures`, with its caption."""
    return sections.figure(getattr(figures, name)(grid, head), _CAPTIONS[name])


def render(
    rows: Sequence[Row],
    *,
    notes: Sequence[str] = (),
    run: dict[str, Any] | None = None,
    selection: dict[str, Any] | None = None,
    name: str = "",
) -> str:
    """The whole page.

    Args:
      rows: every row of the results file.
      notes: what reading the files brought up.
      run: the content of ``run.json``, if any.
      selection: the content of ``selection.json``, if any.
      name: the name of the run, for the title.

    Returns:
      A complete HTML document that loads nothing from outside.
    """
    reported, validation = by_dataset(rows, "reported"), by_dataset(rows, "validation")
    name = pathlib.PurePath(name).name
    title = "Test-time training" + (f": {name}" if name else "")
    parts = [f"<h1>{escape(title)}</h1>"]
    for dataset, grid in reported.items():
        if len(reported) > 1:
            parts.append(f"<h1>{escape(dataset)}</h1>")
        parts.append(f'<p class="sub">{escape(_setting(grid, dataset))}</p>')
        parts.append(_dataset(grid, validation.get(dataset)))
    for dataset, grid in validation.items():
        if dataset not in reported:
            parts.append(f"<h2>{escape(dataset)}: validation corruptions, chosen on these</h2>")
            parts.append('<p class="sub">No reported rows yet.</p>')
            parts.append(sections.errors(grid, None))
    if notes:
        parts.insert(1, _notes(notes))
    if failed := sections.failures(rows):
        count = sum(not row.ok for row in rows)
        parts.append(f"<h2>Failed runs ({count})</h2>{failed}")
        warning = f"{count} run{'s' if count > 1 else ''} failed; listed under Failed runs."
        parts.insert(1, f'<div class="note bad">{warning}</div>')
    validated = list(dict.fromkeys(d for grid in validation.values() for d in grid.domains))
    parts.append(origin.selection_html(selection or {}, validated))
    parts.append(origin.provenance_html(run or {}, rows))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>"
        f"<body><main>{''.join(parts)}</main><script>{SCRIPT}</script></body></html>\n"
    )
