"""Means and their 95 % intervals: over the seeds and, by a bootstrap, over the instances.

With y[s, i] the value (or the paired difference) on seed s and instance i, the mean varies with the
seeds that were drawn and with the instances that were. Instances are the same for all seeds, so
they are resampled as clusters with all their seeds and domains. Half of the interval is

    sqrt((t * se_seeds)^2 + (1.96 * se_instances)^2)

where ``se_seeds`` is the standard error of the means per seed and ``se_instances`` the standard
deviation of the bootstrap means over instances: the two-way clustered variance of Cameron, Gelbach
and Miller (2011) without the term that it takes away, the variance of single values, as the
pigeonhole bootstrap of Owen (2007) has it; so the interval is a little too wide, never too narrow.
One seed gives an interval over instances alone, of one model. Without instances the seeds alone
give it, from three on.
"""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import scipy.special

from experiments import launch

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom; 1.96 beyond.
T95: tuple[float, ...] = tuple(scipy.special.stdtrit(np.arange(1, 31), 0.975).round(3).tolist())
NORMAL95 = 1.96
NO_INTERVAL = "no interval: fewer than three seeds, and no instances"
UNSEEN = "no difference seen"
AT_CHANCE = "at chance"
PAIR = ("place", "seed")
"""What must be equal for two rows to be of the same instances and seed."""
_NUM_REPLICATES = 100
_MOST_FILES = 1000

Replicates = Mapping[str, np.ndarray]
"""Measure -> ``[rows, replicates]``, NaN where a row has no instances."""


def summarize(
    frame: pd.DataFrame,
    by: Sequence[str],
    measure: str,
    *,
    peers: Sequence[str] = (),
    replicates: Replicates | None = None,
) -> pd.DataFrame:
    """Returns a line per group: the mean of its rows per seed, then over the seeds.

    A seed counts where the group has as many places (data set, domain, severity and other tags) as
    any of its peers; where no seed does, all count. The interval is said above.

    Args:
      frame: rows of one split role with their ``place``; ``page.js`` does the same to the rows that
        pass its filter.
      by: the columns that make a group.
      measure: the column that is averaged; rows without it are left out.
      peers: the columns of ``by`` that groups share which compare with each other.
      replicates: of every row of the whole frame, by the frame's index.

    Returns:
      Columns ``by``, ``mean``, ``half`` (of the interval, NaN without one), ``basis`` ("seeds",
      "instances", "seeds and instances" or ""), ``seeds``, ``rows``, ``chance`` (mean of the rows'
      values of a constant answer, NaN without), ``within`` (half of the interval of these very
      models, over instances alone, NaN without), ``partial``.
    """
    by = list(by)
    rows = frame.dropna(subset=[measure, *by])
    columns = [*by, "mean", "half", "basis", "seeds", "rows", "chance", "within", "partial"]
    if rows.empty:
        return pd.DataFrame(columns=columns)
    rows = rows.assign(
        # It is known of the measure that chooses alone.
        _chance=rows["chance"].where(rows["chooses"] == measure) if "chance" in rows else np.nan,
        _peer=rows.groupby(list(peers)).ngroup() if peers else 0,
        _row=rows.index,
        seed=rows["seed"].fillna(-1),
    )
    parts = rows.groupby([*by, "_peer", "seed"], sort=False, as_index=False).agg(
        value=(measure, "mean"),
        places=("place", "nunique"),
        rows=(measure, "size"),
        chance=("_chance", "mean"),
        index=("_row", list),
    )
    full = parts["places"] == parts.groupby(["_peer", "seed"])["places"].transform("max")
    num_full = full.groupby([parts[name] for name in by]).transform("sum")
    parts["partial"] = num_full < parts.groupby("_peer")["seed"].transform("nunique")
    matrix = (replicates or {}).get(measure)
    lines = []
    for key, part in parts[full | (num_full == 0)].groupby(by, sort=False):
        draws = None if matrix is None else [matrix[index].mean(axis=0) for index in part["index"]]
        half, basis, within = _half(part["value"].to_numpy(), draws)
        found = (part["value"].mean(), half, basis, len(part), int(part["rows"].sum()))
        lines.append((*key, *found, part["chance"].mean(), within, part["partial"].iloc[0]))
    return pd.DataFrame(lines, columns=columns)


