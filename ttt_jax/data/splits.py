"""Split strings with slices, the same for every kind of set: ``test``, ``test[:50%]``."""

import re
from typing import NamedTuple

_FORM = re.compile(r"^([\w.-]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?$")


class Split(NamedTuple):
    """A parsed split string.

    Attributes:
      base: the split it slices, such as ``"test"``.
      start: first bound as written (``"10%"``, ``"-100"``), or None.
      stop: second bound as written, or None.
    """

    base: str
    start: str | None
    stop: str | None


def parse(split: str) -> Split:
    """Reads ``NAME``, ``NAME[a:b]`` or ``NAME[a%:b%]``; bounds may be left out or negative.

    Raises:
      ValueError: any other form, sums of splits included.
    """
    match = _FORM.match(split) if isinstance(split, str) else None
    if match is None:
        raise ValueError(
            f"A split is written 'test', 'test[100:200]' or 'test[:50%]', not {split!r}."
        )
    return Split(*match.groups())


def bounds(split: Split, count: int) -> tuple[int, int]:
    """The positions ``[start, stop)`` a split takes out of ``count`` examples.

    Percentages are rounded to the nearest example, as TFDS does.

    Raises:
      ValueError: a bound lies outside the split, or no example is left.
    """

    def position(text: str | None, default: int) -> int:
        if text is None:
            return default
        value = int(text.rstrip("%"))
        if text.endswith("%"):
            value = round(count * value / 100)
        at = value + count if text.startswith("-") else value
        if not 0 <= at <= count:
            raise ValueError(
                f"The bound {text} of {split.base}[{split.start or ''}:{split.stop or ''}] lies "
                f"outside the split, which has {count} examples."
            )
        return at

    start, stop = position(split.start, 0), position(split.stop, count)
    if stop <= start:
        slice_ = "" if split.start is split.stop is None else "that slice of "
        raise ValueError(
            f"A split needs at least one example, but {slice_}{split.base!r} (which has {count}) "
            "is empty; widen the slice or choose another split."
        )
    return start, stop
