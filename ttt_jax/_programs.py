"""What a method is to the loop over a task, and the programs that run it."""

from collections.abc import Callable, Hashable, MutableMapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from ttt_jax import _chunks, _contract, batching, budget
from ttt_jax._devices import AXIS, Devices
from ttt_jax.base import Predictor, PyTree, Stream


class InBatches(NamedTuple):
    """A method whose instance is a batch of ``size`` examples (smaller where a batch ends)."""

    method: Predictor | Stream
    size: int


class Parametric(NamedTuple):
    """A method over values that its compiled program takes as arguments.

    Candidates that differ in ``values`` alone share one program, and source statistics are never
    constants of it.

    Attributes:
      build: ``build(values) -> Predictor | Stream | InBatches``.
      values: pytree of arrays.
      key: methods of equal key have the same program; None: of the same ``build``.
    """

    build: Callable[[PyTree], Any]
    values: PyTree
    key: Hashable = None


Method = Any  # Predictor | Stream | InBatches | Parametric


def scope_of(method: Method) -> str:
    """``per_sample``, ``batch`` or ``stream``: what the state of a method lives as long as."""
    if isinstance(method, Parametric):
        method = method.build(method.values)
    inner = method.method if isinstance(method, InBatches) else method
    if not isinstance(inner, Stream):
        _contract.require_predictor("method", inner)
    if isinstance(inner, Stream):
        return "stream"
    return "batch" if isinstance(method, InBatches) else "per_sample"


def key_of(method: Method) -> Hashable:
    """What methods of the same program have in common."""
    if not isinstance(method, Parametric):
        return method
    return method.build if method.key is None else method.key


def stream_of(method: Method) -> Stream:
    """The stream of a method whose scope is ``stream``."""
    built: Any = method.build(method.values) if isinstance(method, Parametric) else method
    stream: Any = built.method if isinstance(built, InBatches) else built
    return cast(Stream, stream)


def program(method: Method, devices: Devices, chunk_size: int | None) -> Callable[..., Any]:
    """``(params, values, [carry,] xs, keys) -> ([carry,] output, info)``.

    The leading axis is that of instances; of batches, one per device; or of streams.
    """

    def build(values: PyTree) -> Any:
        return method.build(values) if isinstance(method, Parametric) else method

    built = build(method.values) if isinstance(method, Parametric) else method
    in_batch = isinstance(built, InBatches)

    def per_sample(params: Any, values: Any, xs: Any, keys: Any) -> Any:
        many = batching.batched(build(values), chunk_size=chunk_size, mesh=devices.mesh, axis=AXIS)
        return many(params, xs, keys)

    def batch(params: Any, values: Any, xs: Any, keys: Any) -> Any:
        # One batch per device, without vmap: its copy of the model is the only one there.
        first = jax.tree.map(lambda leaf: leaf[0], xs)
        results = build(values).method(params, first, keys[0, 0])
        return jax.tree.map(lambda leaf: leaf[None], results)

    def streams(params: Any, values: Any, carry: Any, xs: Any, keys: Any) -> Any:
        stream = build(values).method if in_batch else build(values)
        step = jax.vmap(stream.step, in_axes=(None, 0, 0, 0))
        if in_batch:
            carry, (output, info) = step(params, carry, xs, keys[:, 0])
            return carry, output, info
        carry, results = jax.lax.scan(
            lambda carry, pair: step(params, carry, *pair),
            carry,
            jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), (xs, keys)),
        )
        output, info = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), results)
        return carry, output, info

    scope = scope_of(method)
    if scope == "per_sample":
        return per_sample
    return devices.each(streams if scope == "stream" else batch, 2)


# What the programs may spend on finding how many are in flight, per method.
_MAX_SECONDS = 180.0


def fastest(
    method: Method,
    devices: Devices,
    fixed: tuple[Any, Any],
    data: tuple[Any, ...],
    noted: MutableMapping[str, dict[int, float]],
    programs: dict[Hashable, Any],
) -> int | None:
    """The fastest number in flight, as noted or as measured now; None where none is chosen.

    Args:
      method: of any scope.
      devices: that share the instances.
      fixed: parameters and values.
      data: instances and keys.
      noted: seconds per instance by size, fastest first, by the text of a key; is added to.
      programs: where measurements of methods of equal key are kept too, for other notes.
    """
    if scope_of(method) != "per_sample":
        return None
    key = key_of(method)
    name, place = str(key), ("seconds", key, *map(jnp.shape, jax.tree.leaves(data)))
    if name not in noted:
        if place not in programs:
            programs[place] = _chunks.seconds_by_size(
                lambda size: program(method, devices, size),
                fixed,
                data,
                devices=devices.num,
                max_seconds=_MAX_SECONDS,
            )
        noted.setdefault(name, programs[place])
    most = jax.tree.leaves(data)[0].shape[0] // devices.num
    return min(most, next(iter(noted[name])))


def compiled(
    method: Method,
    devices: Devices,
    chunk_size: int | None,
    fixed: tuple[Any, Any],
    data: tuple[Any, ...],
) -> Any:
    """The compiled program of a method for arguments ``(*fixed, *data)``.

    ``chunk_size`` 0 is as many instances in flight as fit.
    """

    def compile_for(size: int | None) -> Any:
        return jax.jit(program(method, devices, size)).lower(*fixed, *data).compile()

    if scope_of(method) != "per_sample" or chunk_size != 0:
        return compile_for(chunk_size)
    most = jax.tree.leaves(data)[0].shape[0] // devices.num
    found = budget.largest_chunk(compile_for, budget.free_bytes(), most=most)
    # Chunks of one size, of which the last would be padded to the others'.
    even = -(-most // -(-most // found.size))
    return found.compiled if even == found.size else compile_for(even)
