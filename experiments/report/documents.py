"""Documents: what every method saves, and the passages on which adapting gained and lost most."""

import pathlib
from typing import Any

import numpy as np
import pandas as pd

from experiments import launch, passages
from experiments.report import charts, read, table
from experiments.report.table import Data

_MEASURES = ("bits_per_byte", "pooled_bits_per_byte", "saved", "harmed", "agreement")
_MEDIAN = "saved, median (%)"


def lines(data: Data) -> pd.DataFrame | None:
    """Returns a line per domain and method, controls among them; None without documents.

    Figures have half a 95 % interval beside them where there is one. The median is over documents,
    and over seeds, of the share of the source's bits that is saved.
    """
    rows = data.rows()
    if "saved" not in rows or rows["saved"].isna().all():
        return None
    columns = {}
    for name in _MEASURES:
        if name in rows:
            summary = table.by_domain(data, name).set_index(["domain", "method"])
            scale = charts.scale_of(name)
            columns[charts.title_of(name)] = pd.Series(
                {
                    place: f"{scale * line['mean']:.{1 if scale > 1 else 3}f}"
                    + (f" ± {scale * line['half']:.{1 if scale > 1 else 3}f}" * (line["half"] > 0))
                    for place, line in summary.iterrows()
                }
            )
    medians = _medians(data)
    if medians:
        columns[_MEDIAN] = pd.Series(medians).map("{:.1f}".format)
    counts = rows.groupby(["domain", "method"])["num_examples"].max().map("{:.0f}".format)
    frame = pd.DataFrame({**columns, "documents": counts})
    order = [(domain, method) for domain in data.domains for method in data.methods]
    frame = frame.reindex([place for place in order if place in frame.index])
    return frame.rename_axis(["domain", "method"])


def _medians(data: Data) -> dict[tuple[str, str], float]:
    """In percent, of the files of instances."""
    held: dict[tuple[str, str], list[np.ndarray]] = {}
    for path in sorted((data.results.folder / "instances").glob("*__reported.npz")):
        try:
            arrays = launch.read_npz(path, "It has no median.")
        except launch.UserError:
            continue  # said where its intervals are made
        names = arrays["metrics"].tolist()
        if "saved" in names:
            place = str(arrays["stream"]), str(arrays["method"])
            held.setdefault(place, []).append(arrays["sums"][:, names.index("saved")])
    return {place: 100 * float(np.median(np.concatenate(v))) for place, v in held.items()}


def shown_passages(folder: pathlib.Path, said: list[str]) -> list[dict[str, Any]]:
    """Returns the documents of ``passages.json``, those that lost most first; [] without the file.

    Args:
      folder: of a run.
      said: notes, to which a damaged file is added.
    """

    def saved(document: dict[str, Any]) -> dict[str, Any]:
        return document | {"saved": 100 * (1 - document["after"] / document["before"])}

    made = read.kept_objects(folder / passages.FILE, saved, "passages", said)
    return sorted(made, key=lambda document: document["saved"])
