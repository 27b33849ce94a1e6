"""Means and their 95 % intervals: over seeds, or by a bootstrap over instances."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import scipy.special

from experiments import launch

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom; 1.96 beyond.
T95: tuple[float, ...] = tuple(scipy.special.stdtrit(np.arange(1, 31), 0.975).round(3).tolist())
NORMAL95 = 1.96
NO_INTERVAL = "no interval: one seed, no instances"
PLACE = ("dataset", "domain", "severity", "seed")
"""What must be equal for two rows to be of the same instances and seed."""
_NUM_REPLICATES = 100

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

    A seed counts where the group has as many places (data set, domain, severity) as any of its
    peers; where no seed does, all count. The interval is the wider one of two: Student's t over
    the seeds, and 1.96 standard deviations of the bootstrap replicates.

    Args:
      frame: rows of one split role; ``page.js`` does the same to the rows that pass its filter.
      by: the columns that make a group.
      measure: the column that is averaged; rows without it are left out.
      peers: the columns of ``by`` that groups share which compare with each other.
      replicates: of every row of the whole frame, by the frame's index.

    Returns:
      Columns ``by``, ``mean``, ``half`` (of the interval, NaN without one), ``basis`` ("seeds",
      "instances" or ""), ``seeds``, ``rows``, ``partial``.
    """
    by = list(by)
    rows = frame.dropna(subset=[measure, *by])
    columns = [*by, "mean", "half", "basis", "seeds", "rows", "partial"]
    if rows.empty:
        return pd.DataFrame(columns=columns)
    rows = rows.assign(
        _place=rows.groupby([*PLACE[:3]], dropna=False).ngroup(),
        _peer=rows.groupby(list(peers)).ngroup() if peers else 0,
        _row=rows.index,
        seed=rows["seed"].fillna(-1),
    )
    parts = rows.groupby([*by, "_peer", "seed"], sort=False, as_index=False).agg(
        value=(measure, "mean"),
        places=("_place", "nunique"),
        rows=(measure, "size"),
        index=("_row", list),
    )
    full = parts["places"] == parts.groupby(["_peer", "seed"])["places"].transform("max")
    num_full = full.groupby([parts[name] for name in by]).transform("sum")
    parts["partial"] = num_full < parts.groupby("_peer")["seed"].transform("nunique")
    matrix = (replicates or {}).get(measure)
    lines = []
    for key, part in parts[full | (num_full == 0)].groupby(by, sort=False):
        draws = None if matrix is None else [matrix[index].mean(axis=0) for index in part["index"]]
        half, basis = _half(part["value"].to_numpy(), draws)
        found = (part["value"].mean(), half, basis, len(part), int(part["rows"].sum()))
        lines.append((*key, *found, part["partial"].iloc[0]))
    return pd.DataFrame(lines, columns=columns)


def _half(values: np.ndarray, draws: Sequence[np.ndarray] | None) -> tuple[float, str]:
    """Half the width of an interval, and what it is over."""
    seeds = instances = np.nan
    if len(values) > 1:
        t = T95[len(values) - 2] if len(values) - 2 < len(T95) else NORMAL95
        seeds = t * values.std(ddof=1) / len(values) ** 0.5
    if draws is not None:
        instances = NORMAL95 * np.mean(draws, axis=0).std(ddof=1)
    if np.isnan(instances) or seeds >= instances:
        return seeds, "" if np.isnan(seeds) else "seeds"
    return instances, "instances"


def bootstrap(frame: pd.DataFrame, folder: pathlib.Path, said: list[str]) -> dict[str, np.ndarray]:
    """Returns the bootstrap replicates of every row whose instances lie in ``folder``.

    Replicates of all rows draw the same instances (by id), so those of a difference are the
    differences of replicates.

    Args:
      frame: rows with ``method``, ``seed``, ``split_role`` and tags, by a plain index.
      folder: holds ``.npz`` files with ``id`` [N], ``sums`` [N, M], ``metrics`` [M], ``method``,
        ``seed``, ``role`` and an array [N] per tag.
      said: notes, to which damaged files are added.

    Returns:
      :data:`Replicates`; empty where there is no file.
    """
    files = []
    for path in sorted(folder.glob("*.npz")):
        try:
            files.append(launch.read_npz(path, "Its row has no interval over instances."))
        except launch.UserError as error:
            said.append(str(error))
    if not files:
        return {}
    ids = np.unique(np.concatenate([file["id"] for file in files]))
    generator = np.random.default_rng(0)
    draws = generator.multinomial(len(ids), np.full(len(ids), 1 / len(ids)), _NUM_REPLICATES)
    replicates: dict[str, np.ndarray] = {}
    known = ("id", "sums", "metrics", "method", "stream", "seed", "role")
    for file in files:
        unit = [file[name].item() for name in ("method", "seed", "role")]
        same = (frame[["method", "seed", "split_role"]] == unit).all(axis=1)
        tags = [name for name in file if name not in known and name in frame]
        weights = draws[:, np.searchsorted(ids, file["id"])]
        for index, row in frame[same].iterrows():
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
