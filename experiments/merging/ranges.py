"""Ranges of the examples of a split, and what several of them make."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from experiments import launch
from ttt_jax.data import splits

_ENDLESS = float("inf")


class _Range(NamedTuple):
    start: float
    stop: float
    base: str
    unit: str  # "%", or "" for numbers of examples and the whole split

    def __str__(self) -> str:
        start = f"{self.start:.0f}{self.unit}" if self.start else ""
        stop = f"{self.stop:.0f}{self.unit}" if self.stop != _ENDLESS else ""
        return f"{self.base}[{start}:{stop}]" if start or stop else self.base


def joined(splits_of: Iterable[str]) -> tuple[str, bool]:
    """The range from the first example of some ranges to the last, and whether they make it.

    Args:
      splits_of: at least one of ``test``, ``test[100:200]`` or ``test[10%:20%]``.

    Returns:
      The range, and False where the ranges overlap or leave examples out.

    Raises:
      UserError: they are of two splits or in two units, or bounds count from the end.
    """
    found = sorted(map(_parsed, splits_of))
    cut = {one.unit for one in found if str(one) != one.base}
    if len(cut) > 1 or len({one.base for one in found}) > 1:
        raise launch.UserError(
            "ranges of data.test are of one split, all in percent or all in images; got "
            f"{', '.join(sorted({str(one) for one in found}))}."
        )
    stop = max(one.stop for one in found)
    whole = _Range(found[0].start, stop, found[0].base, "".join(cut))
    return str(whole), all(one.stop == other.start for one, other in itertools.pairwise(found))


def _parsed(text: str) -> _Range:
    base, *bounds = splits.parse(text)
    written = [bound for bound in bounds if bound]
    units = {"%" if bound.endswith("%") else "" for bound in written}
    if len(units) > 1 or any(bound.startswith("-") for bound in written):
        raise launch.UserError(
            "data.test of a part is 'test', 'test[100:200]' or 'test[10%:20%]', counted from the "
            f"beginning; got {text!r}."
        )
    start, stop = (float(bound.rstrip("%")) if bound else _ENDLESS for bound in bounds)
    ends = stop == 100 and units == {"%"}
    start = 0.0 if start == _ENDLESS else start
    return _Range(start, _ENDLESS if ends else stop, base, "".join(units))
