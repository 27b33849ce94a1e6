"""The devices of this process, and the programs that run a method over all of them.

Every device has its own images, batches or streams; nothing is exchanged between them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ttt_jax as ttt
from experiments import launch, methods as methods_lib
from ttt_jax import data

AXIS = "data"


class Devices(NamedTuple):
    """Some devices of this process; a mesh only where there are several."""

    mesh: Mesh | None = None

    @property
    def count(self) -> int:
        """How many."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def copied(self) -> NamedSharding | None:
        """The sharding of what every device has a copy of; None for one device."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def put(self, tree: Any) -> Any:
        """Spreads the leading axis of every leaf, a multiple of :attr:`count`, over them."""
        if self.mesh is None:
            return jax.tree.map(jax.numpy.asarray, tree)
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec(AXIS)))

    def padded(self, count: int) -> int:
        """The next multiple of :attr:`count`."""
        return -(-count // self.count) * self.count

    def each(self, fn: Callable[..., Any], shared: int) -> Callable[..., Any]:
        """``fn`` on every device's own part of its arguments; the first ``shared`` are whole."""
        if self.mesh is None:
            return fn
        whole, own = PartitionSpec(), PartitionSpec(AXIS)

        def run(*arguments: Any) -> Any:
            specs = (whole,) * shared + (own,) * (len(arguments) - shared)
            # As in ttt_jax.batched: with the checks on, gradients would be summed over devices.
            mapped = jax.shard_map(
                fn, mesh=self.mesh, in_specs=specs, out_specs=own, check_vma=False
            )
            return mapped(*arguments)

        return run


def local(count: int = 0) -> Devices:
    """The first ``count`` devices of this process, all for 0.

    Raises:
      UserError: more than there are.
    """
    found = jax.local_devices()
    if not 0 <= count <= len(found):
        raise launch.UserError(
            f"--devices must lie between 0 (all) and {len(found)}, all that this process has; "
            f"got {count}."
        )
    chosen = found[: count or len(found)]
    return Devices(Mesh(np.asarray(chosen), (AXIS,)) if len(chosen) > 1 else None)


class Call(NamedTuple):
    """What one call of a program is given, and how many images are real in each of its results.

    Attributes:
      image: float32 ``[N, H, W, C]``, or ``[D, N, H, W, C]`` with a whole batch for each device.
      id: int64 ``[N]``, or ``[D, N]``.
      counts: the images of a per-sample method, or those of each batch that is not a repetition.
    """

    image: np.ndarray
    id: np.ndarray
    counts: tuple[int, ...]


def calls_of_images(
    batches: Sequence[data.DomainBatch], most: int, devices: Devices, *, fixed: bool
) -> Iterator[Call]:
    """All images of a trial, at most ``most`` per device and call.

    The last image is repeated so that all calls have one size, and so one compiled program:
    ``most`` for each device if ``fixed``, else what leaves the least to repeat.
    """
    ids = np.concatenate([batch.id for batch in batches])
    starts = np.cumsum([0, *(len(batch.id) for batch in batches)])
    calls = -(-len(ids) // (most * devices.count))
    size = devices.padded(most if fixed else -(-len(ids) // calls))
    for first in range(0, len(ids), size):
        last = min(first + size, len(ids))
        parts = [
            batch.image[max(first - start, 0) : last - start]
            for start, batch in zip(starts, batches, strict=False)
            if first < start + len(batch.id) and start < last
        ]
        parts.append(np.repeat(parts[-1][-1:], size - (last - first), axis=0))
        places = np.minimum(np.arange(first, first + size), last - 1)
        yield Call(np.concatenate(parts), ids[places], (last - first,))


def calls_of_batches(batches: Sequence[data.DomainBatch], devices: Devices) -> Iterator[Call]:
    """The batches of a trial as they are, one per device: a repeated image would change a batch.

    A smaller one has a call, and a program, of its own. Devices without a batch repeat one.
    """
    groups: list[list[data.DomainBatch]] = []
    for batch in batches:
        if groups and len(groups[-1]) < devices.count and len(groups[-1][0].id) == len(batch.id):
            groups[-1].append(batch)
        else:
            groups.append([batch])
    for group in groups:
        filled = [*group, *group[-1:] * (devices.count - len(group))]
        yield Call(
            np.stack([batch.image for batch in filled]),
            np.stack([batch.id for batch in filled]),
            tuple(len(batch.id) for batch in group),
        )


def program(
    method: methods_lib.Method, settings: dict[str, Any], devices: Devices, chunk_size: int
) -> Callable[..., Any]:
    """``(params, numbers, statistics, images, keys) -> (output, info)``.

    Of a ``per_sample`` method the leading axis is that of images, of a ``batch`` method that of
    batches, one per device. Streams take a carry before the images, and return it; their leading
    axis is that of streams. ``numbers`` are the settings that may be traced, so candidates that
    differ in these alone share one compiled program.
    """

    def per_sample(params: Any, numbers: Any, statistics: Any, images: Any, keys: Any) -> Any:
        predict = method.built(settings | numbers, statistics)
        many = ttt.batched(predict, chunk_size=chunk_size, mesh=devices.mesh, axis=AXIS)
        return many(params, images, keys)

    def batch(params: Any, numbers: Any, statistics: Any, images: Any, keys: Any) -> Any:
        # One batch per device, without vmap: its copy of the model is the only one there.
        results = method.built(settings | numbers, statistics)(params, images[0], keys[0, 0])
        return jax.tree.map(lambda leaf: leaf[None], results)

    def streams(
        params: Any, numbers: Any, statistics: Any, carry: Any, images: Any, keys: Any
    ) -> Any:
        stream = method.built(settings | numbers, statistics)
        step = jax.vmap(stream.step, in_axes=(None, 0, 0, 0))
        if method.whole_batch:
            carry, (output, info) = step(params, carry, images, keys[:, 0])
            return carry, output, info
        carry, results = jax.lax.scan(
            lambda carry, pair: step(params, carry, *pair),
            carry,
            jax.tree.map(lambda leaf: jax.numpy.swapaxes(leaf, 0, 1), (images, keys)),
        )
        output, info = jax.tree.map(lambda leaf: jax.numpy.swapaxes(leaf, 0, 1), results)
        return carry, output, info

    if method.scope == "per_sample":
        return per_sample
    return devices.each(streams if method.scope == "stream" else batch, 3)
