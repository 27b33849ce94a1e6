"""Whole sentences: the comparison that a page opens with, and what to know beside the numbers."""

import math

import pandas as pd

from experiments.report import intervals, table
from experiments.report.charts import scale_of, title_of
from experiments.report.table import Data

# Of the classes that the unadapted model predicts: below it a stream has collapsed.
_COLLAPSED = 0.5
_KINDS = {
    "per_sample": "adapting to each instance alone",
    "batch": "adapting to a batch",
    "stream": "carrying on along a stream",
    "adapted": "taking gradient steps",
    "plain": "without a gradient step",
}
_HINDSIGHT = "picked on these very instances"
_ONE = "All this is of one {}; it says nothing about another one."


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
    if not data.ranks:
        return [
            *text,
            f"No row says which measure chooses, and whether a lower {title_of(name)} is better is "
            "not known, so there is no headline; what there is follows.",
        ]
    kept = table.chosen(data)
    head = table.headline(kept)
    plain = head.pop("plain", None)
    count = kept.rows(shifted=True)["domain"].nunique()
    what = f"Mean {title_of(name)} over {count} domain{'s' if count != 1 else ''}"
    if trials is not None:
        chose = len(kept.rows("validation")) > 0
        what += ", with the settings that validation rows chose" if chose else ", of all settings"
    if not head:
        text.append(f"{what}: no method that takes gradient steps has a measured row yet.")
        return [*text, _opened(kept, "plain", plain, None)] if plain else text
    text.append(f"{what}.")
    text += [_opened(kept, kind, pick, plain) for kind, pick in head.items()]
    if plain is not None:
        text.append(_opened(kept, "plain", plain, None))
        source = table.means(kept).set_index("method")
        if kept.reference in source.index and kept.reference != plain.method:
            text[-1] += f" {kept.reference} has {_value(source.loc[kept.reference], name)}."
    text += _on_clean(kept, next(iter(head.values())).method)
    rows = kept.rows()
    if "checkpoint" in rows and rows["checkpoint"].nunique() == 1:
        text.append(_ONE.format("model"))
    elif rows["seed"].nunique() == 1:
        text.append(_ONE.format("seed"))
    return text


def _value(line: pd.Series, name: str) -> str:
    """A mean with its interval, and what is to be known of it."""
    text = percent(line["mean"], line["half"], name)
    if intervals.at_chance(line.to_frame().T).any():
        level = percent(line["chance"], math.nan, name)
        text += f" ({intervals.AT_CHANCE}: a constant answer has {level})"
    return text + " (over fewer domains, severities or seeds than others)" * bool(line["partial"])


def _opened(data: Data, kind: str, pick: table.Pick, plain: table.Pick | None) -> str:
    """The sentences on the method of a kind: who chose it, its mean, how far from another one."""
    name, rule, method = data.results.primary, _KINDS[kind], pick.method
    said = f"{method}, the only method {rule}"
    if pick.rivals > 1 and pick.chosen:
        said = f"{method}, chosen on validation among {pick.rivals} methods {rule}"
        said += f" (as good there: {', '.join(pick.ties)})" if pick.ties else ""
    elif pick.rivals > 1:
        said = f"Of {pick.rivals} methods {rule} nothing was chosen on validation. Best in "
        said += f"hindsight, {_HINDSIGHT}: {method}"
    if pick.line is None:
        return f"{said}, has no reported row."
    value = _value(pick.line, name)
    if plain is None or plain.line is None:
        said += f": {value}"
    else:
        line = table.difference(data, method, plain.method)
        compared = _distance(line, name, plain.method)
        if pick.rivals == 1 and line is not None and abs(line["mean"]) > line["half"]:
            moved = "lowers" if line["mean"] < 0 else "raises"
            before = f"{_value(plain.line, name)} ({plain.method})"
            return f"{said}, {moved} it from {before} to {value}: {compared}."
        said += f": {value}, {compared}"
    if not pick.chosen or pick.best is None or pick.rivals == 1:
        return f"{said}."
    best = pick.best["method"]
    if best == method:
        return f"{said}. It is the best in hindsight, too."
    compared = _distance(table.difference(data, best, method), name, method)
    return (
        f"{said}. Best in hindsight, {_HINDSIGHT}: {best}, {_value(pick.best, name)}, {compared}."
    )


def _distance(line: pd.Series | None, name: str, other: str) -> str:
    """A paired difference in words, with its interval, or that none is seen."""
    if line is None:
        return f"on no instances that {other} has"
    points = percent(abs(line["mean"]), line["half"], name, "points")
    side = "below" if line["mean"] < 0 else "above"
    basis = f"interval over {line['basis']}" if line["basis"] else intervals.NO_INTERVAL
    if abs(line["mean"]) <= line["half"]:
        return f"{intervals.UNSEEN} from {other} ({points} {side}; paired, {basis})"
    return f"{points} {side} {other} (paired, {basis})"


def _on_clean(data: Data, method: str) -> list[str]:
    """What a method changes on clean instances."""
    gains = table.by_domain(data, "gain")
    gains = gains[(gains["method"] == method) & (gains["domain"] == table.CLEAN)]
    other, name = data.reference or "the unadapted model", data.results.primary
    lines = gains.assign(mean=-gains["mean"]).iterrows()
    return [f"On clean instances, {method}: {_distance(line, name, other)}." for _, line in lines]


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
    found, place = [], [*intervals.PAIR]
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
