"""The devices of a mesh axis, and the calls that keep all of them at work.

Every device has instances, batches or streams of its own; nothing is exchanged between them.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ttt_jax.task import Examples

AXIS = "data"


class Devices(NamedTuple):
    """The devices along the axis ``data`` of a mesh; the default device without one."""

    mesh: Mesh | None = None

    @property
    def num(self) -> int:
        """How many devices have work of their own."""
        return 1 if self.mesh is None else self.mesh.shape[AXIS]

    def put(self, tree: Any) -> Any:
        """Spreads the leading axis of every leaf, a multiple of :attr:`num`, over them."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec(AXIS)))

    def padded(self, count: int) -> int:
        """The next multiple of :attr:`num`."""
        return -(-count // self.num) * self.num

    def each(self, fn: Callable[..., Any], shared: int) -> Callable[..., Any]:
        """``fn`` on every device's part of its arguments; the first ``shared`` are replicated."""
        if self.mesh is None:
            return fn
        every, part = PartitionSpec(), PartitionSpec(AXIS)

        def run(*arguments: Any) -> Any:
            specs = (every,) * shared + (part,) * (len(arguments) - shared)
            # As in ttt_jax.batched: with the checks on, gradients would be summed over devices.
            mapped = jax.shard_map(
                fn, mesh=self.mesh, in_specs=specs, out_specs=part, check_vma=False
            )
            return mapped(*arguments)

        return run


class Call(NamedTuple):
    """What one call of a program is given.

    Attributes:
      id: int64 ``[N]``, or ``[D, N]`` with a batch for each device.
      x: pytree with the same leading axes.
      counts: how many results are real: the instances of one call, or those of each batch that
        is not a repetition.
    """

    id: np.ndarray
    x: Any
    counts: tuple[int, ...]


def calls_of_instances(batches: Sequence[Examples], size: int, devices: Devices) -> Iterator[Call]:
    """All instances of a stream, at most ``size`` per device and call.

    The last instance is repeated so that all calls have one size, and so one compiled program:
    ``size`` on one device, else what leaves the least to repeat. Batches whose instances have
    other shapes than those before them, such as longer documents, begin a call, and a size, anew.
    """
    for _, group in itertools.groupby(batches, lambda batch: shapes_of(batch)[1:]):
        alike = list(group)
        most = min(size, sum(len(batch.id) for batch in alike))
        yield from _calls_of_equal_shapes(alike, most, devices)


def shapes_of(batch: Examples) -> tuple[Any, ...]:
    """How many instances a batch has, and the shapes of the leaves of each."""
    return (len(batch.id), *(np.shape(leaf)[1:] for leaf in jax.tree.leaves(batch.x)))


def _calls_of_equal_shapes(
    batches: Sequence[Examples], size: int, devices: Devices
) -> Iterator[Call]:
    ids = np.concatenate([batch.id for batch in batches])
    starts = np.cumsum([0, *(len(batch.id) for batch in batches)])
    num_calls = -(-len(ids) // (size * devices.num))
    if devices.num > 1:
        size = devices.padded(-(-len(ids) // num_calls))
    for first in range(0, len(ids), size):
        last = min(first + size, len(ids))
        parts = [
            jax.tree.map(lambda leaf, a=first - start, b=last - start: leaf[max(a, 0) : b], batch.x)
            for start, batch in zip(starts, batches, strict=False)
            if first < start + len(batch.id) and start < last
        ]
        missing = size - (last - first)
        parts.append(
            jax.tree.map(lambda leaf, n=missing: np.repeat(leaf[-1:], n, axis=0), parts[-1])
        )
        index = np.minimum(np.arange(first, first + size), last - 1)
        x = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        yield Call(ids[index], x, (last - first,))


def calls_of_batches(batches: Sequence[Examples], devices: Devices) -> Iterator[Call]:
    """Batches as they are, one per device: a repeated instance would change a batch.

    A smaller one has a call, and a program, of its own. Devices without a batch repeat one.
    """
    groups: list[list[Examples]] = []
    for batch in batches:
        room = groups and len(groups[-1]) < devices.num
        if room and shapes_of(groups[-1][0]) == shapes_of(batch):
            groups[-1].append(batch)
        else:
            groups.append([batch])
    for group in groups:
        filled = [*group, *group[-1:] * (devices.num - len(group))]
        yield Call(
            np.stack([batch.id for batch in filled]),
            jax.tree.map(lambda *leaves: np.stack(leaves), *(batch.x for batch in filled)),
            tuple(len(batch.id) for batch in group),
        )


def on_host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def cut_as(lengths: Sequence[int], outputs: Sequence[Any]) -> list[Any]:
    """Outputs of calls, cut as the batches of the stream; no batch has outputs of two shapes."""

    def shapes(output: Any) -> list[tuple[int, ...]]:
        return [np.shape(leaf)[1:] for leaf in jax.tree.leaves(output)]

    lengths = list(lengths)
    parts: list[Any] = []
    for _, group in itertools.groupby(outputs, shapes):
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *group)
        start, total = 0, len(jax.tree.leaves(joined)[0])
        while start < total:
            end = start + lengths[len(parts)]
            parts.append(jax.tree.map(lambda leaf, a=start, b=end: leaf[a:b], joined))
            start = end
    return parts
