"""From the flags of a benchmark to its output, its settings, and its run."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from experiments import launch


def chosen(holders: Mapping[str, Any]) -> tuple[str, ml_collections.ConfigDict]:
    """The file to write, and the other flags' values; lists become tuples, which records keep.

    Args:
      holders: of absl, by the name of the flag; ``out`` is among them.
    """
    values = {name: holder.value for name, holder in holders.items()}
    out = values.pop("out")
    kept = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
    return out, ml_collections.ConfigDict(kept)


def start(run: Callable[[str, ml_collections.ConfigDict], Any], holders: Mapping[str, Any]) -> None:
    """The program of a benchmark: ``run(out, settings)`` on the values of its flags.

    Args:
      run: takes the file to write and the settings.
      holders: as of :func:`chosen`.
    """

    def main(argv: Sequence[str]) -> None:
        del argv
        run(*chosen(holders))

    launch.run(main)
