"""What the records of ``benchmarks.layers`` and ``layer_language`` come to, for pages."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from benchmarks import layer_language, layers
from ttt_jax.kernels.ttt_linear import limits


def milliseconds(
    record: Mapping[str, Any], name: str = "forward_ms", part: str = "kernels"
) -> float:
    """Of a call of a record's one work: in the configuration that calls take, or by a peer."""
    (work,) = record["config"]["works"]
    sizes = layers.WORKS[work]
    way = limits.chosen(sizes.batch * sizes.heads) if part == "kernels" else part
    (row,) = (row for row in record["rows"] if (row["part"], row["way"]) == (part, way))
    return float(row[name])


forward_ms = partial(milliseconds, part="kernels")
both_ms = partial(milliseconds, name="both_ms")
fla_forward_ms = partial(milliseconds, part="fla_chunk")


def tokens_per_second(record: Mapping[str, Any]) -> float:
    """Forward and backward, of a record's one work."""
    sizes = layers.WORKS[record["config"]["works"][0]]
    return 1e3 * sizes.batch * sizes.tokens / both_ms(record)


def loss_gain(record: Mapping[str, Any]) -> float:
    """Nats by which the state of TTT-Linear lowers the loss in the last of eight lengths."""
    return float(layer_language.headlines(record["rows"])["ttt_lm_loss_gain_8x"])
