"""Running predictors over many instances: in parallel, in chunks, over a mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax import _arguments, _checks, _contract, _trees
from ttt_jax.base import Info, Key, Params, Predictor

__all__ = ["BatchedPredictor", "batched", "sample_keys", "unbatched"]

_EXPLICIT = jax.sharding.AxisType.Explicit

BatchedPredictor = Callable[[Params, Any, Key], tuple[Any, Info]]


@_arguments.checked()
def unbatched(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Turns a model function over a batch into the one-instance ``apply`` of a predictor.

    Args:
      apply: ``(params, inputs[N, ...], ...) -> outputs[N, ...]``.

    Returns:
      ``(params, x, ...) -> output``, the model function at N = 1.

    Raises:
      TypeError: ``apply`` is no function, or one that ``unbatched`` returned.

    Examples:
      >>> import jax.numpy as jnp
      >>> one = unbatched(lambda params, inputs: inputs @ params)
      >>> one(jnp.eye(3), jnp.ones(3)).shape
      (3,)
    """
    _contract.require_model_function("unbatched", apply, extra=None)
    return _contract.OneInstance(apply)


@_arguments.checked(ids=_arguments.array(host=True, kinds="fiubcUS"))
def sample_keys(key: Key, ids: Any) -> Key:
    """One key per instance that follows its id, not its place in the batch.

    Args:
      key: a typed key, the run's seed.
      ids: integers ``[N]`` in [0, 2**32), one per instance; equal ids get equal keys.

    Returns:
      Typed keys ``[N]``: ``fold_in(key, id)``.

    Raises:
      ValueError: ids that are not a vector of integers, or out of range; a key of the generators
        ``rbg`` and ``unsafe_rbg``, whose draws under ``vmap`` depend on the rest of the batch.
    """
    ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    values = _checks.known(ids)
    if values is not None and values.size and values.dtype.kind in "iu":
        if values.min() < 0 or values.max() >= 2**32:
            raise ValueError(
                f"ids must lie in [0, 2**32); got values from {values.min()} to {values.max()}. "
                "Number the samples, or hash their names to 32 bits."
            )
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(
            f"ids must be a vector of integers, one per instance; got shape {ids.shape}, dtype "
            f"{ids.dtype}."
        )
    _checks.check_mapped_keys("sample_keys", key)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(ids, jnp.uint32))


def _count(xs: Any, keys: Key) -> int:
    leaves = [(path, leaf) for path, leaf in _trees.named_leaves(xs) if leaf is not None]
    sizes = {(path, jnp.shape(leaf)[0] if jnp.ndim(leaf) else None) for path, leaf in leaves}
    if not leaves or len({size for _, size in sizes}) != 1 or None in {s for _, s in sizes}:
        raise ValueError(
            "batched needs the same leading sample axis on every leaf of xs; got "
            f"{ {path or 'xs': jnp.shape(leaf) for path, leaf in leaves} }."
        )
    count = jnp.shape(leaves[0][1])[0]
    if not _trees.is_key(keys):
        raise ValueError(
            f"batched needs typed keys [N]; got {getattr(keys, 'dtype', type(keys).__name__)}. "
            "Make them with ttt_jax.sample_keys(jax.random.key(seed), ids)."
        )
    if isinstance(xs, list | tuple) and keys.shape == (len(xs),) != (count,):
        raise ValueError(
            f"batched needs instances along a leading axis; got a {type(xs).__name__} of {len(xs)} "
            f"arrays of shape {jnp.shape(leaves[0][1])}. Stack them: jnp.stack(xs)."
        )
    _checks.check_mapped_keys("batched", keys)
    if keys.shape != (count,):
        raise ValueError(
            f"batched needs keys: one key per instance, shape ({count},); got {keys.shape}. Make "
            "them with ttt_jax.sample_keys(key, ids)."
        )
    if count == 0:
        raise ValueError("batched needs at least one instance; got an empty batch.")
    return count


