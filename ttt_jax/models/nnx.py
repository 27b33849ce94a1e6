"""The bridge for Flax NNX: any module becomes a pure model function and its parameters.

NNX's split and merge share ``Variable`` objects, so that running a merged BatchNorm in training
mode would change the *original* model. Here the module is split once into raw arrays, and every
call merges fresh Variables from them.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ttt_jax import _arguments
from ttt_jax.models._checks import batch_size, check_method
from ttt_jax.models._instance_norm import InstanceAware
from ttt_jax.models._nnx_batchnorm import serve
from ttt_jax.models._norm import Norm, Served, check_norm

_Path = tuple[Any, ...]


@_arguments.checked(module=None)
def from_nnx(
    module: nnx.Module,
    method: str = "__call__",
    *,
    norm: Norm = "running",
    stochastic: bool = False,
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Turns an NNX module into a pure model function and its parameters.

    The module is left untouched, bitwise, and its mode (training or evaluation, dropout on or
    off) is the one its caller had set when ``from_nnx`` was called. Only ``norm`` overrides:
    it is served at every ``nnx.BatchNorm`` during the forward pass, whatever
    ``use_running_average`` says; see :func:`ttt_jax.models.from_linen`.

    Args:
      module: any ``nnx.Module``.
      method: the name of the method to call.
      norm: ``"running"``, ``"batch"`` or a prior N >= 0, which may be traced.
      stochastic: whether ``apply`` takes a key that reseeds every random stream of the module.
        Without it, the random state is that of the module when it was split: an active dropout
        uses the *same* mask in every call and for every instance.
      kwargs: further keyword arguments of every call.

    Returns:
      ``(apply, params)``. ``apply(params, inputs[N, ...], *args) -> outputs[N, ...]``, or with
      ``stochastic=True`` ``apply(params, inputs, *args, key)``. ``params`` is a plain nested
      dict, the same for every method, with Linen's path names: ``params`` holds every
      ``nnx.Param``, ``batch_stats`` every ``nnx.BatchStat``, another ``Variable`` type has a
      collection of its own name, and arrays outside of Variables are in ``arrays``. Random
      state is never part of it.

    Raises:
      TypeError: ``module`` is no NNX module, or ``norm`` of an impossible type.
      ValueError: an unknown method or ``norm``; ``stochastic=True`` for a module that has no
        random state and whose method takes no ``rngs``; from ``apply``: batch statistics of a
        single instance, or ``params`` of another structure.
    """
    check_norm(norm)
    if isinstance(norm, InstanceAware):
        raise ValueError(
            "from_nnx serves running statistics, those of the batch, or a prior; received "
            "InstanceAware: use from_linen, or normalize so in the module itself."
        )
    run, params = _runner(module, method, kwargs, stochastic, "from_nnx")

    def apply(params: Any, inputs: Any, *args: Any) -> Any:
        key = None
        if stochastic:
            if not args:
                raise ValueError(
                    "from_nnx: a stochastic model function is called as apply(params, inputs, "
                    "key), received no key: pass one, or build it with stochastic=False."
                )
            args, key = args[:-1], args[-1]
        return run(params, key, norm, False, inputs, *args)[0]

    return apply, params


@_arguments.checked(module=None)
def nnx_statistics(
    module: nnx.Module,
    method: str = "__call__",
    *,
    kwargs: Mapping[str, Any] | None = None,
    outputs: bool = False,
) -> Callable[[Any, Any], Any]:
    """Builds the function that collects a batch's normalization statistics.

    The NNX form of :func:`ttt_jax.models.linen_statistics`, for the ``params`` of
    :func:`from_nnx`.

    Args:
      module: any ``nnx.Module`` with ``nnx.BatchNorm`` layers; it is not changed.
      method: the method that is run.
      kwargs: further keyword arguments of the call.
      outputs: whether the outputs of the same pass come back too.

    Returns:
      ``collect(params, x[N, ...]) -> statistics``: shaped like ``params``, ``None`` outside of
      ``batch_stats``. With ``outputs``: ``(outputs, statistics)``.

    Raises:
      TypeError: ``module`` is no NNX module.
      ValueError: an unknown method, a module without batch statistics; from ``collect``: a
        single instance.
    """
    run, source = _runner(module, method, kwargs, False, "nnx_statistics")
    if "batch_stats" not in source:
        raise ValueError(
            "nnx_statistics: the module needs batch statistics (nnx.BatchStat), received "
            f"{type(module).__name__} with {sorted(source)}: use a model with BatchNorm."
        )

    def collect(params: Any, x: Any) -> Any:
        made, model = run(params, None, "batch", True, x)
        new = nnx.to_flat_state(nnx.as_pure(nnx.state(model, nnx.BatchStat)))
        statistics = jax.tree.map(lambda _: None, dict(params))
        statistics["batch_stats"] = _nest({path: value for path, value in new})
        return (made, statistics) if outputs else statistics

    return collect


