"""Which images of a trial are whose, where several processes share the work.

A share is cut from the plans before anything is read: a process opens no image of another's. No
share changes a result: an image adapts alone, a batch is never cut, a stream never shared.
"""

from collections.abc import Sequence

from ttt_jax.data.streams import Plan


def _cut(plans: Sequence[Plan], first: int, last: int) -> tuple[Plan, ...]:
    """The rows ``first`` to ``last`` of plans that come one after the other."""
    made, start = [], 0
    for plan in plans:
        size = len(plan.index)
        low, high = max(first - start, 0), min(last - start, size)
        if low < high:
            made.append(Plan(*(column[low:high] for column in plan)))
        start += size
    return tuple(made)


def of_images(plans: Sequence[Plan], index: int, count: int) -> tuple[Plan, ...]:
    """The share of process ``index`` of ``count``: a range of images, of even size."""
    total = sum(len(plan.index) for plan in plans)
    return _cut(plans, total * index // count, total * (index + 1) // count)


def of_batches(plans: Sequence[Plan], batch_size: int, index: int, count: int) -> tuple[Plan, ...]:
    """The share of process ``index`` of ``count``: a range of whole batches."""
    starts, start = [], 0
    for plan in plans:
        starts += range(start, start + len(plan.index), batch_size)
        start += len(plan.index)
    bounds = [*starts, start]
    first, last = (len(starts) * edge // count for edge in (index, index + 1))
    return _cut(plans, bounds[first], bounds[last])
