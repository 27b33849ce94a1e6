"""Frames that pages, notebooks and terminals show: gains, costs, pivots, the headline."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from experiments.report import intervals
from experiments.report.read import Results

CLEAN = "clean"
# The order of the common corruption benchmark (Hendrycks and Dietterich 2019, section 4.1), then
# its four validation corruptions.
CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur",
    "zoom_blur", "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate",
    "jpeg_compression",
)  # fmt: skip
VALIDATION = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
_ORDER = {name: rank for rank, name in enumerate((CLEAN, *CORRUPTIONS, *VALIDATION))}
_REFERENCES = ("source", "joint")
# A backward pass through a layer is two products of the forward's size: one for the input's
# gradient, one for the weights'.
_BACKWARD_IN_FORWARDS = 2.0
# What a row shares with its reference: one model, the same instances.
_SAME = [*intervals.PLACE, "checkpoint", "split_role", "sequence", "num_examples"]
_LABEL_PARTS = r"(?:^| )(?:seeds|methods|domains)=\S*"
_GROUPS = {
    "per_sample": "every instance adapts its own copy",
    "batch": "one copy adapts to a batch",
    "stream": "one copy carries on along a stream",
}


class Data(NamedTuple):
    """What charts and pages draw from.

    Attributes:
      results: what was read, its frame with ``gain``, ``cost``, ``milliseconds``, ``steps`` (takes
        gradient steps) and ``setting`` (the number of a choice of settings).
      replicates: of every row, where instances were written.
      methods: in the order they are listed: without steps, per instance, per batch, in streams.
      domains: in the order of the benchmark, others after it.
      reference: the method that the gain is against, or None.
    """

    results: Results
    replicates: dict[str, np.ndarray]
    methods: list[str]
    domains: list[str]
    reference: str | None

    @property
    def frame(self) -> pd.DataFrame:
        """The rows."""
        return self.results.frame

    def rows(self, role: str = "reported", *, shifted: bool = False) -> pd.DataFrame:
        """The rows of a split role that hold a measurement; ``shifted`` leaves clean ones out."""
        kept = self.frame[(self.frame["split_role"] == role) & (self.frame["status"] == "ok")]
        if shifted and (kept["domain"] != CLEAN).any():
            kept = kept[kept["domain"] != CLEAN]
        return kept


def prepare(results: Results) -> Data:
    """Returns the rows with what is computed from them."""
    frame = results.frame.reset_index(drop=True).copy()
    steps = frame.get("num_steps", pd.Series(np.nan, frame.index)).fillna(0) > 0
    named = frame["method"].fillna("").str.startswith(_REFERENCES)
    online = frame["method"].fillna("").str.endswith("_online")
    if "num_steps" not in frame:
        steps = ~named
    frame["steps"] = steps.groupby(frame["method"]).transform("max").eq(True) | (named & online)
    forwards = frame.get("forwards_per_sample", pd.Series(np.nan, frame.index))
    backwards = frame.get("backwards_per_sample", pd.Series(np.nan, frame.index))
    frame["cost"] = forwards + _BACKWARD_IN_FORWARDS * backwards.fillna(0)
    seconds = frame.get("seconds", pd.Series(np.nan, frame.index))
    examples = pd.to_numeric(frame["num_examples"]).replace(0, np.nan)
    frame["milliseconds"] = 1000 * pd.to_numeric(seconds) / examples
    others = [*results.settings, *(["num_steps"] if "num_steps" in frame else [])]
    # What a trial changed beside its seed, methods and domains is a choice of settings, too.
    label = frame.get("label", pd.Series("", frame.index)).fillna("").astype(str)
    frame["_label"] = label.str.replace(_LABEL_PARTS, "", regex=True).str.strip()
    frame["setting"] = frame.groupby(["method", *others, "_label"], dropna=False).ngroup()
    frame["place"] = frame.groupby([*intervals.PLACE[:3]], dropna=False).ngroup()
    frame["chosen"] = _chosen(frame, results.primary)
    frame = frame.drop(columns="_label")
    replicates = intervals.bootstrap(frame, results.folder / "instances")
    reference, gain = _gains(frame, results.primary, replicates)
    frame["gain"] = gain
    frame["worse"] = (gain < 0).where(gain.notna()).astype(float)
    order = {scope: rank for rank, scope in enumerate(_GROUPS)}
    first = frame.dropna(subset=["method"]).groupby("method", sort=False).first()
    ranks = [
        (
            order.get(row["scope"], 3) + 1 if row["steps"] else 0,
            not name.startswith(_REFERENCES),
            name,
        )
        for name, row in first.iterrows()
    ]
    domains = sorted({*frame["domain"].dropna()}, key=lambda d: (_ORDER.get(d, len(_ORDER)), d))
    measures = [m for m in results.measures if m != "num_steps"]
    measures[1:1] = ["gain"] if frame["gain"].notna().any() else []
    more = [name for name in ("worse", "cost", "milliseconds") if frame[name].notna().any()]
    for before in [name for name in measures if name.endswith("_before")]:
        name = before.removesuffix("_before")
        if (after := f"{name}_after") in measures:
            change = f"{name} change", f"{name} fell"
            frame[change[0]] = frame[after] / frame[before].where(frame[before] > 0) - 1
            known = frame[before].notna() & frame[after].notna()
            frame[change[1]] = (frame[after] < frame[before]).where(known).astype(float)
            measures.remove(after)
            measures[measures.index(before) + 1 : measures.index(before) + 1] = [after, *change]
    results = results._replace(frame=frame, measures=tuple(dict.fromkeys([*measures, *more])))
    return Data(results, replicates, [r[-1] for r in sorted(ranks)], domains, reference)


def _chosen(frame: pd.DataFrame, primary: str) -> pd.Series:
    """Whether a row has the settings of its method with the lowest mean on validation rows.

    Of settings that were run on as many domains and seeds as any: a mean over fewer is no lower
    error. Without validation rows of a method, all its rows count as chosen.
    """
    held = frame[(frame["split_role"] == "validation") & frame.get(primary, frame["seed"]).notna()]
    if held.empty or not primary:
        return pd.Series(True, frame.index)
    keys = ["method", "dataset", "setting"]
    held = held.assign(_place=held["place"].astype(str) + " " + held["seed"].astype(str))
    means = held.groupby(keys).agg(value=(primary, "mean"), places=("_place", "nunique"))
    means = means.reset_index().sort_values(["places", "value"], ascending=[False, True])
    best = means.drop_duplicates(["method", "dataset"]).set_index(["method", "dataset"])["setting"]
    wanted = pd.Series(
        pd.MultiIndex.from_frame(frame[["method", "dataset"]]).map(best.to_dict()), frame.index
    )
    return wanted.isna() | (wanted == frame["setting"])


def chosen(data: Data) -> Data:
    """Returns the rows of the settings that validation chose; of a run, all rows."""
    if data.results.trials is None:
        return data
    return data._replace(results=data.results._replace(frame=data.frame[data.frame["chosen"]]))


def _gains(
    frame: pd.DataFrame, primary: str, replicates: dict[str, np.ndarray]
) -> tuple[str | None, pd.Series]:
    """The name of the reference, and the reference's value minus that of every row.

    The reference is ``source`` or ``joint`` of the same model, instances and seed, or the mean of
    several such rows. Where there is none, the gain is ``turned_right - turned_wrong``, which is
    the same by definition: both are counted against the model's own prediction.
    """
    gain = pd.Series(np.nan, frame.index)
    if not primary:
        return None, gain
    names = [n for n in frame["method"].dropna().unique() if n.startswith(_REFERENCES)]
    unadapted = set(frame.loc[~frame["steps"], "method"].dropna())
    names = [name for name in names if name in unadapted and not name.endswith("_online")]
    names.sort(key=lambda n: (not n.startswith(_REFERENCES[0]), n not in _REFERENCES, n))
    keys = frame.groupby([n for n in _SAME if n in frame], dropna=False).ngroup()
    against = pd.Series(np.nan, frame.index)
    matrix, paired = replicates.get(primary), None
    if matrix is not None:
        paired = np.full_like(matrix, np.nan)
    for name in names:
        held = frame[(frame["method"] == name) & frame[primary].notna()]
        found = keys.map(held[primary].groupby(keys[held.index]).mean())
        fresh = against.isna() & found.notna()
        against = against.where(~fresh, found)
        if matrix is not None and paired is not None:
            first = keys.map(pd.Series(held.index, keys[held.index]).groupby(level=0).first())
            index = first[fresh & first.notna()].astype(int)
            paired[index.index] = matrix[index.to_numpy()] - matrix[index.index]
    gain = against - frame[primary]
    if {"turned_right", "turned_wrong"} <= {*frame} and primary == "error":
        gain = gain.fillna(
            (frame["turned_right"] - frame["turned_wrong"]).where(frame[primary] >= 0)
        )
    if paired is not None:
        replicates["gain"] = paired
    return (names[0] if names else None), gain


def means(data: Data, measure: str = "", *, role: str = "reported") -> pd.DataFrame:
    """Returns a line per method: its mean over the shifted domains, with interval."""
    measure = measure or data.results.primary
    rows = data.rows(role, shifted=True)
    return _listed(data, intervals.summarize(rows, ["method"], measure, replicates=data.replicates))


def by_domain(data: Data, measure: str = "", *, role: str = "reported") -> pd.DataFrame:
    """Returns a line per method and domain, with interval."""
    measure = measure or data.results.primary
    return _listed(
        data,
        intervals.summarize(
            data.rows(role),
            ["method", "domain"],
            measure,
            peers=["domain"],
            replicates=data.replicates,
        ),
    )


def _listed(data: Data, frame: pd.DataFrame) -> pd.DataFrame:
    rank = {name: place for place, name in enumerate(data.methods)}
    return frame.sort_values("method", key=lambda names: names.map(rank), kind="stable")


def pivot(data: Data, measure: str = "", *, role: str = "reported") -> pd.DataFrame:
    """Returns methods by domains, the mean over the shifted domains last."""
    table = by_domain(data, measure, role=role).pivot(
        index="method", columns="domain", values="mean"
    )
    table = table.reindex(columns=[d for d in data.domains if d in table])
    table = table.reindex([m for m in data.methods if m in table.index])
    return table.assign(mean=means(data, measure, role=role).set_index("method")["mean"])


def lowest(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns the lines with the lowest complete mean, ties included."""
    full = frame[~frame["partial"].astype(bool)]
    return full[full["mean"] <= full["mean"].min() + 1e-12]


