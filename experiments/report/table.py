"""Frames that pages, notebooks and terminals show: gains, costs, pivots, the headline."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from experiments.report import intervals
from experiments.report.read import Results, is_share

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
_SAME = [*intervals.PAIR, "checkpoint", "split_role", "num_examples"]
_EQUAL = 1e-12
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

    @property
    def ranks(self) -> bool:
        """Whether lower values of the primary measure are known to be better: rows name it."""
        return _ranks(self.frame, self.results.primary)

    def rows(self, role: str = "reported", *, shifted: bool = False) -> pd.DataFrame:
        """The rows of a split role that hold a measurement; ``shifted`` leaves clean ones out."""
        kept = self.frame[(self.frame["split_role"] == role) & (self.frame["status"] == "ok")]
        if shifted and (kept["domain"] != CLEAN).any():
            kept = kept[kept["domain"] != CLEAN]
        return kept


def _ranks(frame: pd.DataFrame, primary: str) -> bool:
    return primary == "error" or primary in {*frame.get("chooses", ())}


def prepare(results: Results) -> Data:
    """Returns the rows with what is computed from them."""
    frame = results.frame.reset_index(drop=True).copy()

    def numbers(name: str) -> pd.Series:
        return pd.to_numeric(frame.get(name, pd.Series(np.nan, frame.index)))

    method = frame["method"].fillna("")
    named = method.str.startswith(_REFERENCES)
    steps = numbers("num_steps").fillna(0) > 0 if "num_steps" in frame else ~named
    frame["steps"] = steps.groupby(frame["method"]).transform("max").eq(True)
    frame["steps"] |= named & method.str.endswith("_online")
    backwards = numbers("backwards_per_sample").fillna(0)
    frame["cost"] = numbers("forwards_per_sample") + _BACKWARD_IN_FORWARDS * backwards
    frame["milliseconds"] = 1000 * numbers("seconds") / numbers("num_examples").replace(0, np.nan)
    # What a trial changed beside its seed, methods and domains is a choice of settings, too.
    label = frame.get("label", pd.Series("", frame.index)).fillna("")
    label = label.str.replace(_LABEL_PARTS, "", regex=True)
    settings = [*results.settings, *(["num_steps"] if "num_steps" in frame else [])]
    keys = [frame[name] for name in ("method", *settings)]
    frame["setting"] = frame.groupby([*keys, label.str.strip()], dropna=False).ngroup()
    frame["chosen"] = _chosen(frame, results.primary if _ranks(frame, results.primary) else "")
    replicates = intervals.bootstrap(frame, results.folder, results.notes)
    reference, frame["gain"] = _gains(frame, results.primary, replicates)
    frame["worse"] = (frame["gain"] < 0).where(frame["gain"].notna()).astype(float)
    first = frame.dropna(subset=["method"]).groupby("method").first()
    rank = first["scope"].map({scope: k for k, scope in enumerate(_GROUPS, 1)}).fillna(4)
    rank = rank.where(first["steps"], 0)
    methods = sorted(first.index, key=lambda m: (rank[m], not m.startswith(_REFERENCES), m))
    domains = sorted({*frame["domain"].dropna()}, key=lambda d: (_ORDER.get(d, len(_ORDER)), d))
    measures = [m for m in results.measures if m != "num_steps"]
    measures[1:1] = ["gain"] if frame["gain"].notna().any() else []
    measures += [name for name in ("worse", "cost", "milliseconds") if frame[name].notna().any()]
    for before in [name for name in measures if name.endswith("_before")]:
        name = before.removesuffix("_before")
        if (after := f"{name}_after") in measures:
            change = f"{name} change", f"{name} fell"
            frame[change[0]] = frame[after] / frame[before].where(frame[before] > 0) - 1
            known = frame[before].notna() & frame[after].notna()
            frame[change[1]] = (frame[after] < frame[before]).where(known).astype(float)
            measures.remove(after)
            measures[measures.index(before) + 1 : measures.index(before) + 1] = [after, *change]
    results = results._replace(frame=frame, measures=tuple(dict.fromkeys(measures)))
    return Data(results, replicates, methods, domains, reference)


def _chosen(frame: pd.DataFrame, primary: str) -> pd.Series:
    """Whether a row has the settings of its method with the lowest mean on validation rows.

    Of settings that were run on as many domains and seeds as any: a mean over fewer is no lower
    error. Without validation rows of a method, all its rows count as chosen.
    """
    held = frame[(frame["split_role"] == "validation") & frame.get(primary, frame["seed"]).notna()]
    if held.empty or not primary:
        return pd.Series(True, frame.index)
    pair = ["method", "dataset"]
    held = held.assign(_place=held["place"].astype(str) + " " + held["seed"].astype(str))
    means = held.groupby([*pair, "setting"]).agg(value=(primary, "mean"), n=("_place", "nunique"))
    best = means.sort_values(["n", "value"], ascending=[False, True]).reset_index()
    best = best.drop_duplicates(pair).rename(columns={"setting": "best"})
    wanted = frame[pair].merge(best, how="left", on=pair)["best"]
    return wanted.isna() | (wanted == frame["setting"])


def chosen(data: Data) -> Data:
    """Returns the rows of the settings that validation chose; of a run, all rows."""
    if data.results.trials is None:
        return data
    return data._replace(results=data.results._replace(frame=data.frame[data.frame["chosen"]]))


def _gains(
    frame: pd.DataFrame, primary: str, replicates: dict[str, np.ndarray]
) -> tuple[str | None, pd.Series]:
    """The name of the reference, and the reference's value minus that of every row (shares).

    The reference is ``source`` or ``joint`` of the same model, instances and seed, or the mean of
    several such rows. Where there is none, the gain is ``turned_right - turned_wrong``, which is
    the same by definition: both are counted against the model's own prediction.
    """
    gain = pd.Series(np.nan, frame.index)
    if not primary:
        return None, gain
    names = [
        name
        for name in frame.loc[~frame["steps"], "method"].dropna().unique()
        if name.startswith(_REFERENCES) and not name.endswith("_online")
    ]
    names.sort(key=lambda n: (not n.startswith(_REFERENCES[0]), n not in _REFERENCES, n))
    keys = frame.groupby([n for n in _SAME if n in frame], dropna=False).ngroup()
    held = frame[frame["method"].isin(names) & frame[primary].notna()]
    if len(held):
        cells = held.assign(_key=keys, _row=held.index).groupby(["_key", "method"])
        # Per place the first reference that has it.
        best, row = (
            cells[value].agg(how).unstack("method").reindex(columns=names).bfill(axis=1).iloc[:, 0]
            for value, how in ((primary, "mean"), ("_row", "first"))
        )
        gain = keys.map(best) - frame[primary]
        # Of what is no share of the instances, the part of the reference's value.
        relative = not is_share(primary)
        gain = gain / keys.map(best) if relative else gain
        if (matrix := replicates.get(primary)) is not None:
            index = keys.map(row).dropna().astype(int)
            replicates["gain"] = np.full_like(matrix, np.nan)
            draws = matrix[index] - matrix[index.index]
            replicates["gain"][index.index] = draws / matrix[index] if relative else draws
    if {"turned_right", "turned_wrong"} <= {*frame} and primary == "error":
        turned = frame["turned_right"] - frame["turned_wrong"]
        bare = (gain.isna() & frame[primary].notna()).to_numpy()
        gain = gain.mask(bare, turned)
        if {"turned_right", "turned_wrong"} <= {*replicates}:
            right, wrong = (replicates[f"turned_{side}"] for side in ("right", "wrong"))
            draws = replicates.setdefault("gain", np.full_like(right, np.nan))
            draws[bare] = right[bare] - wrong[bare]
    return (names[0] if names else None), gain


def means(data: Data, measure: str = "", *, role: str = "reported") -> pd.DataFrame:
    """Returns a line per method: its mean over the shifted domains, with interval."""
    return _listed(data, data.rows(role, shifted=True), ["method"], measure)


def by_domain(data: Data, measure: str = "", *, role: str = "reported") -> pd.DataFrame:
    """Returns a line per method and domain, with interval."""
    return _listed(data, data.rows(role), ["method", "domain"], measure)


def _listed(data: Data, rows: pd.DataFrame, by: list[str], measure: str) -> pd.DataFrame:
    measure, held = measure or data.results.primary, data.replicates
    lines = intervals.summarize(rows, by, measure, peers=by[1:], replicates=held)
    rank = {name: number for number, name in enumerate(data.methods)}
    return lines.sort_values("method", key=lambda names: names.map(rank), kind="stable")


def pivot(data: Data, measure: str = "", *, role: str = "reported") -> pd.DataFrame:
    """Returns methods by domains, the mean over the shifted domains last."""
    cells = by_domain(data, measure, role=role).set_index(["method", "domain"])["mean"].unstack()
    cells = cells.reindex(columns=[d for d in data.domains if d in cells])
    cells = cells.reindex([m for m in data.methods if m in cells.index])
    return cells.assign(mean=means(data, measure, role=role).set_index("method")["mean"])


def lowest(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns the lines with the lowest complete mean, ties included."""
    full = frame[~frame["partial"].astype(bool)]
    return full[full["mean"] <= full["mean"].min() + _EQUAL]