def _half(values: np.ndarray, draws: Sequence[np.ndarray] | None) -> tuple[float, str, float]:
    """Half the width of an interval, what it is over, and half of that over instances alone."""
    seeds = instances = np.nan
    if draws is not None:
        instances = NORMAL95 * np.mean(draws, axis=0).std(ddof=1)
    # Two seeds alone are too few to say how far a third one lies.
    if len(values) > (2 if np.isnan(instances) else 1):
        t = T95[len(values) - 2] if len(values) - 2 < len(T95) else NORMAL95
        seeds = t * values.std(ddof=1) / len(values) ** 0.5
    parts = {"seeds": seeds, "instances": instances}
    known = [name for name, part in parts.items() if not np.isnan(part)]
    half = np.hypot(*np.nan_to_num([seeds, instances])) if known else np.nan
    return float(half), " and ".join(known), float(instances)


def unseen(lines: pd.DataFrame) -> pd.Series:
    """Whether the interval of a difference holds zero; without an interval nothing is said."""
    return lines["mean"].abs() <= lines["half"].astype(float)


def at_chance(lines: pd.DataFrame) -> pd.Series:
    """Whether a mean is not seen to be lower than the value of a constant answer.

    The interval of these models holds that value or lies above it; how far other models lie from
    them says nothing here. Lines whose rows do not know the value are never at chance.
    """
    half = lines["within"].fillna(lines["half"]).astype(float).fillna(0)
    return lines["mean"] + half >= lines["chance"].astype(float)


def bootstrap(frame: pd.DataFrame, folder: pathlib.Path, said: list[str]) -> dict[str, np.ndarray]:
    """Returns the bootstrap replicates of every row whose instances lie in ``folder``.

    Replicates of all rows draw the same instances (by id), so those of a difference are the
    differences of replicates.

    Args:
      frame: rows with ``method``, ``seed``, ``split_role`` and tags, by a plain index.
      folder: of a run, or of a sweep, in whose trials only ``chosen`` rows are looked up. Its
        ``instances`` holds ``.npz`` files with ``id`` [N], ``sums`` [N, M], ``metrics`` [M],
        ``method``, ``seed``, ``role`` and an array [N] per tag.
      said: notes, to which damaged files are added.

    Returns:
      :data:`Replicates`; empty where there is no file.
    """
    files = _instances(frame, folder, said)
    if not files:
        return {}
    ids = np.unique(np.concatenate([file["id"] for file, _ in files]))
    generator = np.random.default_rng(0)
    draws = generator.multinomial(len(ids), np.full(len(ids), 1 / len(ids)), _NUM_REPLICATES)
    replicates: dict[str, np.ndarray] = {}
    known = ("id", "sums", "metrics", "method", "stream", "seed", "role")
    for file, rows in files:
        unit = [file[name].item() for name in ("method", "seed", "role")]
        same = (rows[["method", "seed", "split_role"]] == unit).all(axis=1)
        if "stream" in file and "stream" in rows:
            same &= rows["stream"].isna() | (rows["stream"] == file["stream"].item())
        tags = [name for name in file if name not in known and name in frame]
        weights = draws[:, np.searchsorted(ids, file["id"])]
        for index, row in rows[same].iterrows():
            keep = np.ones(len(file["id"]), bool)
            for name in tags:
                keep &= file[name] == row[name]
            # Other rows of the method are of another stream.
            if keep.sum() != row["num_examples"]:
                continue
            totals = weights[:, keep].sum(axis=1)
            for name, values in zip(file["metrics"], file["sums"][keep].T, strict=True):
                empty = np.full((len(frame), _NUM_REPLICATES), np.nan)
                matrix = replicates.setdefault(str(name), empty)
                with np.errstate(invalid="ignore", divide="ignore"):
                    matrix[index] = weights[:, keep] @ values / totals
    return replicates


def _instances(
    frame: pd.DataFrame, folder: pathlib.Path, said: list[str]
) -> list[tuple[dict[str, np.ndarray], pd.DataFrame]]:
    """The files of instances, each with the rows that may be of it; ``said`` gets damaged ones."""
    places = {folder / "instances": frame}
    if "trial" in frame:
        parts = frame[frame["chosen"]].groupby("trial")
        places = {folder / "trials" / str(name) / "instances": part for name, part in parts}
    files = [(path, rows) for place, rows in places.items() for path in sorted(place.glob("*.npz"))]
    # Where validation chose nothing all trials count, and a page with their draws would be large.
    if "trial" in frame and len(files) > _MOST_FILES:
        return []
    held = []
    for path, rows in files:
        try:
            held.append((launch.read_npz(path, "Its row has no interval over instances."), rows))
        except launch.UserError as error:
            said.append(str(error))
    return held
