"""From the flags of a benchmark to its output and its settings."""

from collections.abc import Mapping
from typing import Any

import ml_collections


def chosen(holders: Mapping[str, Any]) -> tuple[str, ml_collections.ConfigDict]:
    """The file to write, and the other flags' values; lists become tuples, which records keep.

    Args:
      holders: of absl, by the name of the flag; ``out`` is among them.
    """
    values = {name: holder.value for name, holder in holders.items()}
    out = values.pop("out")
    kept = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
    return out, ml_collections.ConfigDict(kept)
