"""What the results page shows of a record of ``experiments.diagnose``: correlation, plot, means."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from experiments.report import alignment


def noise_share(rows: Sequence[dict[str, Any]]) -> float | None:
    """Returns the share of the variance of the gains that few images per set account for.

    An image is turned right (1), wrong (-1) or neither (0), and a set's gain is their mean.

    Returns:
      At most 1; None for fewer than three rows, or gains that are all the same.
    """
    frame = pd.DataFrame(rows)
    if len(rows) < 3 or frame["gain"].nunique() < 2:
        return None
    turned = frame["turned_right"] + frame["turned_wrong"]
    noise = ((turned - frame["gain"] ** 2) / frame["num_examples"]).mean()
    return min(1.0, noise / frame["gain"].var(ddof=0))


def markdown(record: dict[str, Any]) -> str:
    """Returns what a page shows of a record, in MyST: correlation, plot, means per severity."""
    rows, r = record["rows"], alignment.correlation(record["rows"])
    share, noise = noise_share(rows), ""
    if share is not None:
        noise = (
            f"Sampling noise is {100 * share:.0f} % of the variance of these gains, which by "
            f"itself keeps r below about {(1 - share) ** 0.5:.2f}. "
        )
    text = (
        f"Over {len(rows)} sets of {rows[0]['dataset']}, {rows[0]['num_examples']} images each, "
        "the mean inner product of the main and the auxiliary gradient (shared encoder parameters "
        f"that adapt) and the gain of `{rows[0]['method']}` correlate with r = "
        f"{'undefined' if r is None else f'{r:.2f}'}. {noise}{alignment.PUBLISHED} Computed from "
        f"`{record['command']}` on {record['device_count']} x {record['device']}, commit "
        f"{record['commit']}; see [Diagnostics](diagnostics.md)."
    )
    names = ["inner_product", "cosine", "aligned_share", "source_error", "gain"]
    means = alignment.cells(pd.DataFrame(rows).groupby("severity")[names].mean()).reset_index()
    lines = [list(means), ["---"] * len(means.columns), *means.astype(str).to_numpy().tolist()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    plot = f"```{{raw}} html\n{alignment.picture(rows)}\n```"
    return f"{text}\n\n{plot}\n\nMeans over the corruptions:\n\n{table}\n"
