"""Draws how the times of TTT-Linear's kernels and of causal attention grow with the sequence.

Command: ``python docs/images/layer_scaling.py``; from the committed record of
``python -m benchmarks.layers --parts=scaling``.
"""

import io
import pathlib

import altair as alt
import pandas as pd
from PIL import Image

from experiments.report import committed

_FILE = pathlib.Path(__file__).with_suffix(".png")
_WAYS = {"kernels": "TTT-Linear, kernels", "cudnn": "attention, cuDNN"}
_TIMES = {"forward_ms": "forward", "both_ms": "forward and backward"}


def chart() -> alt.Chart:
    """Milliseconds over tokens, both on scales of powers of two."""
    points = pd.DataFrame(
        {"tokens": row["tokens"], "way": _WAYS[row["way"]], "times": label, "ms": row[name]}
        for row in committed.read("bench_ttt_linear_scaling")["rows"]
        for name, label in _TIMES.items()
        if name in row
    )
    lengths = sorted(points["tokens"].unique().tolist())
    power = alt.Scale(type="log", base=2, nice=False)
    heights = alt.Scale(type="log", base=4, domain=[points["ms"].min(), points["ms"].max()])
    return (
        alt.Chart(points, title="One sequence, 16 heads of 64, bfloat16, one H200")
        .mark_line(point=True)
        .encode(
            alt.X("tokens:Q", scale=power, title="tokens").axis(
                values=lengths, labelExpr="datum.value / 1024 + 'k'"
            ),
            alt.Y("ms:Q", scale=heights, title="milliseconds"),
            alt.Color("way:N", title=None),
            alt.Column("times:N", title=None, sort=list(_TIMES.values())),
        )
        .properties(width=300, height=260)
    )


def main() -> None:
    """Writes ``docs/images/layer_scaling.png``."""
    drawn = io.BytesIO()
    chart().save(drawn, format="png", ppi=144)
    Image.open(drawn).convert("RGB").quantize(64).save(_FILE, optimize=True)


if __name__ == "__main__":
    main()