class Headline(NamedTuple):
    """The comparison a page opens with; every part is a line of :func:`means`, or None.

    Attributes:
      source: the model's own prediction.
      plain: the best method without a gradient step.
      best: per scope ("per_sample", ...) the best method that takes steps.
      differences: per scope, ``best`` minus ``plain`` over the same places: (mean, half, basis).
    """

    source: pd.Series | None
    plain: pd.Series | None
    best: dict[str, pd.Series]
    differences: dict[str, tuple[float, float, str]]


def headline(data: Data) -> Headline:
    """Returns the best method of every scope beside the best one that takes no gradient step."""
    table, rows = means(data), data.rows()
    steps = rows.groupby("method")["steps"].first()
    scopes = rows.groupby("method")["scope"].first().fillna("")
    source = table[table["method"] == data.reference]
    plain = lowest(table[~table["method"].map(steps).astype(bool)])
    best, differences = {}, {}
    adapted = table[table["method"].map(steps).astype(bool)]
    for scope, part in adapted.groupby(adapted["method"].map(scopes), sort=False):
        found = lowest(part)
        if found.empty:
            continue
        best[str(scope)] = found.iloc[0]
        if len(plain):
            differences[str(scope)] = difference(
                data, found.iloc[0]["method"], plain.iloc[0]["method"]
            )
    first = [None if part.empty else part.iloc[0] for part in (source, plain)]
    return Headline(first[0], first[1], best, differences)


