"""How fast a program is with so many instances in flight, by trying."""

import time
from collections.abc import Callable
from typing import Any

import jax

from ttt_jax import _checks, budget

# Few instances at once are timed over several chunks, so that the start of a call does not count.
_LEAST_TIMED, _LEAST_CHUNKS = 16, 2
_REPEATS = 2
# A first call this much slower than the best so far is not repeated, where that saves seconds: in a
# short one the start of the program may be most of it.
_HOPELESS, _SHORT_SECONDS = 3.0, 1.0

Run = Callable[..., Any]


class _Trials:
    """Compiled programs by size, over as few instances as time a size."""

    def __init__(
        self, run_of: Callable[[int], Run], fixed: tuple[Any, ...], data: Any, devices: int
    ):
        self._run_of, self._fixed, self._data, self._devices = run_of, fixed, data, devices
        self.most = -(-_checks.leading_size("data", data) // devices)
        self._compiled: dict[int, tuple[jax.stages.Compiled, Any, int]] = {}

    def even(self, size: int) -> int:
        """The smallest size that needs no more chunks than ``size``."""
        return -(-self.most // -(-self.most // size))

    def compiled(self, size: int) -> jax.stages.Compiled:
        """The program with ``size`` in flight."""
        return self._trial(size)[0]

    def _trial(self, size: int) -> tuple[jax.stages.Compiled, Any, int]:
        if size not in self._compiled:
            chunks = max(_LEAST_CHUNKS, -(-_LEAST_TIMED // size))
            count = min(self.most, chunks * size)
            data = jax.tree.map(lambda leaf: leaf[: count * self._devices], self._data)
            program = jax.jit(self._run_of(size)).lower(*self._fixed, *data).compile()
            self._compiled[size] = program, data, -(-count // size)
        return self._compiled[size]

    def seconds(self, size: int, best: float) -> float:
        """Seconds per instance of a call over all of them, padding included."""
        program, data, chunks = self._trial(size)
        each = -(-self.most // size) / (chunks * self.most)
        found = [_seconds(program, *self._fixed, *data)]
        if found[0] < _SHORT_SECONDS or found[0] * each < _HOPELESS * best:
            found = [_seconds(program, *self._fixed, *data) for _ in range(_REPEATS)]
        return min(found) * each

    def other_bytes(self) -> int:
        """Bytes that instances which are not in flight take: what they are, and what they give."""
        given = jax.eval_shape(self._run_of(1), *self._fixed, *self._data)
        leaves = jax.tree.leaves((self._data, given))
        total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if hasattr(leaf, "dtype"))
        # Twice: the last chunk is padded in a copy.
        return 2 * total // self._devices


def _seconds(program: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - start


def seconds_by_size(
    run_of: Callable[[int], Run],
    fixed: tuple[Any, ...],
    data: Any,
    *,
    devices: int = 1,
    max_seconds: float,
) -> dict[int, float]:
    """Seconds per instance of a program by instances in flight, fastest first.

    Args:
      run_of: ``run_of(size)(*fixed, *data)`` has ``size`` instances in flight per device.
      fixed: arguments without an instance axis.
      data: arguments with one; the first instances are what is timed.
      devices: over how many the instances are spread.
      max_seconds: no other size is begun after these, but for one and for the most that fit.
    """
    trials = _Trials(run_of, fixed, data, devices)
    start = time.perf_counter()
    limit = max(budget.free_bytes() - trials.other_bytes(), 0)
    largest = budget.largest_chunk(trials.compiled, limit, most=trials.most).size
    powers = [2**power for power in range(largest.bit_length()) if 2**power < largest]
    sizes = sorted({trials.even(size) for size in (*powers, largest)})
    found: dict[int, float] = {}
    for place, size in enumerate(_from_both_ends(sizes)):
        if place > 1 and time.perf_counter() - start > max_seconds:
            break
        try:
            found[size] = trials.seconds(size, min(found.values(), default=float("inf")))
        except jax.errors.JaxRuntimeError:
            # The compiler's figure is no promise; a smaller size is there.
            if size == min(sizes):
                raise
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def _from_both_ends(sizes: list[int]) -> list[int]:
    """The last, the first, the last but one, ...: the fastest is mostly near an end."""
    left, order = list(sizes), []
    while left:
        order.append(left.pop())
        left.reverse()
    return order