def marked(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns the lines that are marked as the lowest: none where all are equal, or at chance."""
    low, full = lowest(frame), frame[~frame["partial"].astype(bool)]
    if full["mean"].max() - full["mean"].min() <= _EQUAL:
        return low[:0]
    return low[~intervals.at_chance(low)]


class Pick(NamedTuple):
    """A method of one kind that a page opens with.

    Attributes:
      method: the one with the lowest mean over all validation rows, or the lowest in hindsight
        where validation rows of the kind choose none.
      line: its line of :func:`means`; None where it has no reported row.
      chosen: whether validation chose it.
      best: the line with the lowest complete reported mean of the kind, in hindsight.
      ties: other methods with the same mean over validation rows.
      rivals: how many methods of the kind there are.
    """

    method: str
    line: pd.Series | None
    chosen: bool
    best: pd.Series | None
    ties: list[str]
    rivals: int


def headline(data: Data) -> dict[str, Pick]:
    """Returns the comparison that a page opens with, by kind of method.

    Returns:
      ``plain``, of the methods without a gradient step, then one per scope ("per_sample", "batch",
      "stream") of those that take steps. A kind without a measured row is left out.
    """
    measure = data.results.primary
    rows = pd.concat([data.rows(), data.rows("validation")])
    first = rows[rows[measure].notna()].groupby("method").first()
    kinds = first["scope"].fillna("adapted").where(first["steps"].astype(bool), "plain")
    held = data.rows("validation")
    reported, picks = means(data), {}
    for kind in ("plain", *[scope for scope in (*_GROUPS, "adapted") if scope in {*kinds}]):
        names = [method for method in data.methods if kinds.get(method) == kind]
        lines = reported[reported["method"].isin(names)].set_index("method", drop=False)
        scores = intervals.summarize(held[held["method"].isin(names)], ["method"], measure)
        tuned = {*lowest(scores)["method"]}
        best = next((line for _, line in lowest(lines).iterrows()), None)
        chosen = [method for method in names if method in tuned]
        if chosen or best is not None:
            method = chosen[0] if chosen else best["method"]
            line = lines.loc[method] if method in lines.index else None
            picks[kind] = Pick(method, line, bool(chosen), best, chosen[1:], len(names))
    return picks


def difference(data: Data, method: str, other: str) -> pd.Series | None:
    """Returns the mean of ``method`` minus ``other`` over the shifted domains, paired by place.

    Returns:
      The line of :func:`experiments.report.intervals.summarize`; None where they share no place.
    """
    measure, pair = data.results.primary, [*intervals.PAIR]
    rows = data.rows(shifted=True).dropna(subset=[measure]).reset_index()
    sides = (
        rows[rows["method"] == name]
        .groupby(pair, dropna=False)
        # Of several settings the mean: validation chose none among them.
        .agg(value=(measure, "mean"), rows=("index", list))
        for name in (method, other)
    )
    first, second = sides
    both = first.merge(second, left_index=True, right_index=True, suffixes=("", "_other"))
    both = both.assign(_value=both["value"] - both["value_other"], _all="all").reset_index()
    replicates = None
    if (matrix := data.replicates.get(measure)) is not None and len(both):
        own, its = ([matrix[i].mean(0) for i in both[name]] for name in ("rows", "rows_other"))
        replicates = {"_value": np.subtract(own, its)}
    lines = intervals.summarize(both, ["_all"], "_value", replicates=replicates)
    return None if lines.empty else lines.iloc[0]


def groups(data: Data) -> list[tuple[str, list[str]]]:
    """Returns what methods adapt to, each with its methods, in their order."""
    first = data.frame.dropna(subset=["method"]).groupby("method").first()
    scopes = first["scope"].map(_GROUPS).fillna("adapts").where(first["steps"], "no gradient step")
    methods = scopes.reindex(data.methods).reset_index().groupby("scope", sort=False)["method"]
    return [(str(group), part.tolist()) for group, part in methods]


def as_run(data: Data) -> pd.DataFrame:
    """Returns how every method was run: scope, steps, reset, and sums of counts and seconds."""
    rows = data.frame[data.frame["status"] == "ok"]

    def seen(values: pd.Series) -> str:
        known = sorted(values.dropna().unique())
        return ", ".join(f"{v:g}" if isinstance(v, float) else v for v in known)

    names = ("scope", "num_steps", "predict", "reset", "num_examples", "seed")
    rules = dict.fromkeys(names, seen) | dict.fromkeys(("resets", "non_finite", "seconds"), "sum")
    lines = rows.groupby("method").agg({n: rule for n, rule in rules.items() if n in rows})
    return lines.reindex([method for method in data.methods if method in lines.index])


def failures(data: Data) -> list[tuple[str, pd.DataFrame]]:
    """Returns each reason once, the most frequent first, with the rows that failed for it."""
    failed = data.frame[data.frame["status"] != "ok"]
    message = failed["message"].fillna("").replace("", "no message recorded")
    forms = message.str.replace(r"\d+", "#", regex=True)
    reasons = [(message[part.index[0]], part) for _, part in failed.groupby(forms, sort=False)]
    return sorted(reasons, key=lambda reason: -len(reason[1]))
