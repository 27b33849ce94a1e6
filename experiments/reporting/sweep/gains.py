"""What adapting changed: the error of the model's own prediction minus that of a row."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

# Baselines by preference; a method that begins with the name and takes no steps counts too.
_NAMES = ("source", "joint")
# What two rows must share to be compared: one model, the same images.
_SAME = (
    "checkpoint",
    "dataset",
    "domain",
    "severity",
    "seed",
    "split_role",
    "sequence",
    "num_examples",
)


def baseline_rank(method: str | None, num_steps: float | None) -> int | None:
    """How good a baseline a method is, 0 the best; None for one that adapts."""
    if not method or num_steps or method.endswith("_online"):
        return None
    for place, name in enumerate(_NAMES):
        if method.startswith(name):
            return 2 * place + (method != name)
    return None


def gains(columns: Mapping[str, Sequence[Any]]) -> list[float | None]:
    """The gain of every row, a fraction: positive where adapting lowers the error.

    The baseline is the row of ``source`` or ``joint`` of the same model, images and seed, or the
    mean of several such rows. Where there is none, it is ``turned_right - turned_wrong``, which is
    the same by definition: both are counted against the model's own prediction.

    Args:
      columns: equally long; missing values are None. Columns may be missing, too.

    Returns:
      One gain per row, None where nothing says what the model itself does there.
    """
    error = columns["error"]
    empty: list[Any] = [None] * len(error)
    methods, steps = columns.get("method", empty), columns.get("num_steps", empty)
    keys = list(zip(*(columns.get(name, empty) for name in _SAME), strict=True))
    found: dict[tuple[Any, ...], tuple[int, list[float]]] = {}
    for key, method, step, value in zip(keys, methods, steps, error, strict=True):
        rank = baseline_rank(method, step)
        if rank is None or value is None:
            continue
        held = found.get(key)
        if held is None or rank < held[0]:
            found[key] = (rank, [value])
        elif rank == held[0]:
            held[1].append(value)
    baselines = {key: math.fsum(values) / len(values) for key, (_, values) in found.items()}
    right, wrong = columns.get("turned_right", empty), columns.get("turned_wrong", empty)
    made: list[float | None] = []
    for key, value, gained, lost in zip(keys, error, right, wrong, strict=True):
        if value is None:
            made.append(None)
        elif key in baselines:
            made.append(baselines[key] - value)
        else:
            made.append(None if gained is None or lost is None else gained - lost)
    return made