def _runner(
    module: Any, method: str, kwargs: Mapping[str, Any] | None, stochastic: bool, bridge: str
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Splits the module once; ``run`` merges it anew and calls the method."""
    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"{bridge} takes an nnx.Module, received {type(module).__name__}: "
            "use from_linen for a Linen module."
        )
    check_method(type(module), method, bridge)
    graphdef, state = nnx.split(module)
    collections: dict[str, dict[_Path, Any]] = {}
    private: dict[_Path, Any] = {}
    streams: dict[_Path, type] = {}
    for path, variable in nnx.to_flat_state(state):
        value = nnx.as_pure(variable)
        name = _collection(variable, value)
        if name is None:
            private[path] = value
            if isinstance(variable, nnx.RngKey | nnx.RngCount):
                streams[path] = type(variable)
        else:
            collections.setdefault(name, {})[path] = value
    params = {name: _nest(leaves) for name, leaves in collections.items()}
    where = {path: name for name, leaves in collections.items() for path in leaves}

    takes_rngs = "rngs" in inspect.signature(getattr(type(module), method)).parameters
    if stochastic and not streams and not takes_rngs:
        raise ValueError(
            f"{bridge}: stochastic=True reseeds the module's random state, but "
            f"{type(module).__name__} has none: build its random layers with rngs=, or use "
            "stochastic=False."
        )

    def run(
        params: Any, key: jax.Array | None, norm: Norm, collect: bool, inputs: Any, *args: Any
    ) -> tuple[Any, Any]:
        size = batch_size(inputs, bridge, norm)
        leaves = dict(private)
        options = dict(kwargs or {})
        if key is not None:
            leaves.update(_reseeded(private, streams, key))
            if takes_rngs and "rngs" not in options:
                options["rngs"] = nnx.Rngs(jax.random.fold_in(key, len(streams)))
        for path, name in where.items():
            leaves[path] = _lookup(params, name, path, bridge)
        model = nnx.merge(graphdef, nnx.from_flat_state(leaves))
        served = Served(bridge, module, norm)
        if serve(model, norm, size, collect=collect):
            served.meet()
        served.check(params)
        return getattr(model, method)(inputs, *args, **options), model

    return run, params


def _collection(variable: Any, value: Any) -> str | None:
    """The collection a leaf belongs to; ``None`` for what stays inside ``apply``."""
    arrays = [leaf for leaf in jax.tree.leaves(value) if isinstance(leaf, jax.Array | np.ndarray)]
    keys = [leaf for leaf in arrays if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    if isinstance(variable, nnx.RngState) or keys or not arrays:
        return None
    if not isinstance(variable, nnx.Variable):
        return "arrays"
    if isinstance(variable, nnx.Param):
        return "params"
    if isinstance(variable, nnx.BatchStat):
        return "batch_stats"
    return nnx.variable_name_from_type(type(variable), allow_register=True)


def _nest(leaves: Mapping[_Path, Any]) -> dict[str, Any]:
    """A nested dict with string keys: jax cannot sort a level that mixes them with integers."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        node = tree
        for part in path[:-1]:
            node = node.setdefault(str(part), {})
        node[str(path[-1])] = value
    return tree


def _lookup(params: Any, name: str, path: _Path, bridge: str) -> Any:
    node = params
    for part in (name, *map(str, path)):
        if not isinstance(node, Mapping) or part not in node:
            raise ValueError(
                f"{bridge}: params must have the structure that from_nnx returned, but "
                f"{'/'.join((name, *map(str, path)))!r} is missing: pass the whole tree."
            )
        node = node[part]
    return node


def _reseeded(
    private: Mapping[_Path, Any], streams: Mapping[_Path, type], key: jax.Array
) -> dict[_Path, Any]:
    """New stream keys, one per stream and each from ``key``; counts start again at zero."""
    fresh = {}
    for index, (path, kind) in enumerate(streams.items()):
        old = private[path]
        if issubclass(kind, nnx.RngKey):
            stream = jax.random.fold_in(key, index)
            fresh[path] = jax.random.split(stream, old.shape) if old.shape else stream
        else:
            fresh[path] = jnp.zeros_like(old)
    return fresh
