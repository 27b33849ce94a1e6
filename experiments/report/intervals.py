"""Means and their 95 % intervals: over seeds, or by a bootstrap over instances."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom; 1.96 beyond.
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
NORMAL95 = 1.96
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
    rows = frame[frame[measure].notna() & frame[list(by)].notna().all(axis=1)]
    columns = [*by, "mean", "half", "basis", "seeds", "rows", "partial"]
    if rows.empty:
        return pd.DataFrame(columns=columns)
    place = rows.groupby([*PLACE[:3]], dropna=False).ngroup()
    rows = rows.assign(_place=place, _peer="".join(["*"]), seed=rows["seed"].fillna(-1))
    if peers:
        rows["_peer"] = rows.groupby(list(peers)).ngroup()
    per_seed = (
        rows.groupby([*by, "_peer", "seed"], sort=False)
        .agg(value=(measure, "mean"), places=("_place", "nunique"), rows=(measure, "size"))
        .reset_index()
    )
    most = per_seed.groupby(["_peer", "seed"])["places"].max()
    seeds_of_peer = per_seed.groupby("_peer")["seed"].nunique()
    matrix = (replicates or {}).get(measure)
    index_of = {
        key if isinstance(key, tuple) else (key,): part.index
        for key, part in rows.groupby([*by, "seed"], sort=False)
    }
    lines = []
    for key, part in per_seed.groupby(list(by), sort=False):
        key = key if isinstance(key, tuple) else (key,)
        peer = part["_peer"].iloc[0]
        full = part[[n == most[peer, s] for n, s in zip(part["places"], part["seed"], strict=True)]]
        used = full if len(full) else part
        half, basis = _half(
            used["value"].to_numpy(),
            None if matrix is None else [matrix[index_of[(*key, s)]] for s in used["seed"]],
        )
        partial = len(full) < seeds_of_peer[peer]
        mean, count = used["value"].mean(), int(used["rows"].sum())
        lines.append((*key, mean, half, basis, len(used), count, partial))
    return pd.DataFrame(lines, columns=columns)


def _half(values: np.ndarray, parts: Sequence[np.ndarray] | None) -> tuple[float, str]:
    """Half the width of an interval, and what it is over."""
    seeds = instances = np.nan
    if len(values) > 1:
        t = T95[len(values) - 2] if len(values) - 2 < len(T95) else NORMAL95
        seeds = t * values.std(ddof=1) / len(values) ** 0.5
    if parts is not None and not any(np.isnan(part).any() for part in parts):
        instances = NORMAL95 * np.mean([part.mean(axis=0) for part in parts], axis=0).std(ddof=1)
    if np.isnan(seeds) and np.isnan(instances):
        return np.nan, ""
    return (
        (seeds, "seeds")
        if np.nan_to_num(seeds, nan=-1) >= np.nan_to_num(instances, nan=-1)
        else (instances, "instances")
    )


def bootstrap(frame: pd.DataFrame, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the bootstrap replicates of every row whose instances lie in ``folder``.

    Replicates of all rows draw the same instances (by id), so those of a difference are the
    differences of replicates.

    Args:
      frame: rows with ``method``, ``seed``, ``split_role`` and tags, by a plain index.
      folder: holds ``.npz`` files with ``id`` [N], ``sums`` [N, M], ``metrics`` [M], ``method``,
        ``seed``, ``role`` and an array [N] per tag.

    Returns:
      :data:`Replicates`; empty where there is no file.
    """
    files = [np.load(path, allow_pickle=False) for path in sorted(folder.glob("*.npz"))]
    if not files:
        return {}
    ids = np.unique(np.concatenate([file["id"] for file in files]))
    generator = np.random.default_rng(0)
    draws = generator.multinomial(len(ids), np.full(len(ids), 1 / len(ids)), _NUM_REPLICATES)
    found: dict[str, np.ndarray] = {}
    known = ("id", "sums", "metrics", "method", "stream", "seed", "role")
    for file in files:
        mine = (
            (frame["method"] == str(file["method"]))
            & (frame["seed"] == int(file["seed"]))
            & (frame["split_role"] == str(file["role"]))
        )
        tags = [name for name in file.files if name not in known and name in frame]
        weights = draws[:, np.searchsorted(ids, file["id"])]
        for index, row in frame[mine].iterrows():
            keep = np.ones(len(file["id"]), bool)
            for name in tags:
                keep &= file[name] == row[name]
            # Other rows of the method are of another stream.
            if keep.sum() != row["num_examples"]:
                continue
            totals = weights[:, keep].sum(axis=1)
            for name, values in zip(file["metrics"], file["sums"][keep].T, strict=True):
                matrix = found.setdefault(str(name), np.full((len(frame), _NUM_REPLICATES), np.nan))
                with np.errstate(invalid="ignore", divide="ignore"):
                    matrix[index] = weights[:, keep] @ values / totals
    return found