def compared(data: Data) -> tuple[str, ...]:
    """Returns the methods that the headline names: source, best without steps, best with."""
    head = headline(data)
    named = [
        line["method"]
        for line in (head.source, head.plain, *head.best.values())
        if line is not None
    ]
    return tuple(name for name in data.methods if name in named)


def difference(data: Data, method: str, other: str) -> tuple[float, float, str]:
    """Returns mean, half interval and its basis of ``method`` minus ``other``, paired by place."""
    measure = data.results.primary
    rows = data.rows(shifted=True)
    places = [*intervals.PLACE]
    mine, theirs = (
        rows[rows["method"] == name].reset_index().drop_duplicates(places)
        for name in (method, other)
    )
    both = mine.merge(theirs, on=places, suffixes=("", "_other"))
    frame = both.assign(_value=both[measure] - both[f"{measure}_other"], _all="all")
    replicates = None
    if (matrix := data.replicates.get(measure)) is not None:
        pairs = (both["index"], both["index_other"])
        replicates = {"_value": matrix[pairs[0]] - matrix[pairs[1]]}
    found = intervals.summarize(frame, ["_all"], "_value", replicates=replicates)
    if found.empty:
        return np.nan, np.nan, ""
    return found["mean"][0], found["half"][0], found["basis"][0]


