"""Whole sentences: the comparison that a page opens with, and what to know beside the numbers."""

import math

import pandas as pd

from experiments.report import intervals, table
from experiments.report.charts import scale_of, title_of
from experiments.report.table import Data

# Of the classes that the unadapted model predicts: below it a stream has collapsed.
_COLLAPSED = 0.5
_SCOPES = {
    "per_sample": "that adapts to each instance alone",
    "batch": "that adapts to a batch",
    "stream": "that carries what it learned along a stream",
}


def percent(value: float, half: float, name: str, unit: str = "%") -> str:
    """Returns a mean and half its interval; ``unit`` stands behind shares alone."""
    factor = scale_of(name)
    digits = 1 if factor > 1 else 3
    texts = [f"{factor * x:.{digits}f}" for x in (value, half) if not math.isnan(x)]
    return " ± ".join(texts).replace("-", "−") + (f" {unit}" if factor > 1 else "")


def lead(data: Data) -> list[str]:
    """Returns the first sentences, in plain text: what there is, the headline, clean instances."""
    name, trials, text = data.results.primary, data.results.trials, []
    if trials is not None:
        counts = ", ".join(f"{count:,} {what}" for what, count in trials.items() if count)
        text.append(f"{sum(trials.values()):,} trials: {counts}; {len(data.frame):,} rows.")
    if not name or data.rows().empty:
        return [*text, "There is no reported row with a measure yet; what there is follows."]
    kept = table.chosen(data)
    head = table.headline(kept)
    source, plain = head.pop("source", None), head.pop("plain", None)
    count = kept.rows(shifted=True)["domain"].nunique()
    what = f"Mean {title_of(name)} over {count} domain{'s' if count != 1 else ''}"
    what += ", with the settings that validation rows chose" if kept is not data else ""
    if not head:
        return [*text, f"{what}: no method that takes gradient steps has a complete mean yet."]
    sentences = []
    for scope, line in head.items():
        value = percent(line["mean"], line["half"], name)
        rule = _SCOPES.get(scope, "that takes gradient steps")
        sentences.append(f"{line['method']} is the best method {rule}, {value}")
        if plain is not None:
            mean, half, basis = table.difference(kept, line["method"], plain["method"])
            moved = f"{'below' if mean < 0 else 'above'} {plain['method']}"
            basis = basis or "no interval: one seed and no instances"
            points = percent(abs(mean), half, name, "points")
            sentences[-1] += f", {points} {moved} (paired, {basis})"
    text.append(f"{what}: {'; '.join(sentences)}.")
    if plain is not None:
        value = percent(plain["mean"], plain["half"], name)
        said = f"The best method without a gradient step is {plain['method']}, {value}"
        if source is not None and source["method"] != plain["method"]:
            said += f"; {source['method']} has {percent(source['mean'], source['half'], name)}"
        text.append(f"{said}.")
    method = next(iter(head.values()))["method"]
    gains = table.by_domain(kept, "gain")
    for _, x in gains[(gains["method"] == method) & (gains["domain"] == table.CLEAN)].iterrows():
        value = percent(0 - x["mean"], x["half"], name, "points")
        text.append(f"On clean instances {method} changes it by {value}.")
    return text


def notes(data: Data) -> list[str]:
    """Returns what a reader must know beside the numbers: gaps, contradictions, collapses."""
    found, rows = [], data.rows()
    if rows.empty:
        return ["There are no reported rows yet; validation rows choose settings, and no result."]
    if data.reference is None:
        found.append("No `source` method was run, so there is nothing to compare with.")
    if data.results.primary and data.results.trials is None:
        for method in data.methods:
            missing = {*rows["domain"]} - {*rows.loc[rows["method"] == method, "domain"]}
            if missing:
                where = ", ".join(d for d in data.domains if d in missing)
                found.append(f"{method} has no measurement on {where}.")
        means = table.means(data)
        found += [
            f"{method} lacks domains, severities or seeds that others have (marked †): its "
            "mean is over fewer, and is never marked lowest."
            for method in means.loc[means["partial"].astype(bool), "method"]
        ]
    run = {*table.CORRUPTIONS} & {*rows["domain"]}
    if 0 < len(run) < len(table.CORRUPTIONS):
        found.append(
            f"{len(run)} of the benchmark's {len(table.CORRUPTIONS)} corruptions were run; means "
            "are over these."
        )
    return found + _contradictions(data, rows) + _collapses(rows)


def _contradictions(data: Data, rows: pd.DataFrame) -> list[str]:
    found, place = [], [*intervals.PLACE]
    source = rows[rows["method"] == data.reference].drop_duplicates(place)
    both = rows.merge(source, on=place, suffixes=("", "_source"))
    same = both["num_examples"] == both["num_examples_source"]
    if names := ", ".join(sorted(both.loc[~same, "method"].unique())):
        found.append(f"{names}: measured on another number of examples than source.")
    if {"turned_right", "turned_wrong", "error"} <= {*rows}:
        gain = both["error_source"] - both["error"]
        off = (gain - both["turned_right"] + both["turned_wrong"]).abs()
        if "checkpoint" in both:
            same &= both["checkpoint"].eq(both["checkpoint_source"])
        # Right minus wrong is the gain by definition; half an image is rounding.
        wrong = both[same & (off > 0.5 / both["num_examples"])]["method"].unique()
        if len(wrong):
            found.append(
                f"{', '.join(sorted(wrong))}: the shares turned right and wrong do not add up to "
                "the change in error against source."
            )
    lost = rows.groupby("method")["non_finite"].sum() if "non_finite" in rows else pd.Series()
    return found + [
        f"{method}: a non-finite inner step on {count:,.0f} example{'s' if count > 1 else ''} in "
        "all; such a step is discarded."
        for method, count in lost.items()
        if count
    ]


def _collapses(rows: pd.DataFrame) -> list[str]:
    before, after = "predicted_classes_before", "predicted_classes_after"
    if not {before, after} <= {*rows}:
        return []
    found = []
    rows = rows.assign(_share=rows[after] / rows[before])
    for method, part in rows[rows["_share"] < _COLLAPSED].groupby("method"):
        worst = part.loc[part["_share"].idxmin()]
        found.append(
            f"{method}: on {len(part)} row{'s' if len(part) > 1 else ''} it predicts less than "
            f"{_COLLAPSED:.0%} of the classes that the unadapted model predicts (effective "
            f"numbers; {worst['domain']}: {worst[after]:.1f} of {worst[before]:.1f}): its "
            "predictions collapsed."
        )
    return found