def _is_traced(tree: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _padded(tree: Any, count: int, total: int) -> Any:
    """Repeats the last instance up to ``total``: real data, so that padding stays finite."""
    if total == count:
        return tree
    places = np.minimum(np.arange(total), count - 1)
    return jax.tree.map(lambda leaf: leaf[places], tree)


def _in_chunks(predictor: Predictor, chunk_size: int | None) -> BatchedPredictor:
    mapped = jax.vmap(predictor, in_axes=(None, 0, 0))

    def run(params: Params, xs: Any, keys: Key) -> tuple[Any, Info]:
        count = keys.shape[0]
        if chunk_size is None or count <= chunk_size:
            return mapped(params, xs, keys)
        chunks = -(-count // chunk_size)
        xs, keys = _padded((xs, keys), count, chunks * chunk_size)
        xs, keys = jax.tree.map(
            lambda leaf: leaf.reshape((chunks, chunk_size) + leaf.shape[1:]), (xs, keys)
        )
        results = jax.lax.map(lambda chunk: mapped(params, *chunk), (xs, keys))
        return jax.tree.map(
            lambda leaf: leaf.reshape((chunks * chunk_size,) + leaf.shape[2:])[:count], results
        )

    return run


@_arguments.checked(mesh=_arguments.instance(jax.sharding.Mesh, jax.sharding.AbstractMesh))
def batched(
    predictor: Predictor,
    *,
    chunk_size: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    axis: str = "data",
) -> BatchedPredictor:
    """Runs a predictor over many instances, each with its own private copy.

    Args:
      predictor: any one-instance predictor.
      chunk_size: instances in flight at once (**per device** with a mesh), to bound memory; the
        last chunk is padded and the padding dropped. ``None``: all at once.
      mesh: spreads the instances over ``mesh.shape[axis]`` devices with ``jax.shard_map``;
        parameters are replicated over ``axis``, other mesh axes stay automatic.
      axis: the mesh axis that holds the instances.

    Returns:
      ``(params, xs, keys) -> (outputs, info)``: every leaf of ``xs``, ``outputs`` and ``info``
      has a leading axis N, ``keys`` is ``[N]`` (see :func:`sample_keys`). Wrap it in ``jax.jit``.

    Raises:
      TypeError: ``predictor`` is a stream, a model function, or batched already.
      ValueError: ``chunk_size`` < 1, an unknown mesh axis; when called: unequal leading axes, an
        empty batch, keys that are not one typed key per instance, or a mesh with several axes
        outside of ``jax.jit``.
    """
    _contract.require_predictor("predictor", predictor)
    if chunk_size is not None:
        _checks.check_count("chunk_size, unless None,", chunk_size)
    if mesh is not None and axis not in mesh.shape:
        raise ValueError(
            f"axis must name an axis of the mesh; got {axis!r}, the mesh has "
            f"{', '.join(map(repr, mesh.shape))}."
        )
    local = _in_chunks(predictor, chunk_size)
    if mesh is not None:
        mesh = automatic(mesh)

    def run(params: Params, xs: Any, keys: Key) -> tuple[Any, Info]:
        count = _count(xs, keys)
        if mesh is None:
            return local(params, xs, keys)
        if _EXPLICIT in jax.sharding.get_abstract_mesh().axis_types:
            raise ValueError(
                "batched(mesh=...) needs axes of automatic type; got a call under jax.set_mesh of "
                f"{jax.sharding.get_abstract_mesh()}. Make that mesh with "
                "axis_types=(jax.sharding.AxisType.Auto,), or leave jax.set_mesh out."
            )
        if len(mesh.shape) > 1 and not _is_traced((params, xs, keys)):
            raise ValueError(
                "batched over one of several mesh axes runs under jax.jit only; got the mesh axes "
                f"{', '.join(map(repr, mesh.shape))}. Call jax.jit(batched(...)) instead."
            )
        devices = mesh.shape[axis]
        total = -(-count // devices) * devices
        xs, keys = _padded((xs, keys), count, total)
        results = _over_mesh(local, mesh, axis)(params, xs, keys)
        return jax.tree.map(lambda leaf: leaf[:count], results)

    return _contract.OverInstances(run)


def automatic(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """The mesh with axes of automatic type: over explicit ones instances must be placed before."""
    if _EXPLICIT in mesh.axis_types:
        return jax.sharding.Mesh(mesh.devices, mesh.axis_names)
    return mesh


def _over_mesh(local: BatchedPredictor, mesh: jax.sharding.Mesh, axis: str) -> BatchedPredictor:
    """``local`` on each device's own instances.

    Plain ``jit`` over sharded inputs all-gathers grouped convolutions. Inside ``shard_map`` with
    its replication checks on, a model function that scans from a carry of zeros is refused, and a
    user's own adapter would sum its gradients for replicated parameters over the mesh. With the
    checks off a gradient is the device's own, as it must be here.
    """
    each = jax.sharding.PartitionSpec(axis)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(jax.sharding.PartitionSpec(), each, each),
        out_specs=each,
        axis_names={axis},
        check_vma=False,
    )