def groups(data: Data) -> list[str]:
    """Returns per method, in their order, what it adapts to."""
    first = data.frame.dropna(subset=["method"]).groupby("method").first()
    return [
        _GROUPS.get(first["scope"][name], "adapts") if first["steps"][name] else "no gradient step"
        for name in data.methods
    ]


def as_run(data: Data) -> pd.DataFrame:
    """Returns how every method was run: scope, steps, reset, counts, seconds."""

    def seen(values: pd.Series) -> str:
        kept = dict.fromkeys(values.dropna())
        texts = [f"{v:g}" if isinstance(v, float) else str(v) for v in kept]
        return ", ".join(texts).replace("_", " ") or "–"

    rows = data.frame[data.frame["status"] == "ok"]
    lines = {}
    for method in data.methods:
        part = rows[rows["method"] == method]
        line = {"scope": seen(part["scope"])}
        for name, title in (("num_steps", "steps"), ("predict", "predicts"), ("reset", "reset")):
            line[title] = seen(part[name]) if name in part else "–"
        for name, title in (("resets", "resets fired"), ("non_finite", "non-finite")):
            known = part[name].dropna() if name in part else part["method"][:0]
            line[title] = f"{known.sum():,.0f}" if len(known) else "–"
        line["examples"], line["seeds"] = seen(part["num_examples"]), str(part["seed"].nunique())
        line["seconds in all"] = f"{part['seconds'].sum():,.1f}" if "seconds" in part else "–"
        lines[method] = line
    return pd.DataFrame.from_dict(lines, orient="index")


def failures(data: Data) -> list[tuple[str, pd.DataFrame]]:
    """Returns each reason once, the most frequent first, with the rows that failed for it."""
    failed = data.frame[data.frame["status"] != "ok"]
    message = failed["message"].fillna("").replace("", "no message recorded")
    forms = message.str.replace(r"\d+", "#", regex=True)
    groups = [(message[part.index[0]], part) for _, part in failed.groupby(forms, sort=False)]
    return sorted(groups, key=lambda group: -len(group[1]))
