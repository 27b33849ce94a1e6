"""Whole sentences on what a reader must know beside the numbers."""

from collections.abc import Sequence

import pandas as pd

from experiments.report import intervals, table
from experiments.report.table import Data

# Of the classes that the unadapted model predicts: below it a stream has collapsed.
_COLLAPSED = 0.5


def notes(data: Data) -> list[str]:
    """Returns what a reader must know beside the numbers: gaps, contradictions, collapses."""
    found, rows = [], data.rows()
    primary = data.results.primary
    if rows.empty:
        return ["There are no reported rows yet; validation rows choose settings, and no result."]
    if data.reference is None:
        found.append("No `source` method was run, so there is nothing to compare with.")
    if primary and data.results.trials is None:
        places = rows.groupby("method")["domain"].agg(lambda d: set(d))
        for method in data.methods:
            missing = set(rows["domain"]) - places.get(method, set())
            if missing:
                where = ", ".join(d for d in data.domains if d in missing)
                found.append(f"{method} has no measurement on {where}.")
        means = table.means(data)
        for method in means.loc[means["partial"].astype(bool), "method"]:
            found.append(
                f"{method} lacks domains, severities or seeds that others have (marked †): its "
                "mean is over fewer, and is never marked lowest."
            )
    run = [name for name in table.CORRUPTIONS if name in set(rows["domain"])]
    if 0 < len(run) < len(table.CORRUPTIONS):
        found.append(
            f"{len(run)} of the benchmark's {len(table.CORRUPTIONS)} corruptions were run; means "
            "are over these."
        )
    return found + _contradictions(data, rows) + _collapses(rows)


def _contradictions(data: Data, rows: pd.DataFrame) -> list[str]:
    found = []
    source = rows[rows["method"] == data.reference].drop_duplicates([*intervals.PLACE])
    if len(source):
        both = rows.merge(source, on=[*intervals.PLACE], suffixes=("", "_source"))
        uneven = both[both["num_examples"] != both["num_examples_source"]]["method"].unique()
        if len(uneven):
            names = ", ".join(sorted(uneven))
            found.append(f"{names}: measured on another number of examples than source.")
        if {"turned_right", "turned_wrong", "error"} <= {*rows}:
            gain = both["error_source"] - both["error"]
            off = (gain - both["turned_right"] + both["turned_wrong"]).abs()
            same = both["num_examples"] == both["num_examples_source"]
            if "checkpoint" in both:
                same &= both["checkpoint"].eq(both["checkpoint_source"])
            # Right minus wrong is the gain by definition; half an image is rounding.
            wrong = sorted(both[same & (off > 0.5 / both["num_examples"])]["method"].unique())
            if wrong:
                found.append(
                    f"{', '.join(wrong)}: the shares turned right and wrong do not add up to the "
                    "change in error against source."
                )
    if "non_finite" in rows:
        for method, count in rows.groupby("method")["non_finite"].sum().items():
            if count:
                found.append(
                    f"{method}: a non-finite inner step on {count:,.0f} "
                    f"example{'s' if count > 1 else ''} in all; such a step is discarded."
                )
    return found


def _collapses(rows: pd.DataFrame) -> list[str]:
    pair: Sequence[str] = ("predicted_classes_before", "predicted_classes_after")
    if not {*pair} <= {*rows}:
        return []
    found = []
    lost = rows[rows[pair[1]] < _COLLAPSED * rows[pair[0]]]
    for method, part in lost.groupby("method"):
        worst = part.loc[(part[pair[1]] / part[pair[0]]).idxmin()]
        found.append(
            f"{method}: on {len(part)} row{'s' if len(part) > 1 else ''} it predicts less than "
            f"{_COLLAPSED:.0%} of the classes that the unadapted model predicts (effective "
            f"numbers; {worst['domain']}: {worst[pair[1]]:.1f} of {worst[pair[0]]:.1f}): its "
            "predictions collapsed."
        )
    return found
