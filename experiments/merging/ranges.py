"""Ranges of the images of a split, and what several of them make."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from experiments import launch
from ttt_jax.data import splits

_ENDLESS = float("inf")


class Range(NamedTuple):
    """The images ``[start, stop)`` of a split.

    Attributes:
      base: the split.
      unit: ``"%"``, ``"images"``, or ``""`` for the whole split, which is the same in both.
      start: the first one.
      stop: the one after the last, infinite for the end of the split.
    """

    base: str
    unit: str
    start: float
    stop: float

    def __str__(self) -> str:
        if not self.unit:
            return self.base
        sign = "%" if self.unit == "%" else ""
        start = f"{self.start:.0f}{sign}" if self.start else ""
        stop = f"{self.stop:.0f}{sign}" if self.stop != _ENDLESS else ""
        return f"{self.base}[{start}:{stop}]"


def range_of(text: str) -> Range:
    """A split string as a range.

    Raises:
      UserError: bounds that count from the end, or one in percent and one in images.
    """
    split = splits.parse(text)
    bounds = [bound for bound in (split.start, split.stop) if bound is not None]
    units = {"%" if bound.endswith("%") else "images" for bound in bounds}
    if len(units) > 1 or any(bound.startswith("-") for bound in bounds):
        raise launch.UserError(
            "data.test of a part is 'test', 'test[100:200]' or 'test[10%:20%]', counted from the "
            f"beginning; got {text!r}."
        )
    start = float(split.start.rstrip("%")) if split.start else 0.0
    stop = float(split.stop.rstrip("%")) if split.stop else _ENDLESS
    if units == {"%"} and stop == 100:
        stop = _ENDLESS
    whole = (start, stop) == (0, _ENDLESS)
    return Range(split.base, "" if whole else units.pop(), start, stop)


def over(ranges: Iterable[Range]) -> Range:
    """From the first image of some ranges to their last.

    Raises:
      UserError: they are of two splits or in two units.
    """
    ranges = list(ranges)
    units = {one.unit for one in ranges if one.unit}
    bases = {one.base for one in ranges}
    if len(units) > 1 or len(bases) > 1:
        there = ", ".join(sorted({str(one) for one in ranges}))
        raise launch.UserError(
            f"ranges of data.test are of one split, all in percent or all in images; got {there}."
        )
    start, stop = min(one.start for one in ranges), max(one.stop for one in ranges)
    unit = "" if (start, stop) == (0, _ENDLESS) else units.pop()
    return Range(bases.pop(), unit, start, stop)


def union(ranges: Iterable[Range]) -> Range:
    """The one range that several make.

    Raises:
      UserError: they overlap, leave images out, are of two splits or in two units.
    """
    ordered = sorted(ranges, key=lambda one: (one.start, one.stop))
    whole = over(ordered)
    for before, after in itertools.pairwise(ordered):
        if before.stop != after.start:
            what = "overlap" if before.stop > after.start else "leave images out between them"
            raise launch.UserError(f"the ranges {before} and {after} {what}; they must adjoin.")
    return whole
